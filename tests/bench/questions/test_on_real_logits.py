"""The costs and the heads of the PyTorch backend and of the authors' code, on a few rows."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import adaptive_kl
from bench.questions import on_real_logits

needs_kernels = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or shutil.which("g++") is None,
    reason="the kernels are compiled, and executed by ptxcpu",
)


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Random logits in place of those of a language model."""
    student, teacher = 2 * torch.randn(2, 6, 4_000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        on_real_logits, "real_logits", lambda rows: (student[:rows], teacher[:rows])
    )
    return student, teacher


@needs_kernels
def test_all_heads_are_right(logits: tuple[Tensor, Tensor]) -> None:
    data = json.loads(json.dumps(on_real_logits.collect(rows=5, rounds=1)))
    assert (data["rows"], data["vocabulary"]) == (5, 4_000)
    assert [case["dtype"] for case in data["cases"]] == ["float32", "bfloat16"]
    for case in data["cases"]:
        for cost in case["costs"].values():
            assert cost["milliseconds"] > 0
        assert case["costs"]["authors"]["temporaries_mib"] > 5 * 4_000 * 4 * 3 / 2**20
        for of_rows in case["heads"].values():
            assert of_rows["rows"] == 5 and of_rows["wrong"] == 0
            assert of_rows["authors"] + of_rows["in_band"] >= 5
    assert on_real_logits.failures(data) == []
    table = on_real_logits.markdown(data)
    assert "| float32 | compiled kernels | 5 |" in table
    assert "| bfloat16 | authors |" in table


@needs_kernels
def test_a_wrong_head_is_found(
    logits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = adaptive_kl

    def off_by_one(*arguments: Any, **options: Any) -> Any:
        loss, stats = right(*arguments, **options)
        wrong = torch.tensor([1.0, 0, 0, 0, 0, 0]) if options["backend"] == "torch" else 0.0
        return loss, stats._replace(head_size=stats.head_size + wrong)

    monkeypatch.setattr(on_real_logits, "adaptive_kl", off_by_one)
    heads = on_real_logits.heads(*logits)
    assert heads["PyTorch backend"]["wrong"] == 1
    assert heads["compiled kernels"]["wrong"] == 0
    failures = on_real_logits.failures({"cases": [{"dtype": "float32", "heads": heads}]})
    assert failures == ["1 heads of the PyTorch backend in float32"]
