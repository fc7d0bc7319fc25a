"""The memory of the loss and its gradients, from the hidden states of two models on.

    logits     N (2 V_s b_s + V_t b_t) + dW + dH
    in place   N (V_s b_s + V_t b_t) + dW + dH
    fused      dH + the larger of  C (V_s b_s + V_t b_t) + 4 V_s H_s  and  4 V_s H_s + dW + dH

with N tokens, logits of b bytes, chunks of C tokens, and the gradients that are kept:
dH = N H_s b_s of the hidden states, and dW = V_s H_s b_s of the student's lm_head. Where that is
frozen, dW is 0, as is the sum of 4 V_s H_s bytes that it is rounded from. The activations and
gradients of the rest of the student come on top, and are the same each way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from akl_triton import adaptive_kl, linear_adaptive_kl
from akl_triton.cli.bench import peak_memory
from akl_triton.cli.pair import Side
from akl_triton.integrations import HeadInfo
from akl_triton.linear_ops import chunk_rows, default_chunk_bytes

WAYS = ("logits", "in place", "fused")


@dataclass(frozen=True)
class LossMemory:
    """Peak bytes by way, with the gradients and without the inputs."""

    tokens: int
    trains_head: bool
    formula: dict[str, int]
    measured: dict[str, int] | None


def predict(
    student: HeadInfo, teacher: HeadInfo, tokens: int, trains_head: bool, device: torch.device
) -> dict[str, int]:
    """The peak by the formulas above."""
    size = student.dtype.itemsize
    of_student, of_teacher = (head.vocab_size * head.dtype.itemsize for head in (student, teacher))
    entries = student.vocab_size * student.hidden_size if trains_head else 0
    d_weight, summed = entries * size, entries * torch.float32.itemsize
    d_hidden = tokens * student.hidden_size * size
    row = of_student + of_teacher
    chunk = min(chunk_rows(default_chunk_bytes(device), row), tokens)
    return {
        "logits": tokens * (row + of_student) + d_weight + d_hidden,
        "in place": tokens * row + d_weight + d_hidden,
        "fused": d_hidden + summed + max(chunk * row, d_weight + d_hidden),
    }


def measure(student: Side, teacher: Side, tokens: int, device: torch.device) -> dict[str, int]:
    """The peak of each way on this machine, with random hidden states and the models' own heads."""
    generator = torch.Generator().manual_seed(0)

    def parts(side: Side) -> tuple[Tensor, Tensor, Tensor | None]:
        head = side.model.get_output_embeddings()
        hidden = torch.randn(tokens, head.weight.shape[1], generator=generator)
        return hidden.to(device, head.weight.dtype), head.weight, head.bias

    (hidden, weight, bias), of_teacher = parts(student), parts(teacher)
    hidden.requires_grad_()
    teacher_parts = [None if x is None else x.detach() for x in of_teacher]
    trained = [x for x in (hidden, weight, bias) if x is not None]
    peaks = {}
    for way in WAYS:
        step = _step(way, (hidden, weight, bias), teacher_parts, student, teacher)
        for x in trained:
            x.grad = None
        peaks[way] = peak_memory(step, device)
        for x in trained:
            x.grad = None
    return peaks


def _step(
    way: str, of_student: Any, of_teacher: Any, student: Side, teacher: Side
) -> Callable[[], None]:
    ours, theirs = student.head, teacher.head
    assert ours is not None and theirs is not None
    maps: dict[str, Any] = {
        "student_softcap": ours.softcap,
        "teacher_softcap": theirs.softcap,
        "student_logit_scale": ours.scale,
        "teacher_logit_scale": theirs.scale,
    }

    def fused() -> None:
        (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias) = (
            of_student,
            of_teacher,
        )
        linear_adaptive_kl(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            student_bias=bias,
            teacher_bias=teacher_bias,
            **maps,
        ).backward()

    def through_logits() -> None:
        logits = F.linear(*of_student)
        teacher_logits = F.linear(*of_teacher)
        loss = adaptive_kl(logits, teacher_logits, inplace=way == "in place", **maps)
        loss.backward()

    return fused if way == "fused" else through_logits
