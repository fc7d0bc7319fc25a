"""Every member of the family through every door, with every kind of row and option, by one table.

The rows, options and divergences stand in tests/support/cases.py; what is right is the rule of
akl_triton.verify.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import distillation_loss, linear_distillation_loss
from akl_triton.divergences import AdaptiveKL, Divergence
from akl_triton.verify import exact, faults, head_faults
from tests.support.cases import DIVERGENCES, OPTIONS, rows_of_every_kind

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if INTERPRETER else ["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The PyTorch backend, and the kernels: interpreted, or as compiled PTX, or on a GPU."""
    if request.param == "torch" or INTERPRETER or torch.cuda.is_available():
        yield request.param
        return
    pytest.importorskip("triton")
    from bench.lab import ptxcpu

    with ptxcpu.active(arch=90):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def of_logits(
    student: Tensor, teacher: Tensor, upstream: Tensor, inplace: bool, **options: Any
) -> tuple[Tensor, Any, Tensor]:
    """(loss, statistics or None, gradient)"""
    leaf = student.clone().requires_grad_()
    loss, stats = distillation_loss(
        leaf.clone() if inplace else leaf,
        teacher,
        reduction="none",
        inplace=inplace,
        return_stats=True,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), stats, gradient


def of_hidden_states(
    student: Tensor, teacher: Tensor, upstream: Tensor, **options: Any
) -> tuple[Tensor, Any, Tensor]:
    """The same: hidden states I and weights that are the transposed logits make exact products."""
    n, device = len(student), student.device
    weight = student.t().contiguous().requires_grad_()
    loss, stats = linear_distillation_loss(
        torch.eye(n, dtype=student.dtype, device=device),
        weight,
        torch.eye(n, dtype=teacher.dtype, device=device),
        teacher.t().contiguous(),
        reduction="none",
        return_stats=True,
        chunk_bytes=3 * (student[0].nbytes + teacher[0].nbytes),
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, weight, upstream)
    return loss.detach(), stats, gradient.t()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("door", ["logits", "in place", "hidden states"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_row(
    divergence: Divergence, door: str, options: str, backend: str, device: torch.device
) -> None:
    if backend == "triton" and door == "hidden states" and options:
        pytest.skip("the same kernel as in place")
    student, teacher = rows_of_every_kind(finite=door == "hidden states")
    maps = OPTIONS[options]
    upstream = torch.linspace(-1.0, 2.0, len(student))
    call: dict[str, Any] = {"divergence": divergence, "backend": backend, **maps}
    inputs = student.to(device), teacher.to(device), upstream.to(device)
    if door == "hidden states":
        loss, stats, gradient = of_hidden_states(*inputs, **call)
    else:
        loss, stats, gradient = of_logits(*inputs, inplace=door == "in place", **call)

    claims = {name: column.cpu() for name, column in stats._asdict().items()}
    found = []
    if isinstance(divergence, AdaptiveKL):
        of_head = {name: claims[name] for name in ("head_size", "head_mass", "forward_weight")}
        found += head_faults(student, teacher, **of_head, **vars(divergence), **maps)
    of = exact(
        divergence,
        student,
        teacher,
        size=claims["head_size"],
        forward_weight=claims["forward_weight"],
        gap=claims["gap"],
        **maps,
    )
    found += faults(loss, gradient, of, upstream=upstream, roundings=1.0 if INTERPRETER else 0.5)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_statistics_say_the_same_for_every_divergence(divergence: Divergence, backend: str) -> None:
    if backend == "triton":
        pytest.skip("tests/kernels/test_oracle.py")
    student, teacher = rows_of_every_kind()
    _, stats = distillation_loss(student, teacher, divergence=divergence, return_stats=True)
    _, expected = distillation_loss(student, teacher, divergence="mixed_kl", return_stats=True)
    for name in ("forward_kl", "reverse_kl", "gap"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(expected, name), rtol=2e-6, atol=2e-6, equal_nan=True
        )
