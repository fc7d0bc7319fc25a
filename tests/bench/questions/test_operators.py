"""The bytes that each way to compute a loss moves, operator by operator."""

from __future__ import annotations

import json
import os

import pytest
import torch

from akl_triton import adaptive_kl
from bench.lab.operators import OperatorMeter
from bench.questions import operators

compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not counted"
)


def test_what_a_mode_cannot_see_is_refused() -> None:
    with (
        OperatorMeter(elsewhere=operators.is_of_our_kernels),
        pytest.raises(ValueError, match=r"measure akl_triton\.eager"),
    ):
        adaptive_kl(torch.zeros(1, 8), torch.zeros(1, 8), backend="torch")


@compiled
def test_operators_compared_with_each_other() -> None:
    """Ours moves and holds a small part of the bytes of the authors' code."""
    student, teacher = torch.randn(2, 4, 4_096, generator=torch.Generator().manual_seed(0))
    found = [
        operators.measure(subject, student.bfloat16(), teacher.bfloat16())
        for subject in operators.subjects()
        if subject.computes == "adaptive_kl"
    ]
    ours, torch_backend, authors = found
    assert 6 < ours["bytes_in_kernels"] <= ours["bytes"] < 40
    assert ours["temporaries"] < 0.1
    assert authors["bytes_in_kernels"] == torch_backend["bytes_in_kernels"] == 0
    assert authors["bytes"] > 400
    assert authors["temporaries"] > 20
    data = {"arch": "sm_90", "rows": 4, "vocabulary": 4_096, "subjects": found}
    table = operators.markdown(json.loads(json.dumps(data)))
    assert f"| AKL | authors, eager | {authors['bytes']:.1f} |" in table
    assert "| sort | 1 | 4.0 | 12.0 |" in table
