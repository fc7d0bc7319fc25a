"""`python -m bench sharded_heads` finds nothing wrong with small rows, and what is made wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.inputs.lockstep import run_ranks
from bench.questions import sharded_heads
from bench.questions.sharded_heads import failures, markdown, of_case


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 3001, generator=g) * 3.0
    case = of_case(student, teacher, "torch", "float32", 2.0, 3)
    return {"rows": 8, "vocabulary": 3001, "cases": [case]}


def test_small_rows_are_right(data: dict[str, Any]) -> None:
    assert failures(data) == []
    assert data["cases"][0]["exchanges"] > sharded_heads.MEETING
    assert "3,001" in markdown(data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"faults": ["a head"]},
        {"exchanges": 17},
        {"loss_error": 2e-6},
        {"gradient_error": 2e-6},
        {"dtype": "bfloat16", "exchanges": 5, "bytes": 301.0},
        {"dtype": "bfloat16", "exchanges": 6, "bytes": 100.0},
    ],
)
def test_what_is_wrong_is_found(data: dict[str, Any], wrong: dict[str, Any]) -> None:
    assert len(failures({**data, "cases": [data["cases"][0] | wrong]})) == 1


def test_a_gradient_that_is_wrong_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*inputs: Any, **options: Any) -> Any:
        ranks = run_ranks(*inputs, **options)
        ranks.gradients[-1].mul_(2.0)
        return ranks

    monkeypatch.setattr(sharded_heads, "run_ranks", doubled)
    student, teacher = torch.randn(2, 4, 301, generator=torch.Generator().manual_seed(1)) * 3.0
    case = of_case(student, teacher, "torch", "float32", 1.0, 2)
    assert any("gradient" in fault for fault in case["faults"])
