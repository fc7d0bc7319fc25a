"""Our losses of logits, and the calls that make other kernels of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import akl_triton

Loss = Callable[..., Any]

LOSSES: dict[str, Loss] = {
    "adaptive_kl": akl_triton.adaptive_kl,
    "forward_kl": akl_triton.forward_kl,
    "reverse_kl": akl_triton.reverse_kl,
}
# What a call may ask for besides, which makes other kernels of the same loss.
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "inclusive head": {"head": "inclusive"},
    "average ties": {"ties": "average"},
    "statistics": {"return_stats": True},
    "softcaps": {"student_softcap": 30.0, "teacher_softcap": 30.0},
}
