"""Divergences that are sums of terms, on rows of every kind and near convergence.

Those whose terms mix p and q are here: large logits put the two off by factors of their own.
tests/test_family.py has all members.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from akl_triton import AlphaBeta, SkewReverseKL, SumOfTerms, ToDi
from akl_triton.backend import Triton
from akl_triton.divergences import Rule
from akl_triton.rows import empty_result
from akl_triton.verify import exact, faults
from tests.kernels.conftest import INTERPRETER
from tests.kernels.rows import make_rows

V = 701
MEMBERS = (SkewReverseKL(detach=True), AlphaBeta(1.5, -0.3), ToDi())


def run(
    divergence: SumOfTerms, student: Tensor, teacher: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of two launches, the gradient into a tensor full of NaN."""
    rule = Rule(divergence)
    result = empty_result(student[None], with_stats=False)
    Triton.forward(student[None], teacher[None], None, rule, result)
    gradient = torch.full_like(student, torch.nan)
    Triton.backward(
        upstream, student[None], teacher[None], None, result.state, rule, gradient[None]
    )
    return result.loss.cpu(), gradient.cpu()


@pytest.mark.parametrize("divergence", MEMBERS, ids=str)
def test_every_kind_of_row(divergence: SumOfTerms, device: torch.device) -> None:
    student, teacher = make_rows(V, V, torch.float32, torch.float32)
    upstream = torch.linspace(-1.0, 2.0, len(student))
    loss, gradient = run(divergence, *(x.to(device) for x in (student, teacher, upstream)))
    of = exact(divergence, student, teacher)
    found = faults(loss, gradient, of, upstream=upstream, roundings=1.0 if INTERPRETER else 0.5)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("divergence", MEMBERS, ids=str)
def test_near_convergence(divergence: SumOfTerms, device: torch.device) -> None:
    """Down to differences of 1e-6 no loss is below -1e-7, and the gradient is right.

    Powers are divided by their exponents, and so is their rounding."""
    g = torch.Generator().manual_seed(0)
    distances = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5, 1e-6])[:, None]
    teacher = 3 * torch.randn(len(distances), V, generator=g)
    student = teacher + distances * torch.randn(len(distances), V, generator=g)
    upstream = torch.ones(len(distances))
    loss, gradient = run(divergence, *(x.to(device) for x in (student, teacher, upstream)))
    exponent = min(1.0, *map(abs, divergence.numbers)) if divergence.name == "alpha_beta" else 1.0
    assert (loss >= -1e-7 / exponent).all(), loss
    found = faults(loss, gradient, exact(divergence, student, teacher))
    assert not found, "\n".join(found)
