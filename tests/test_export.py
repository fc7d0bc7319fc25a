"""torch.export with every leading dimension dynamic, run at other sizes than those of the trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from akl_triton import AdaptiveKLLoss, LinearDistillationLoss

V, H = 11, 5
SIZES = ((3, 4), (5, 7), (1, 2), (2, 9), (4, 1))


class OfLogits(nn.Module):
    width = V

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = AdaptiveKLLoss(**options)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Any:
        return self.loss(student, teacher, labels)


class OfHidden(nn.Module):
    width = H

    def __init__(self, **options: Any) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.loss = LinearDistillationLoss(**options)
        self.weight = nn.Parameter(torch.randn(V, H, generator=g))
        self.teacher_weight = nn.Buffer(torch.randn(V, H, generator=g))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Any:
        return self.loss(student, self.weight, teacher, self.teacher_weight, labels)


def inputs(size: tuple[int, int], width: int, with_labels: bool) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(*size, width, generator=g) for _ in range(2))
    labels = torch.randint(0, 4, size, generator=g) if with_labels else None
    if labels is not None:
        labels[0, 0] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("form", [OfLogits, OfHidden])
def test_dynamic_batch_and_sequence(form, with_labels, reduction, strict):
    module = form(reduction=reduction, return_stats=True, shift=int(with_labels))
    sizes = {0: Dim("batch", max=64), 1: Dim("sequence", max=64)}
    program = export(
        module,
        inputs(SIZES[0], form.width, with_labels),
        dynamic_shapes=(sizes, sizes, sizes if with_labels else None),
        strict=strict,
    )
    for size in SIZES:
        arguments = inputs(size, form.width, with_labels)
        loss, stats = program.module()(*arguments)
        expected, expected_stats = module(*arguments)
        assert torch.equal(loss, expected)
        torch.testing.assert_close(stats, expected_stats, rtol=0, atol=0, equal_nan=True)
        of, like = (torch.autograd.grad(x.sum(), arguments[0])[0] for x in (loss, expected))
        assert torch.equal(of, like)
