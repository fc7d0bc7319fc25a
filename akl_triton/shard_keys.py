"""The integer keys by which kernels/head.py orders logits, in PyTorch.

The key of a logit is the sign-magnitude bits of its own dtype, made monotone: x < y exactly where
key(x) < key(y), and -0.0 has the key of 0.0. All keys of 16-bit logits lie within 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 key of the `dtype` value nearest to x, of any shape; `dtype` is fp16, bf16 or fp32."""
    x = x.float()
    x = x.masked_fill(x == 0.0, 0.0)  # -0.0 equals 0.0
    if dtype == torch.float16:
        return _mirrored(x.half().view(torch.int16).long(), 0x7FFF)
    key = _mirrored(x.view(torch.int32).long(), 0x7FFFFFFF)
    if dtype == torch.bfloat16:  # a negative number of bf16 ends in ones, and would be rounded up
        key = ((key + 0x8000) >> 16) + (key >> 63)
    return key


def value_of(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 value whose key this is."""
    key = key.long()
    if dtype == torch.float16:
        return _mirrored(key, 0x7FFF).to(torch.int16).view(torch.float16).float()
    if dtype == torch.bfloat16:
        key = key << 16 | ((key >> 63) & 0xFFFF)
    return _mirrored(key, 0x7FFFFFFF).to(torch.int32).view(torch.float32)


def lowest_key(dtype: torch.dtype) -> int:
    """Key of the lowest finite number, in fp32 that of bf16."""
    lowest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min
    return int(key_of(torch.tensor(lowest, dtype=torch.float32), dtype))


def _mirrored(bits: Tensor, magnitude: int) -> Tensor:
    """Negative numbers in the order of their values; its own inverse."""
    return bits ^ ((bits >> 63) & magnitude)
