"""The maps of logits in fp64, as the sweeps of a shard have them: in bits, by a rounded scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rows import LogitMap

LOG2_E = math.log2(math.e)


def scale_of(logit_map: LogitMap, temperature: float) -> float:
    """Bits that a unit of `capped` is worth: the fp32 number that the kernels multiply by."""
    scale = LOG2_E * (logit_map.softcap or logit_map.scale) / temperature
    return torch.tensor(min(scale, 2.0**126), dtype=torch.float32).item()


def capped(x: Tensor, logit_map: LogitMap) -> Tensor:
    """x, or tanh(scale x / softcap); infinities stay."""
    if logit_map.softcap is None:
        return x
    gain = min(logit_map.scale / logit_map.softcap, 2.0**126)
    return torch.where(x.isinf(), x, torch.tanh(x * gain))


def in_bits(x: Tensor, logit_map: LogitMap, temperature: float) -> Tensor:
    """log2(e) logit / T of a model's output x, fp64."""
    return capped(x.double(), logit_map) * scale_of(logit_map, temperature)
