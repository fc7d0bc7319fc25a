"""The question about torch.compile, asked of small sizes and without compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.questions import compiled


def test_every_loss_is_timed_beside_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda loss, **options: loss)
    data = compiled.collect(rows=4, vocabulary=100, rounds=1)
    assert len(data["cases"]) == 2 * len(compiled.LOSSES)
    shown = compiled.markdown(data)
    for case in data["cases"]:
        assert case["ours"] > 0 and case["compiled"] > 0
        assert f"| {case['dtype']} | {case['loss']} |" in shown


@pytest.mark.parametrize("name", compiled.LOSSES)
def test_what_is_compiled_is_the_same_loss(name: str) -> None:
    values: list[Any] = []
    student, teacher = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0))
    for loss in compiled.LOSSES[name]:
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher)
        values.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)
