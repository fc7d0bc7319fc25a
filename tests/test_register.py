"""A divergence from outside by `register`, and the steps of CONTRIBUTING for one from inside."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import akl_triton
from akl_triton import Alpha, SumOfTerms, distillation_loss, linear_distillation_loss, register
from akl_triton import divergences as family
from akl_triton.divergences import number
from tests.support.cases import DIVERGENCES, rows_of_every_kind

ROOT = Path(__file__).resolve().parents[1]
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@dataclasses.dataclass(frozen=True)
class Hellinger(SumOfTerms):
    """``strength sum_i (sqrt p_i - sqrt q_i)^2``, half of ``strength`` times Alpha(1/2)."""

    name = "hellinger"
    strength: float = number(1.0, above=0.0)


def torch_terms(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """strength (sqrt p - sqrt q)^2"""
    both = (p * q).sqrt()
    return strength * (p - both), strength * (q - both)


@pytest.fixture
def hellinger() -> Iterator[type[Hellinger]]:
    try:
        from tests.support.hellinger import hellinger as device_terms
    except ImportError:  # no Triton here
        device_terms = None
    register(Hellinger, triton=device_terms, torch=torch_terms)
    yield Hellinger
    del family.FAMILY["hellinger"], family.TERMS["hellinger"]


@pytest.fixture(params=["triton"] if INTERPRETER else ["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch" or INTERPRETER or torch.cuda.is_available():
        yield request.param
        return
    pytest.importorskip("triton")
    from bench.lab import ptxcpu

    with ptxcpu.active(arch=90):
        yield request.param


@pytest.mark.parametrize("inplace", [False, True])
def test_a_member_from_outside(hellinger: Any, backend: str, inplace: bool) -> None:
    """A registered divergence works by object and by name, through both doors, with gradients."""
    student, teacher = rows_of_every_kind()

    def evaluate(divergence: Any, scale: float) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        loss_function: Any = distillation_loss
        loss = loss_function(
            1.0 * leaf,
            teacher,
            divergence=divergence,
            reduction="none",
            inplace=inplace,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad(loss, leaf, torch.linspace(-1.0, 1.0, len(loss)))
        return scale * loss.detach(), scale * gradient

    expected = evaluate(Alpha(0.5), 1.5)
    for ours, exact in zip(evaluate(hellinger(3.0), 1.0), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=3e-6, equal_nan=True)
    named = evaluate("hellinger", 3.0)
    torch.testing.assert_close(named[0], expected[0], rtol=1e-4, atol=3e-6, equal_nan=True)


def test_a_member_from_outside_in_the_linear_form_and_compiled(hellinger: Any) -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    teacher = torch.randn(3, 8)

    def run(hidden: Tensor) -> Tensor:
        return linear_distillation_loss(
            hidden, weight, teacher, weight, divergence=hellinger(2.0), backend="torch"
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), run(hidden))
    expected = distillation_loss(hidden @ weight.T, teacher @ weight.T, divergence=Alpha(0.5))
    torch.testing.assert_close(run(hidden), expected)


def test_what_register_refuses(hellinger: Any) -> None:
    @dataclasses.dataclass(frozen=True)
    class Impostor(SumOfTerms):
        name = "forward_kl"

    with pytest.raises(
        ValueError, match=r"^kind: expected a name that no other member has, got 'f"
    ):
        register(Impostor, torch=torch_terms)

    @dataclasses.dataclass(frozen=True)
    class Greedy(SumOfTerms):
        name = "greedy"
        a: float = number(1.0)
        b: float = number(1.0)
        c: float = number(1.0)

    with pytest.raises(ValueError, match=r"^kind: expected at most two numbers for its f"):
        register(Greedy, torch=torch_terms)
    with pytest.raises(ValueError, match=r"^strength: expected a finite number in \(0, inf\)"):
        hellinger(-1.0)
    with pytest.raises(TypeError, match=r"^divergence: expected a member of the family"):
        distillation_loss(torch.zeros(1, 3), torch.zeros(1, 3), divergence=Impostor())


def test_the_steps_of_contributing_are_all_there_are() -> None:
    """Each member is in the files that CONTRIBUTING names, and in no others except for generated
    tables, its own tests and a short name."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    _, steps = text.split("## Add a divergence", 1)
    files = re.findall(r"^\d\. `([\w./]+)`", steps.split("## ", 1)[0], flags=re.MULTILINE)
    assert len(files) == 6
    sources = {
        str(path.relative_to(ROOT)): path.read_text("utf-8")
        for folder in ("akl_triton", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "akl_triton" / "kernels")
    }
    for name, kind in family.FAMILY.items():
        # Those whose weights are statistics of a row have no function of an entry of their own.
        if not issubclass(kind, SumOfTerms) or not kind().terms.startswith(name):
            continue
        assert any(isinstance(case, kind) for case in DIVERGENCES), f"{name} is no case"
        assert kind.__name__ in akl_triton.__all__
        pattern = re.compile(rf"\bdef _?{name}\b|\bclass {kind.__name__}\b|\b{kind.__name__},")
        found = {path for path, source in sources.items() if pattern.search(source)}
        found -= {"akl_triton/losses.py", "akl_triton/linear_losses.py"}  # short names
        found -= {"akl_triton/integrations/trl.py"}  # what TRL's own numbers mean
        assert found == set(files) - {"tests/support/cases.py"}, name
