"""The heads of dyadic rows, whose masses are powers of two: these are exact in fp32, and so is the
head."""

from __future__ import annotations

import pytest
import torch

from akl_triton.reference import Head, Ties
from tests.kernels.rows import run


@pytest.mark.parametrize("ties", ["stable", "average"])
@pytest.mark.parametrize("head", ["exclusive", "inclusive"])
def test_head_at_exactly_mu(head: Head, ties: Ties, device: torch.device) -> None:
    """A prefix whose mass is mu is the head by either rule. At T = log2(e) the exponentials of
    integer logits are powers of 2."""
    teacher = torch.zeros(2, 64)  # 64 of mass 1/64
    teacher[1, [3, 20]] = 4.0  # two of mass 1/4, 32 of mass 1/64
    teacher[1, 34:] = -torch.inf
    student = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    sorted_mass = (teacher.exp2() / 64).sort(descending=True).values
    prefix = sorted_mass.cumsum(-1)
    for mu in (1 / 64, 1 / 4, 1 / 2, 3 / 4, 63 / 64):
        if head == "exclusive":
            size = (prefix <= mu).sum(-1).clamp(min=1)
        else:
            size = (prefix < mu).sum(-1) + 1
        output = run(
            student.to(device), teacher.to(device),
            mu=mu, temperature=1.4426950408889634, head=head, ties=ties,
        )  # fmt: skip
        assert output.stats[:, 4].tolist() == size.tolist(), mu
        assert output.stats[:, 3].tolist() == prefix.gather(-1, size[:, None] - 1)[:, 0].tolist()
