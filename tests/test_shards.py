"""Rows whose vocabulary is sharded, with all ranks in this process, compared with the oracle.

The rows, options and divergences are those of tests/support/cases.py, and so is what is right:
every rank has to have the loss and statistics of whole rows, and its own columns of the gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton.divergences import (
    DKD,
    AdaptiveKL,
    DecoupledKL,
    Divergence,
    EntropySwitch,
    JensenShannon,
    LKHybrid,
    MixedKL,
)
from akl_triton.kernels.layout import STATISTICS
from akl_triton.losses import rule_of
from akl_triton.options import LOSS_OPTIONS, completed
from akl_triton.reference import reference_adaptive_kl
from akl_triton.verify import exact, faults, head_faults
from bench.inputs.lockstep import Ranks, run_ranks
from tests.support.cases import DIVERGENCES, OPTIONS, V_S, V_T, labels_of, rows_of_every_kind

INF = float("inf")
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
# Uneven, one of them empty; the last is wider on the side of the teacher.
WIDTHS = (V_S // 2 + 3, 0, V_S // 8, V_S - V_S // 2 - 3 - V_S // 8)
WIDTHS_T = (*WIDTHS[:3], WIDTHS[3] + V_T - V_S)
# Those whose kernels are not like another's: each takes seconds to compile and to translate.
COMPILED: tuple[Divergence, ...] = (
    *(AdaptiveKL(), MixedKL(alpha=0.3), EntropySwitch(tau=3.0), DKD(beta=2.0)),
    *(JensenShannon(), LKHybrid(), DecoupledKL()),
)


def cases() -> list[Any]:
    found = []
    for divergence in DIVERGENCES:
        for name in ("torch", "triton"):
            for options in OPTIONS:
                if name == "torch" and INTERPRETER:
                    continue
                most = options == "labels at another temperature" or (
                    options == "" and isinstance(divergence, (AdaptiveKL, DKD))
                )
                if name == "triton" and not (most and divergence in COMPILED):
                    continue
                title = f"{divergence}-{name}-{options}"
                found.append(pytest.param(divergence, name, options, id=title))
    return found


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch" or INTERPRETER or torch.cuda.is_available():
        yield request.param
        return
    pytest.importorskip("triton")
    from bench.lab import ptxcpu

    with ptxcpu.active(arch=90):
        yield request.param


def check(
    divergence: Divergence,
    backend: str,
    options: dict[str, Any],
    rows: tuple[Tensor, Tensor] | None = None,
    inplace: bool = False,
) -> Ranks:
    student, teacher = rows_of_every_kind() if rows is None else rows
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    needs_labels = divergence.needs_labels or "kd_ratio" in options
    labels = labels_of(student) if needs_labels else None
    upstream = torch.linspace(-1.0, 2.0, len(student))
    ranks = run_ranks(
        student.to(device),
        teacher.to(device),
        WIDTHS,
        rule_of(divergence, completed(LOSS_OPTIONS, options)),
        backend=backend,
        upstream=upstream.to(device),
        labels=None if labels is None else labels.to(device),
        widths_t=WIDTHS_T,
        inplace=inplace,
    )
    of_first = ranks.results[0]
    for result in ranks.results[1:]:  # to the bit
        assert torch.equal(result.loss.nan_to_num(-1.0), of_first.loss.nan_to_num(-1.0))
        assert torch.equal(result.stats.nan_to_num(-1.0), of_first.stats.nan_to_num(-1.0))
    stats = dict(zip(STATISTICS, of_first.stats.cpu().unbind(1), strict=True))
    maps = {name: value for name, value in options.items() if name != "kd_ratio"}
    found = []
    of_head: dict[str, Any] = {}
    if isinstance(divergence, AdaptiveKL):
        claims = {name: stats[name] for name in ("head_size", "head_mass", "forward_weight")}
        found += head_faults(student, teacher, **claims, **vars(divergence), **maps)
        of_head = {
            "size": stats["head_size"],
            "forward_weight": stats["forward_weight"],
            "gap": stats["gap"],
        }
    of = exact(divergence, student, teacher, labels=labels, **of_head, **options)
    gradient = torch.cat(ranks.gradients, dim=-1)
    found += faults(of_first.loss, gradient, of, upstream=upstream)
    sums = reference_adaptive_kl(student, teacher, weight=0.5, **maps)
    for name in ("forward_kl", "reverse_kl", "gap", "student_entropy", "teacher_entropy"):
        ours, theirs = stats[name].double(), getattr(sums, name)
        if not torch.allclose(ours, theirs, rtol=3e-6, atol=3e-6, equal_nan=True):
            found.append(f"{name}: {ours.tolist()} for {theirs.tolist()}")
    agreement = stats["top1_agreement"].double()
    if not torch.equal(agreement.nan_to_num(-1.0), sums.top1_agreement.nan_to_num(-1.0)):
        found.append(f"top1_agreement: {agreement.tolist()}")
    assert not found, "\n".join(found)
    return ranks


@pytest.mark.parametrize("divergence, backend, options", cases(), indirect=["backend"])
def test_every_row(divergence: Divergence, backend: str, options: str) -> None:
    check(divergence, backend, OPTIONS[options])


def rows_of_odd_shards() -> tuple[Tensor, Tensor]:
    """Rows of which some shards have nothing, and one that is far from 0."""
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 8, V_T, generator=g) * 2.0
    column = torch.arange(V_T)
    first, last = column < WIDTHS[0], column >= V_S - WIDTHS[3]
    lowest = torch.finfo(torch.float32).min
    for row, (of_student, of_teacher, value) in enumerate(
        (
            (first, first, -INF),
            (last, first, -INF),
            (~first, ~last & ~first, -INF),
            (column < 0, ~last, -INF),
            (first, first, lowest),
            (last, last, lowest),
        )
    ):
        student[row, of_student] = value
        teacher[row, of_teacher] = value
    far = 0.0 if INTERPRETER else 40_000.0  # which rounds scale * x before it subtracts
    student[6] += far
    teacher[6] += far
    teacher[7] = teacher[7].round()
    return student[:, :V_S].contiguous(), teacher


@pytest.mark.parametrize(
    "divergence, backend",
    [
        (divergence, name)
        for divergence in (AdaptiveKL(), MixedKL(alpha=0.3), JensenShannon())
        for name in (["torch"] if not INTERPRETER else []) + ["triton"]
    ],
    indirect=["backend"],
)
def test_shards_that_have_nothing(divergence: Divergence, backend: str) -> None:
    check(divergence, backend, {}, rows_of_odd_shards())
    check(divergence, backend, {}, rows_of_odd_shards(), inplace=True)


def rows_of_close_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows that leave a search no hold: keys that are dense near 0, or all next to others."""
    g = torch.Generator().manual_seed(0)
    uniform, noise = torch.rand(V_T, generator=g), torch.randn(V_T, generator=g)
    near_0 = torch.exp(-60.0 * uniform)
    teacher = torch.stack(
        (
            near_0,
            near_0 * noise.sign(),
            torch.exp(torch.linspace(-80.0, 3.0, V_T)),
            1e-6 * noise,
            8.0 + 1e-2 * noise,
            1e4 * torch.tanh(noise),
            torch.where(uniform < 0.01, 5.0, -1e4) + 1e-5 * noise,
        )
    )
    student = torch.randn(len(teacher), V_S, generator=g)
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.skipif(INTERPRETER, reason="the PyTorch backend")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mu", [0.01, 0.3, 0.999])
@pytest.mark.parametrize(
    "dtype, most", [(torch.bfloat16, 11), (torch.float16, 11), (torch.float32, 16)]
)
def test_the_most_exchanges(
    dtype: torch.dtype, most: int, mu: float, softcap: float | None
) -> None:
    """With that of `meet`: three guesses, then as many rounds as 17 parts a time take."""
    student, teacher = rows_of_close_logits(dtype)
    options = {"teacher_softcap": softcap, "temperature": 0.25}
    rule = rule_of(AdaptiveKL(mu=mu), completed(LOSS_OPTIONS, options))
    ranks = run_ranks(
        student, teacher, WIDTHS, rule, backend="torch", upstream=torch.ones(len(student)),
        widths_t=WIDTHS_T,
    )  # fmt: skip
    assert 1 + ranks.rounds <= most
