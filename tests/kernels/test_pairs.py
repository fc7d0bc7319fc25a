"""Kernels of a teacher that is pairs, compared with the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import AdaptiveKL, Divergence, ForwardKL, SparseTeacher, distillation_loss
from akl_triton.verify import exact_of_pairs, faults
from tests.support.cases import V_S, labels_of
from tests.support.pairs import SPARSE_DIVERGENCES, head_faults, pairs_of_every_kind

INF = float("inf")
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "labels": {"kd_ratio": 0.7},
    "temperature, labels, softcap": {
        "temperature": 2.0,
        "kd_ratio": 0.25,
        "student_softcap": 6.0,
        "student_logit_scale": 0.5,
    },
}


def gradient_of(
    student: Tensor, teacher: SparseTeacher, upstream: Tensor, inplace: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    leaf = student.clone().requires_grad_()
    logits = leaf * 1 if inplace else leaf
    loss, stats = distillation_loss(
        logits,
        teacher,
        reduction="none",
        return_stats=True,
        backend="triton",
        inplace=inplace,
        **options,
    )
    (loss * upstream).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, stats


def to(device: torch.device, teacher: SparseTeacher) -> SparseTeacher:
    tail = None if teacher.log_tail is None else teacher.log_tail.to(device)
    return SparseTeacher(
        teacher.ids.to(device),
        teacher.log_probs.to(device),
        tail,
        outside=teacher.outside,
        temperature=teacher.temperature,
    )


def check(
    divergence: Divergence,
    student: Tensor,
    teacher: SparseTeacher,
    device: torch.device,
    inplace: bool = False,
    **options: Any,
) -> None:
    upstream = torch.rand(len(student), generator=torch.Generator().manual_seed(2)) + 0.5
    labels = labels_of(student) if "kd_ratio" in options else None
    loss, gradient, stats = gradient_of(
        student.to(device),
        to(device, teacher),
        upstream.to(device),
        inplace,
        divergence=divergence,
        labels=None if labels is None else labels.to(device),
        **options,
    )
    stats = type(stats)(*(column.cpu() for column in stats))
    maps = {name: options[name] for name in options if name.startswith("student_")}
    of_head = {}
    if isinstance(divergence, AdaptiveKL):
        assert head_faults(divergence, student, teacher, stats, **maps) == []
        of_head = {name: getattr(stats, name) for name in ("head_size", "forward_weight", "gap")}
    of = exact_of_pairs(
        divergence,
        student,
        teacher,
        labels=labels,
        kd_ratio=options.get("kd_ratio", 1.0),
        **of_head,
        **maps,
    )
    assert faults(loss.cpu(), gradient.cpu(), of, upstream=upstream) == []


@pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES, ids=str)
def test_every_member(divergence: Divergence, device: torch.device) -> None:
    student, teacher = pairs_of_every_kind()
    check(divergence, student, teacher, device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_options_and_dtypes(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    student, teacher = pairs_of_every_kind(temperature=options.get("temperature", 1.0))
    for inplace in (False, True):
        check(AdaptiveKL(), student.to(dtype), teacher, device, inplace, **options)


@pytest.mark.parametrize("outside", ["zero", "renormalise"])
def test_outside(outside: Any, device: torch.device) -> None:
    student, teacher = pairs_of_every_kind()
    check(
        ForwardKL(),
        student,
        SparseTeacher(teacher.ids.where(teacher.ids < V_S, -1), teacher.log_probs, outside=outside),
        device,
    )


@pytest.mark.parametrize("k", [1, 255, 1024])
def test_numbers_of_pairs(k: int, device: torch.device) -> None:
    """One; as many as fill a block with the rest, which does not begin where they do; the most."""
    student, teacher = pairs_of_every_kind(k)
    check(AdaptiveKL(mu=0.9), student, teacher, device)
