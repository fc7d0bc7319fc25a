"""Real logits are kept, and resampled to other vocabularies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.inputs import real_logits


def test_resampling_to_the_same_vocabulary_changes_nothing() -> None:
    student, teacher = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    new_s, new_t = real_logits.resampled(student, teacher, 500, 500)
    torch.testing.assert_close(new_s, student)
    assert torch.equal(new_t, teacher)


def test_resampling_keeps_the_top_and_the_range() -> None:
    student, teacher = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    new_s, new_t = real_logits.resampled(student, teacher, 1_900, 2_000)
    assert new_s.shape == (3, 1_900)
    assert new_t.shape == (3, 2_000)
    for extreme in (torch.amax, torch.amin):
        assert torch.equal(extreme(new_t, -1), extreme(teacher, -1))
    # Ids keep their order: the top token is as far along the row as it was.
    before, after = teacher.argmax(-1) / 500, new_t.argmax(-1) / 2_000
    torch.testing.assert_close(before, after, atol=0.1, rtol=0.0)


def test_logits_are_computed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def compute(rows: int, texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        calls.append((rows, texts))
        return torch.full((rows, 4), 1.0), torch.full((rows, 4), 2.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(real_logits, "version", lambda name: "1.0")
    monkeypatch.setattr(real_logits, "_compute", compute)
    for _ in range(2):
        student, teacher = real_logits.real_logits(5, ("objects",))
        assert torch.equal(student, torch.full((5, 4), 1.0))
        assert torch.equal(teacher, torch.full((5, 4), 2.0))
    assert len(calls) == 1
    real_logits.real_logits(6, ("objects",))
    real_logits.real_logits(5, ("types",))
    monkeypatch.setattr(real_logits, "version", lambda name: "1.1")
    real_logits.real_logits(5, ("objects",))
    assert len(calls) == 4
