"""What `import akl_triton` costs and needs."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_TRITON = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch, akl_triton
student = torch.zeros(2, 5, requires_grad=True)
akl_triton.adaptive_kl(student, torch.randn(2, 5)).backward()
assert student.grad is not None
try:
    akl_triton.adaptive_kl(student, torch.randn(2, 5), backend="triton")
except ValueError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError("backend='triton' ran without triton")
"""

COST = """
import time, torch, sys
before = set(sys.modules)
start = time.perf_counter()
import akl_triton
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = new & {"triton", "rich", "matplotlib", "transformers", "numpy", "kernels"}
assert not heavy, heavy
assert seconds < 0.5, seconds
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton() -> None:
    run(WITHOUT_TRITON)


def test_cost() -> None:
    run(COST)
