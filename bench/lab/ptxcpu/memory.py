"""Tensors far larger than the machine's memory, to test the addresses that a kernel computes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

_MAP_NORESERVE = 0x4000  # Linux; Python's mmap module has no name for it before 3.13


def virtual_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that takes memory only for the pages that are written.

    Example:
        >>> logits = virtual_tensor((65_536, 65_536), torch.bfloat16)  # 8 GiB, of which 0 are used
        >>> logits[-1, -1] = 1.0
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
