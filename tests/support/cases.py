"""The one table of cases: divergences, kinds of rows, options. For all doors and both backends."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from akl_triton import (
    DKD,
    AdaptiveKL,
    Alpha,
    AlphaBeta,
    DecoupledKL,
    Divergence,
    EntropySwitch,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LKHybrid,
    MixedKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
)

INF = float("inf")
DIVERGENCES: tuple[Divergence, ...] = (
    AdaptiveKL(),
    AdaptiveKL(mu=0.9, head="inclusive", ties="average"),
    ForwardKL(),
    ReverseKL(),
    MixedKL(alpha=0.3),
    EntropySwitch(tau=3.0),
    DKD(beta=2.0),
    JensenShannon(),
    JensenShannon(beta=0.01),
    SkewKL(),
    SkewReverseKL(),
    SkewReverseKL(alpha=0.3, detach=True),
    TotalVariation(),
    LKHybrid(),
    DecoupledKL(),
    DecoupledKL(alpha=0.3, beta=2.0, kappa=0.5),
    Alpha(),
    Alpha(a=1.5),
    AlphaBeta(),
    ToDi(),
    Jeffreys(),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "temperature and scales": {
        "temperature": 2.0,
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 1.5,
    },
    "softcaps": {"student_softcap": 5.0, "teacher_softcap": 8.0},
    "labels": {"kd_ratio": 0.7},
    "labels at another temperature": {
        "kd_ratio": 0.25,
        "temperature": 2.0,
        "student_logit_scale": 0.5,
        "student_softcap": 5.0,
    },
}
# Compiled kernels read aligned rows 16 bytes at a time, and need four full blocks for a whole turn
# of a loop. In the interpreter, which is slow, rows are odd, and have one.
V_S, V_T = (4397, 4401) if os.environ.get("TRITON_INTERPRET") == "1" else (12_392, 12_400)


def rows_of_every_kind(finite: bool = False) -> tuple[Tensor, Tensor]:
    """(student [N, V_s], teacher [N, V_t]) fp32; `finite` leaves out -inf and broken rows."""
    g = torch.Generator().manual_seed(0)

    def noise(scale: float = 1.0) -> Tensor:
        return torch.randn(V_T, generator=g) * scale

    rank = torch.randperm(V_T, generator=g).float() + 1
    language = -1.3 * rank.log()
    one_hot = 25.0 * (rank == 1)
    near = noise(2.0)
    tied = noise(2.0).round()
    pairs = {
        "language": (language + noise(0.7), language + noise(0.3)),
        "flat": (noise(0.02), noise(0.02)),
        "far apart": (noise(6.0), noise(6.0)),
        "one-hot teacher": (noise(), one_hot),
        "one-hot student": (one_hot, noise()),
        "equal": (near, near),
        "near": (near + noise(1e-3), near),
        "tied": (noise(2.0), tied),
    }
    if not finite:
        every, third, fifth = (torch.arange(V_T) % n == 1 for n in (1, 3, 5))
        masked = language.masked_fill(third, -INF)
        pairs |= {
            "forbidden by the teacher": (language + noise(0.5), masked),
            "forbidden by the student": (noise(2.0).masked_fill(fifth, -INF), noise(2.0)),
            "forbidden by both": (noise().masked_fill(third, -INF), masked),
            "NaN": (noise().masked_fill(rank == 3, torch.nan), noise()),
            "nothing": (noise(), torch.full_like(rank, -INF).masked_fill(every, -INF)),
        }
    student, teacher = (torch.stack(side) for side in zip(*pairs.values(), strict=True))
    return student[:, :V_S].contiguous(), teacher


def labels_of(student: Tensor) -> Tensor:
    """[N] tokens, the first and the last among them, and where there is one a forbidden one."""
    tokens = torch.arange(len(student)) * 2141 % V_S
    tokens[0], tokens[1] = 0, V_S - 1
    return tokens
