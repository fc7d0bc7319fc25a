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
from akl_triton.reference import reference_adaptive_kl
from akl_triton.verify import exact, faults, head_faults
from tests.support.cases import DIVERGENCES, OPTIONS, labels_of, rows_of_every_kind

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DOORS = ("logits", "in place", "hidden states")
# Each kernel takes seconds to compile and to translate for a CPU.
COMPILED = (("logits", ""), ("in place", "labels"))
SCHEDULES = range(1, 9)  # of the warps, at random


def cases() -> list[Any]:
    """(divergence, backend, door, options): all where nothing is compiled."""
    every = [(door, options) for door in DOORS for options in OPTIONS]
    found = []
    for divergence in DIVERGENCES:
        of_backend = {"triton": every} if INTERPRETER else {"torch": every, "triton": COMPILED}
        for name, combinations in of_backend.items():
            for case in combinations:
                title = "-".join((str(divergence), name, *case))
                found.append(pytest.param(divergence, name, *case, id=title))
    return found


@pytest.fixture
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
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    upstream: Tensor,
    inplace: bool,
    **options: Any,
) -> tuple[Tensor, Any, Tensor]:
    """(loss, statistics or None, gradient)"""
    leaf = student.clone().requires_grad_()
    loss_function: Any = distillation_loss
    output = loss_function(
        leaf.clone() if inplace else leaf,
        teacher,
        labels,
        reduction="none",
        inplace=inplace,
        **options,
    )
    loss, stats = output if isinstance(output, tuple) else (output, None)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), stats, gradient


def of_hidden_states(
    student: Tensor, teacher: Tensor, labels: Tensor | None, upstream: Tensor, **options: Any
) -> tuple[Tensor, Any, Tensor]:
    """The same: hidden states I and weights that are the transposed logits make exact products."""
    n, device = len(student), student.device
    weight = student.t().contiguous().requires_grad_()
    loss_function: Any = linear_distillation_loss
    loss, stats = loss_function(
        torch.eye(n, dtype=student.dtype, device=device),
        weight,
        torch.eye(n, dtype=teacher.dtype, device=device),
        teacher.t().contiguous(),
        labels,
        reduction="none",
        chunk_bytes=3 * (student[0].nbytes + teacher[0].nbytes),
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, weight, upstream)
    return loss.detach(), stats, gradient.t()


def call_of(
    divergence: Divergence, door: str, options: str, student: Tensor
) -> tuple[Tensor | None, dict[str, Any]]:
    """The labels, if any are needed, and the options of a call."""
    needs_labels = divergence.needs_labels or "kd_ratio" in OPTIONS[options]
    with_stats = isinstance(divergence, AdaptiveKL) or door != "in place"
    call = {"divergence": divergence, "return_stats": with_stats, **OPTIONS[options]}
    return labels_of(student) if needs_labels else None, call


@pytest.mark.parametrize("divergence, backend, door, options", cases(), indirect=["backend"])
def test_every_row(
    divergence: Divergence, door: str, options: str, backend: str, device: torch.device
) -> None:
    student, teacher = rows_of_every_kind(finite=door == "hidden states")
    labels, call = call_of(divergence, door, options, student)
    call["backend"] = backend
    upstream = torch.linspace(-1.0, 2.0, len(student))
    labels_there = None if labels is None else labels.to(device)
    inputs = student.to(device), teacher.to(device), labels_there, upstream.to(device)
    if door == "hidden states":
        loss, stats, gradient = of_hidden_states(*inputs, **call)
    else:
        loss, stats, gradient = of_logits(*inputs, inplace=door == "in place", **call)

    maps = {name: value for name, value in OPTIONS[options].items() if name != "kd_ratio"}
    found = []
    of_head: dict[str, Any] = {}
    if isinstance(divergence, AdaptiveKL):
        claims = {name: column.cpu() for name, column in stats._asdict().items()}
        claimed = {name: claims[name] for name in ("head_size", "head_mass", "forward_weight")}
        found += head_faults(student, teacher, **claimed, **vars(divergence), **maps)
        of_head = {
            "size": claims["head_size"],
            "forward_weight": claims["forward_weight"],
            "gap": claims["gap"],
        }
    of = exact(divergence, student, teacher, labels=labels, **of_head, **OPTIONS[options])
    found += faults(loss, gradient, of, upstream=upstream, roundings=1.0 if INTERPRETER else 0.5)
    assert not found, "\n".join(found)
    if stats is None:
        return
    sums = reference_adaptive_kl(student, teacher, weight=0.5, **maps)
    for name in (
        *("forward_kl", "reverse_kl", "gap"),
        *("student_entropy", "teacher_entropy", "top1_agreement"),
    ):
        torch.testing.assert_close(
            getattr(stats, name).cpu().double(),
            getattr(sums, name),
            rtol=3e-6,
            atol=3e-6,
            equal_nan=True,
        )


@pytest.mark.skipif(INTERPRETER or torch.cuda.is_available(), reason="runs compiled PTX on the CPU")
@pytest.mark.parametrize("door, options", COMPILED)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_no_schedule_of_the_warps_changes_a_bit(
    divergence: Divergence, door: str, options: str
) -> None:
    """Each warp runs ahead of the others somewhere: what a barrier should have kept would show."""
    ptxcpu = pytest.importorskip("bench.lab.ptxcpu")
    student, teacher = rows_of_every_kind()
    labels, call = call_of(divergence, door, options, student)
    some = torch.tensor([0, 3, 8, 9])  # also a one-hot teacher, and tokens that are -inf
    inputs = student[some], teacher[some], None if labels is None else labels[some]
    results = []
    for schedule in (0, *SCHEDULES):  # 0: in lockstep
        with ptxcpu.active(arch=90, sched=schedule):
            upstream = torch.linspace(-1.0, 2.0, len(some))
            results.append(
                of_logits(*inputs, upstream, door == "in place", backend="triton", **call)
            )
    for schedule, (loss, stats, gradient) in zip(SCHEDULES, results[1:], strict=True):
        expected_loss, expected_stats, expected_gradient = results[0]
        assert torch.equal(loss, expected_loss), schedule
        assert torch.equal(gradient, expected_gradient), schedule
        for column, expected in zip(stats or (), expected_stats or (), strict=True):
            assert torch.equal(column.nan_to_num(-1.0), expected.nan_to_num(-1.0)), schedule
