"""The cost and the needs of `import akl_triton`, each time in a fresh process."""

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
teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]]).expand(2, 5)
loss = akl_triton.adaptive_kl(student, teacher)
loss.backward()
expected = akl_triton.adaptive_kl(student, teacher, backend="torch")
assert torch.equal(loss, expected) and loss > 0.1, loss
assert student.grad.abs().sum() > 0.1
try:
    akl_triton.adaptive_kl(student, teacher, backend="triton")
except ValueError as error:
    print(error)
"""

# The time is CPU time, as other work of the machine must not matter.
COST = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import akl_triton
print(time.process_time() - start, *sorted(set(sys.modules) - before))
"""

TORCH_BACKEND = """
import sys, torch, akl_triton
student = torch.zeros(2, 5, requires_grad=True)
akl_triton.adaptive_kl(student, torch.eye(2, 5), backend="torch").backward()
print(*sorted(sys.modules))
"""

INTEGRATIONS = """
import sys, torch
from akl_triton.integrations import distillation_loss_of_models
try:
    distillation_loss_of_models(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), {}, torch.zeros(1, 2))
except TypeError as error:
    assert str(error).startswith("student: expected a causal language model"), error
    print(*sorted(sys.modules))
"""

HEAVY = {"matplotlib", "numpy", "rich", "transformers", "triton", "kernels"}


def output_of(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, text=True, stdout=subprocess.PIPE
    )
    return result.stdout.strip()


def test_without_triton() -> None:
    """As on macOS and Windows, backend="auto" computes in PyTorch."""
    assert output_of(WITHOUT_TRITON).endswith("got 'triton', but triton is not installed")


def test_cost() -> None:
    seconds, *modules = output_of(COST).split()
    loaded = {name.partition(".")[0] for name in modules}
    assert "akl_triton" in loaded
    assert not loaded & HEAVY
    assert not {"akl_triton.kernels.launch", "torch._dynamo"} & set(modules)
    assert float(seconds) < 0.3


def test_the_torch_backend_leaves_the_rest_alone() -> None:
    modules = set(output_of(TORCH_BACKEND).split())
    assert "akl_triton.eager" in modules
    assert not {"akl_triton.kernels.launch", "akl_triton.cli"} & modules


def test_integrations_import_nothing_that_they_integrate_with() -> None:
    """Who has a model of theirs has imported them."""
    loaded = {name.partition(".")[0] for name in output_of(INTEGRATIONS).split()}
    assert "akl_triton" in loaded
    assert not {"transformers", "peft", "accelerate", "trl"} & loaded
