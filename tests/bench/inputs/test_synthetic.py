"""Random logits: half of the rows need a search for their head."""

from __future__ import annotations

import pytest
import torch

from bench.inputs import synthetic

CPU = torch.device("cpu")


def test_half_of_the_heads_must_be_searched_for() -> None:
    """The top token of a teacher's row is above mu = 1/2 in half of the rows."""
    student, teacher = synthetic.make_pair(2000, 4000, CPU, torch.bfloat16, seed=0)
    top = teacher.float().softmax(-1).amax(-1)
    assert 0.46 < (top > 0.5).float().mean() < 0.54  # 3.6 standard deviations either way
    assert 0.9 < (student.detach().float() - teacher.float()).std() < 1.1
    assert student.requires_grad and not teacher.requires_grad
    other = synthetic.make_pair(2, 4000, CPU, torch.bfloat16, seed=1)[1]
    assert not torch.equal(other, teacher[:2])


def test_logits_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK", 100)
    student, teacher = synthetic.make_pair(7, 40, CPU, torch.float32, seed=0)
    assert len(teacher.unique(dim=0)) == len(student.unique(dim=0)) == 7
