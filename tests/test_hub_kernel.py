"""The repository for the kernel hub holds all that it needs, and computes what the package does."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A kernel may import these, and the standard library; torch itself needs the last.
ALLOWED = {"torch", "triton", "typing_extensions"}
# Loads the kernel where the package cannot be imported, then the package next to it.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from kernels import get_local_kernel

package = sys.modules.pop("akl_triton", None)
sys.modules["akl_triton"] = None  # an import of it fails
kernel = get_local_kernel(Path(sys.argv[1]))

generator = torch.Generator().manual_seed(0)
student, teacher = torch.randn(2, 3, 33, generator=generator)
hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(33, 8, generator=generator)
labels = torch.tensor([1, -100, 2])

def bits(library):
    results = []
    for backend in ("torch", "triton"):
        s, h, w = (x.clone().requires_grad_() for x in (student, hidden, weight))
        loss = library.adaptive_kl(s, teacher, labels, backend=backend)
        linear = library.linear_adaptive_kl(h, w, hidden, weight.flip(0), labels, backend=backend)
        (loss + linear).backward()
        results += [loss, linear, s.grad, h.grad, w.grad]
    return results

alone = bits(kernel)
del sys.modules["akl_triton"]
import akl_triton
ours, beside = bits(akl_triton), bits(kernel)
assert all(x.abs().sum() > 0 for x in ours)
assert all(map(torch.equal, ours, alone)) and all(map(torch.equal, ours, beside))
operators = [name for name in torch._C._dispatch_get_all_op_names() if "akl_triton" in name]
print(json.dumps([kernel.__name__, operators]))
"""


@pytest.fixture(scope="module")
def hub_kernel() -> Any:
    spec = importlib.util.spec_from_file_location("hub_kernel", ROOT / ".ci" / "hub_kernel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_are_relative_or_allowed(hub_kernel: Any) -> None:
    for path in hub_kernel.sources().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            top = {name.split(".")[0] for name in names}
            assert top <= ALLOWED | sys.stdlib_module_names, f"{path}: {names}"


def test_it_computes_the_same_next_to_the_package(hub_kernel: Any, tmp_path: Path) -> None:
    pytest.importorskip("kernels")
    pytest.importorskip("triton")
    hub_kernel.build(tmp_path / "hub")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "hub"],
        env={**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    name, operators = json.loads(result.stdout.splitlines()[-1])
    assert name.startswith("_akl_triton_")
    ours = {operator for operator in operators if operator.startswith("akl_triton::")}
    assert "akl_triton::linear_divergence" in ours
    theirs = {operator.replace("akl_triton::", f"{name}::") for operator in ours}
    assert set(operators) == ours | theirs


def test_what_a_folder_held_is_kept(hub_kernel: Any, tmp_path: Path) -> None:
    hub_kernel.build(tmp_path / "hub")
    name = tmp_path / "hub" / "build" / "torch-universal" / "metadata.json"
    before = name.read_text("utf-8")
    hub_kernel.build(tmp_path / "hub")  # anew
    assert name.read_text("utf-8") == before
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        hub_kernel.build(tmp_path)
    assert (tmp_path / "mine.txt").exists()
