"""Finite logits at the ends of their dtype's range give finite results, whatever T is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import akl_triton
from akl_triton.reference import reference_adaptive_kl
from tests.kernels.conftest import INTERPRETER
from tests.kernels.rows import run

# The interpreter takes a second for 8 rows, so that it gets fewer of the cases.
V = 200 if INTERPRETER else 4200  # the longer one has a full block
TEMPERATURE = (1.0, 1e-30) if INTERPRETER else (1e30, 1.0, 0.05, 1e-30)
# Powers of two and equal logits are exact without an FMA, which the interpreter does not have.
EXACT = ("equal, largest", "equal, lowest", "one, lowest", "end alone, lowest", "subnormal")


def extreme_rows(dtype: torch.dtype) -> tuple[list[str], Tensor, Tensor]:
    """Names, student [rows, V] and teacher [rows, V]."""
    g = torch.Generator().manual_seed(0)
    limits = torch.finfo(dtype)
    t = 2 * torch.randn(V, generator=g)
    s = t + torch.randn(V, generator=g)
    rank = torch.arange(V)
    start = rank < V // 4
    rows: dict[str, tuple[Tensor, Tensor]] = {
        "equal, largest": (torch.full((V,), limits.max), s),
        "equal, lowest": (t, torch.full((V,), limits.min)),
        "one, lowest": (t.where(rank == 7, limits.min), s.where(rank == 7, limits.min)),
        "end alone, lowest": (t.where(~start, limits.min), s.where(~start, limits.min)),
        "subnormal": (t * limits.tiny / 16, s * limits.tiny / 16),
        "signs, largest": (t.sign() * limits.max, s.sign() * limits.max),
        "spread": (t / 10 * min(limits.max, 1e30), s / 15 * min(limits.max, 1e30)),
    }
    for masked in (-1e4, -1e9, -1e30, limits.min):
        m = max(masked, limits.min)
        rows[f"both {masked:g}"] = (t.where(rank % 3 > 0, m), s.where(rank % 3 > 0, m))
        rows[f"teacher {masked:g}"] = (t.where(rank % 3 > 0, m), s)
        rows[f"student {masked:g}"] = (t, s.where(rank % 3 > 0, m))
        rows[f"nothing shared {masked:g}"] = (t.where(rank == 7, m), s.where(rank == V - 7, m))
    teacher, student = (torch.stack(side).to(dtype) for side in zip(*rows.values(), strict=True))
    assert student.isfinite().all() and teacher.isfinite().all()
    return list(rows), student, teacher


@pytest.mark.parametrize(
    ("dtype", "weight", "in_one_launch"),
    [
        (torch.float32, None, False),
        (torch.float32, 0.5, False),
        (torch.bfloat16, None, True),
        (torch.float16, None, False),
    ],
    ids=str,
)
def test_results_are_finite(
    dtype: torch.dtype, weight: float | None, in_one_launch: bool, device: torch.device
) -> None:
    """Loss and statistics of every row are finite, and so is the gradient unless fp16 has no such
    number."""
    names, student, teacher = extreme_rows(dtype)
    student, teacher = student.to(device), teacher.to(device)
    for temperature in TEMPERATURE:
        options: dict[str, Any] = {"weight": weight, "temperature": temperature}
        output = run(student, teacher, in_one_launch=in_one_launch, **options)
        known = output.stats if weight is None else output.stats[:, [0, 1, 2, 5, 6, 7, 8]]
        for i, name in enumerate(names):
            assert output.loss[i].isfinite(), f"loss of {name}, T {temperature}"
            assert known[i].isfinite().all(), f"statistics of {name}, T {temperature}"
            gradient = output.gradient[i]
            good = ~gradient.isnan() if dtype == torch.float16 else gradient.isfinite()
            assert good.all(), f"gradient of {name}, T {temperature}"


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_and_equal_rows_are_those_of_the_oracle(
    dtype: torch.dtype, weight: float, device: torch.device
) -> None:
    names, student, teacher = extreme_rows(dtype)
    rows = [names.index(name) for name in EXACT]
    student, teacher = student[rows], teacher[rows]
    for temperature in (1e30, 1.0):
        options: dict[str, Any] = {"weight": weight, "temperature": temperature}
        output = run(student.to(device), teacher.to(device), **options)
        exact = reference_adaptive_kl(student, teacher, **options)
        # Where a logarithm is as large as fp32 allows, the result is held.
        known = exact.loss.abs() < 1e30
        loss, gradient = output.loss.cpu().double(), output.gradient.cpu().double()
        torch.testing.assert_close(loss[known], exact.loss[known], rtol=3e-6, atol=3e-6)
        size = exact.grad.abs().amax(1)
        off = (gradient - exact.grad).abs().amax(1)
        allowed = 1e-5 / temperature + 1.01 * torch.finfo(dtype).eps * size
        allowed = allowed + torch.finfo(dtype).tiny
        assert (off <= allowed)[known].all(), (off, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_backends_agree(dtype: torch.dtype, device: torch.device) -> None:
    names, student, teacher = extreme_rows(dtype)
    if INTERPRETER:
        names = list(EXACT)
        student, teacher = student[: len(names)], teacher[: len(names)]
    for temperature in TEMPERATURE:
        options: dict[str, Any] = {"temperature": temperature}
        kernels = run(student.to(device), teacher.to(device), **options)
        leaf = student.clone().requires_grad_()
        loss, stats = akl_triton.adaptive_kl(
            leaf, teacher, reduction="none", return_stats=True, backend="torch", **options
        )
        loss.sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        assert kernels.gradient.isfinite().all()
        of_weight = (3e-7 / stats.gap.double()).clamp(max=1.0)  # w is a quotient by the gap
        sums = stats.forward_kl.double().abs() + stats.reverse_kl.double().abs()
        off = (kernels.loss.cpu().double() - loss.detach().double()).abs()
        excess = off / (1e-6 + (2e-6 + of_weight) * sums)
        assert excess.max() < 1, f"{names[int(excess.argmax())]}, T {temperature}: {off}"


@pytest.mark.parametrize("softcap", [1e-30, 1e30] if INTERPRETER else [30.0])
def test_softcaps_of_huge_logits(softcap: float, device: torch.device) -> None:
    _, student, teacher = extreme_rows(torch.bfloat16)
    maps: dict[str, Any] = {"student_softcap": softcap, "teacher_softcap": softcap}
    for temperature in TEMPERATURE:
        output = run(student.to(device), teacher.to(device), temperature=temperature, **maps)
        assert all(x.isfinite().all() for x in output), f"T {temperature}"
