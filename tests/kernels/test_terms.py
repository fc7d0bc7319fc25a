"""Divergences that are sums of terms, on rows of every kind and near convergence.

Those whose terms mix p and q are here: large logits put the two off by factors of their own.
tests/test_family.py has all members.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from akl_triton import (
    DKD,
    Alpha,
    AlphaBeta,
    DecoupledKL,
    Divergence,
    JensenShannon,
    MixedKL,
    SkewKL,
    SkewReverseKL,
    SumOfTerms,
    ToDi,
    distillation_loss,
)
from akl_triton.backend import Triton
from akl_triton.divergences import Rule
from akl_triton.rows import empty_result
from akl_triton.verify import exact, faults
from tests.kernels.conftest import INTERPRETER
from tests.kernels.rows import make_rows

# With two full blocks. The interpreter has no FMA, and rounds the logits of so many tokens too
# coarsely for the yardstick near convergence.
V = 701 if INTERPRETER else 6701
MEMBERS = (SkewReverseKL(detach=True), AlphaBeta(1.5, -0.3), ToDi(), DecoupledKL(1.0, 2.0, 1.5))


def run(
    divergence: SumOfTerms, student: Tensor, teacher: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of two launches, the gradient into a tensor full of NaN."""
    rule = Rule(divergence)
    result = empty_result(student[None], with_stats=False)
    Triton.forward(student[None], teacher[None], None, None, rule, result)
    gradient = torch.full_like(student, torch.nan)
    Triton.backward(
        *(upstream, student[None], teacher[None], None, None),
        *(result.state, rule, gradient[None]),
    )
    return result.loss.cpu(), gradient.cpu()


@pytest.mark.skipif(INTERPRETER, reason="nothing is compiled")
def test_numbers_compile_nothing() -> None:
    """Each member is compiled once, whatever its numbers, the ratio of the labels and T are."""
    from bench.lab.compile import record_launches

    pairs: tuple[tuple[Divergence, Divergence], ...] = (
        (MixedKL(0.3), MixedKL(0.7)),
        (JensenShannon(0.5), JensenShannon(0.1)),
        (SkewKL(0.1), SkewKL(0.6)),
        (SkewReverseKL(0.1), SkewReverseKL(0.6)),
        (SkewReverseKL(0.1, detach=True), SkewReverseKL(0.6, detach=True)),
        (Alpha(0.5), Alpha(2.0)),
        (AlphaBeta(0.2, 0.7), AlphaBeta(1.5, -0.3)),
        (DKD(1.0, 8.0), DKD(0.5, 1.0)),
        (DecoupledKL(1.0, 1.0, 1.0), DecoupledKL(0.5, 2.0, 0.0)),
    )
    logits = torch.zeros(2, V)
    labels = torch.zeros(2, dtype=torch.int64)
    with record_launches("sm_90") as launches:
        for pair in pairs:
            for divergence, kd_ratio, temperature in zip(pair, (0.5, 0.2), (2.0, 3.0), strict=True):
                distillation_loss(
                    logits.clone(), logits, labels, divergence=divergence, kd_ratio=kd_ratio,
                    temperature=temperature, inplace=True, backend="triton",
                )  # fmt: skip
    kernels = [launch.compiled.hash for launch in launches]
    assert kernels[::2] == kernels[1::2]
    assert len(set(kernels)) == len(pairs)


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
    """Down to differences of 1e-6 no loss is negative, and the gradient is right."""
    g = torch.Generator().manual_seed(0)
    distances = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5, 1e-6])[:, None]
    teacher = 3 * torch.randn(len(distances), V, generator=g)
    student = teacher + distances * torch.randn(len(distances), V, generator=g)
    upstream = torch.ones(len(distances))
    loss, gradient = run(divergence, *(x.to(device) for x in (student, teacher, upstream)))
    assert (loss >= 0.0).all(), loss
    found = faults(loss, gradient, exact(divergence, student, teacher))
    assert not found, "\n".join(found)
