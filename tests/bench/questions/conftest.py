"""Rows of logits whose cost is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

V = 36_864  # too long a row to be held on chip


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    """Logits in bf16: a confident teacher, one that is not, and one whose logits at the boundary
    all tie."""
    sure = torch.zeros(V)
    sure[7] = 20.0
    unsure = torch.linspace(-4.0, 4.0, V)[
        torch.randperm(V, generator=torch.Generator().manual_seed(0))
    ]
    tied = torch.zeros(V)
    teacher = torch.stack([sure, unsure, tied]).bfloat16()
    student = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    return student, teacher
