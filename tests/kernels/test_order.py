"""Stages sweep a row in the order of `python -m bench l2`: each starts where the one before it
ended."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from akl_triton import adaptive_kl
from tests.kernels.conftest import INTERPRETER

BLOCK, BLOCKS = 2048, 9

pytestmark = pytest.mark.skipif(not INTERPRETER, reason="only there is the order of loads seen")


@pytest.mark.parametrize("cut", [5, 4 * BLOCK, BLOCKS * BLOCK - 5])
def test_order_of_full_blocks(monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """The order in which statistics, the search for the cut, divergence and gradient read the
    blocks."""
    teacher = torch.zeros(1, BLOCK * BLOCKS, dtype=torch.bfloat16)
    teacher[0, [cut, -1]] = 12.0  # only the first of the two is in the head
    student = torch.zeros_like(teacher)
    blocks: list[int] = []
    load = interpreter_builder.create_masked_load

    def seen(pointers, *arguments):
        offset = int(pointers.data.min()) - teacher.data_ptr()
        by_the_word = pointers.data.size == BLOCK // 2  # only in full blocks
        if by_the_word and 0 <= offset < 2 * teacher.numel():
            blocks.append(offset // (2 * BLOCK))
        return load(pointers, *arguments)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", seen)
    adaptive_kl(student.requires_grad_().clone(), teacher, inplace=True, backend="triton")
    full = list(range(1, BLOCKS))
    assert blocks[: len(full)] == full
    assert blocks[-2 * len(full) :] == [*reversed(full), *full]
