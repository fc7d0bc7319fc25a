"""The results of a batch of rows, the same for every backend: autograd need not know which ran."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LogitMap(NamedTuple):
    """logit = softcap tanh(scale x / softcap) of a model's output x, or scale x without a softcap.

    What is not finite stays as it is: a forbidden token has no probability, whatever the softcap.
    """

    softcap: float | None = None
    scale: float = 1.0


class RowResult(NamedTuple):
    """Per-row results in fp32; exactly 0 for rows that are not valid."""

    loss: Tensor  # [N]
    state: Tensor  # [N, layout.STATE_WIDTH] for the backend's own backward
    stats: Tensor  # [N, len(layout.STATISTICS)], columns in that order


def damping(loss: Tensor) -> Tensor:
    """The power of two at or below 2 + |loss|: |ds| <= rate (2 + |loss|) < 2 rate damping.

    The bound: u = ln p - ln q, rate = logit_scale / T, |w (q - p)| <= w, q_j u_j <= p_j <= 1, and
    sum_j q_j |u_j| over u_j < 0 exceeds reverse_kl by no more than 1, so that |ds_j| is at most
    rate (w + (1 - w) (1 + reverse_kl)), and (1 - w) reverse_kl at most |loss| + w."""
    return power_of_two(loss.abs() + 2.0)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below x > 0, fp32."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def room(rate: float, largest: float) -> float:
    """The power of two g for which g |ds| / damping(loss) stays below `largest`."""
    return 2.0 ** min(max(math.floor(math.log2(largest / (2.0 * rate))), -100), 100)
