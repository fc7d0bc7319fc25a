"""Rows of logits, and what a backend makes of them: the same for both backends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.layout import OF_STUDENT_WIDTH, PAIRS_STATE_WIDTH, STATE_WIDTH, STATISTICS


class LogitMap(NamedTuple):
    """logit = softcap tanh(scale x / softcap) of a model's output x, or scale x without a softcap.

    What is not finite stays as it is: a forbidden token has no probability, whatever the softcap.
    """

    softcap: float | None = None
    scale: float = 1.0


class RowResult(NamedTuple):
    """Per-row results in fp32; exactly 0 for rows that are not valid."""

    loss: Tensor  # [N]
    state: Tensor  # [N, layout.STATE_WIDTH] for the backend's own backward; see `PairState`
    stats: Tensor  # [N, len(layout.STATISTICS)], columns in that order


class PairState(NamedTuple):
    """The parts of the state where the teacher is pairs, each of them contiguous."""

    of_entries: Tensor  # [N, layout.STATE_WIDTH], of the divergence of the entries
    of_pairs: Tensor  # [N, layout.PAIRS_STATE_WIDTH], of what made the student's
    of_student: Tensor  # [N, layout.OF_STUDENT_WIDTH], statistics
    log_q: Tensor  # [N, k + 1], the student's entries

    @staticmethod
    def widths(pairs: int) -> tuple[int, int, int, int]:
        return STATE_WIDTH, PAIRS_STATE_WIDTH, OF_STUDENT_WIDTH, pairs + 1

    @classmethod
    def of(cls, state: Tensor, pairs: int) -> PairState:
        """The parts of the state that `empty_result` made."""
        n, widths = state.shape[0], cls.widths(pairs)
        parts = torch.split(state.view(-1), [n * width for width in widths])
        return cls(*(part.view(n, width) for part, width in zip(parts, widths, strict=True)))


def damping(loss: Tensor) -> Tensor:
    """The power of two at or below 2 + |loss|: |ds| <= `Rule.bound` (2 + |loss|) < 2 bound damping.

    The bound of the two KLs, which is the rate, logit_scale / T: with u = ln p - ln q,
    |w (q - p)| <= w, q_j u_j <= p_j <= 1, and sum_j q_j |u_j| over u_j < 0 exceeds reverse_kl by no
    more than 1, so that |ds_j| is at most rate (w + (1 - w) (1 + reverse_kl)), and
    (1 - w) reverse_kl at most |loss| + w."""
    return power_of_two(loss.abs() + 2.0)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below x > 0, fp32."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def room(bound: float, largest: float) -> float:
    """The power of two g for which g |ds| / damping(loss) stays below `largest`."""
    return 2.0 ** min(max(math.floor(math.log2(largest / (2.0 * bound))), -100), 100)


def empty_result(student: Tensor, with_stats: bool, ids: Tensor | None = None) -> RowResult:
    n, device = student.shape[0] * student.shape[1], student.device
    width = STATE_WIDTH if ids is None else sum(PairState.widths(ids.shape[1]))
    return RowResult(
        torch.empty(n, dtype=torch.float32, device=device),
        torch.empty(n, width, dtype=torch.float32, device=device),
        torch.empty(n if with_stats else 0, len(STATISTICS), dtype=torch.float32, device=device),
    )


def as_rows(*logits: Tensor) -> list[Tensor]:
    """Each [..., V] as [outer, inner, V] with unit stride in V: views wherever strides allow it.

    A batch of sequences, sliced or not, is a view; a copy is made of logits whose last dimension is
    not contiguous or whose leading dimensions need more than two strides."""
    logits = tuple(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in logits)
    if any(x.dim() == 3 and not _merges(x) for x in logits):
        return list(logits)
    # Not -1: there may be no columns.
    return [x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1]) for x in logits]


def _merges(x: Tensor) -> bool:
    """Whether the rows of [outer, inner, V] are evenly spaced."""
    return x.stride(0) == x.stride(1) * x.shape[1] or 1 in x.shape[:2]


# A gradient in fp16 that is written before its loss scale is known uses the whole range of fp16: no
# loss scale could bring back what is lost below it, and a row of 32,000 tokens has probabilities
# there. Rows are divided by `damping`, a bound of what they hold, and multiplied by `room`.
LARGEST_WRITTEN = 2.0**14
# Temporaries of work in fp32 on tensors of another dtype.
BLOCK_BYTES = 4 * 2**20


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of x that are small in fp32: on a CPU a conversion goes through a temporary."""
    step = max(BLOCK_BYTES // max(4 * x[:1].numel(), 1), 1)
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)
