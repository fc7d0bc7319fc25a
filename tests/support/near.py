"""A comparison of losses and gradients of a few hundred tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to fp32 sums over the vocabulary, and to the rounding of a bf16 gradient."""
    rtol = 1e-2 if actual.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=2e-6)
