"""What every backend hands back for a batch of rows: autograd need not know which one ran."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

STATE_WIDTH = 8
STATS = ("forward_kl", "reverse_kl", "head_weight", "head_mass", "head_size", "gap")


class LogitMap(NamedTuple):
    """logit = softcap tanh(scale x / softcap) of a model's output x, or scale x without a softcap.

    What is not finite stays as it is: a forbidden token has no probability, whatever the softcap.
    """

    softcap: float | None = None
    scale: float = 1.0


class RowResult(NamedTuple):
    """Per-row results in fp32; exactly 0 for rows that do not count."""

    loss: Tensor  # [N]
    state: Tensor  # [N, STATE_WIDTH] for the backend's own backward
    stats: Tensor  # [N, len(STATS)], columns in the order of STATS
