"""Our losses of logits, and the calls that make other kernels of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import akl_triton
from akl_triton.divergences import FAMILY

Loss = Callable[..., Any]

LOSSES: dict[str, Loss] = {
    "adaptive_kl": akl_triton.adaptive_kl,
    "forward_kl": akl_triton.forward_kl,
    "reverse_kl": akl_triton.reverse_kl,
}
LABELS = {"labels": torch.zeros(2, dtype=torch.int64)}  # of the two rows of a recorded call
# The other members of the family; each has kernels of its own.
FAMILY_LOSSES: dict[str, Loss] = {
    **{
        name: functools.partial(
            akl_triton.distillation_loss, divergence=name, **(LABELS if kind.needs_labels else {})
        )
        for name, kind in FAMILY.items()
        if name not in LOSSES
    },
    "skew_reverse_kl_detached": functools.partial(
        akl_triton.distillation_loss, divergence=akl_triton.SkewReverseKL(detach=True)
    ),
}
# Further options of a call, each of which makes other kernels of the same loss.
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "inclusive head": {"head": "inclusive"},
    "average ties": {"ties": "average"},
    "statistics": {"return_stats": True},
    "softcaps": {"student_softcap": 30.0, "teacher_softcap": 30.0},
    "labels": {**LABELS, "kd_ratio": 0.5},
    "labels, T = 2": {**LABELS, "kd_ratio": 0.5, "temperature": 2.0},
}
