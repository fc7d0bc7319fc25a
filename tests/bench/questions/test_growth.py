"""Cost does not grow with the rows, and the state is no more than a few floats a row."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from akl_triton.kernels.layout import STATE_WIDTH
from akl_triton.reference import authors_adaptive_kl
from bench.lab.memory import saved_bytes
from bench.questions import growth

compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not counted"
)


@pytest.mark.parametrize("shape", [(2, 64), (2, 4_096), (200, 64)])
def test_saved_state_is_a_few_floats_a_row(shape: tuple[int, int]) -> None:
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    ours = saved_bytes(growth.LOSSES["PyTorch backend"], student, teacher)
    assert ours == STATE_WIDTH * 4 * shape[0]
    assert saved_bytes(authors_adaptive_kl, student, teacher) > 20 * student.numel()


def test_flat_from() -> None:
    found = [
        {"vocabulary": v, "fixed": {"bytes": b}}
        for v, b in ((1, 10.0), (2, 12.0), (4, 10.2), (8, 9.8), (16, 10.0))
    ]
    assert growth.flat_from(found, "fixed", "bytes") == 4
    assert growth.flat_from(found[2:], "fixed", "bytes") == 4
    assert growth.flat_from(found[:2], "fixed", "bytes") == 2


@compiled
def test_cost_does_not_depend_on_the_rows(rows: tuple[Tensor, Tensor]) -> None:
    def cost_of(n: int) -> dict[str, float]:
        student, teacher = (x[1:2].expand(n, -1).contiguous() for x in rows)
        return growth.cost(student, teacher)

    assert cost_of(5) == pytest.approx(cost_of(1))
