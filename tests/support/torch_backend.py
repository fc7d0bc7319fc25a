"""Calls of the PyTorch backend, with a rule or with its options one by one, into outputs full of
NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from akl_triton import eager, eager_chunks, eager_head, eager_kls, eager_terms
from akl_triton.divergences import AdaptiveKL, Head, MixedKL, Rule, Ties
from akl_triton.kernels.layout import STATE_WIDTH, STATISTICS
from akl_triton.rows import LogitMap, RowResult

IDENTITY = LogitMap()


def rule(
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    head: Head = "exclusive",
    ties: Ties = "stable",
    weight: float | None = None,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
) -> Rule:
    """The rule of adaptive KL or, with a weight, of the mixture with that weight."""
    divergence = AdaptiveKL(mu, head, ties) if weight is None else MixedKL(weight)
    return Rule(divergence, temperature, student_map, teacher_map)


def forward(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    *,
    upstream: Tensor | None = None,
    out: Tensor | None = None,
    damped: bool = False,
    **options,
) -> RowResult:
    """Loss, state and statistics of rows, and with `out` their gradient."""
    return forward_of(
        rule(**options), student, teacher, valid, upstream=upstream, out=out, damped=damped
    )


def forward_of(
    rule: Rule,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    *,
    upstream: Tensor | None = None,
    out: Tensor | None = None,
    damped: bool = False,
) -> RowResult:
    """The same for any rule."""
    n = student.shape[:-1].numel()
    nan = torch.full((), torch.nan, dtype=torch.float32, device=student.device)
    result = RowResult(
        nan.repeat(n),
        nan.repeat(n, STATE_WIDTH),
        nan.repeat(n, len(STATISTICS)),
    )
    eager.forward(
        student,
        teacher,
        valid,
        None,
        rule,
        result,
        upstream=upstream,
        gradient=out,
        damped=damped,
    )
    return result


def backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    state: Tensor,
    *,
    out: Tensor,
    **options,
) -> None:
    """Write upstream * dloss/dstudent into `out`."""
    eager.backward(upstream, student, teacher, valid, None, state, rule(**options), out)


def never_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of devices on which a look at a value would stall."""
    for module in (eager, eager_chunks, eager_head, eager_kls, eager_terms):
        monkeypatch.setattr(module, "sync_is_free", lambda x: False)
