"""The bytes of a store are those of its files, and the documentation has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("datasets")

from akl_triton import teacher_pairs
from bench.questions import offline
from bench.store import load

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "offline.md"


def test_fewer_of_the_pairs_are_those_of_the_logits() -> None:
    logits = 3.0 * torch.randn(2, 5, 80, generator=torch.Generator().manual_seed(0))
    found, exact = offline.first(teacher_pairs(logits, 24), 6), teacher_pairs(logits, 6)
    assert torch.equal(found.ids, exact.ids)
    torch.testing.assert_close(found.entries(), exact.entries())


def test_columns_are_nearly_all_of_a_store() -> None:
    ids = torch.randint(80, (8, 64), generator=torch.Generator().manual_seed(0))
    batches = [
        teacher_pairs(3.0 * torch.randn(len(x), 64, 80), 24) for x in ids.split(offline.BATCH)
    ]
    case = offline._stored(ids, batches, 6)
    assert case["k"] == 6
    assert 0.5 * case["bytes"] < sum(case["columns"].values()) < case["bytes"]
    assert case["columns"]["teacher_log_probs"] <= 2.1 * 6
    assert all(x > 0.0 for x in case["microseconds"].values())


def test_the_documentation_has_the_stored_sizes() -> None:
    data = load("offline")["data"]
    text = DOCUMENT.read_text("utf-8")
    assert f"{data['tokens']:,} tokens" in text and f"{data['vocabulary']:,} tokens" in text
    for store in data["stores"]:
        assert f"| {store['k']} | {store['bytes']:.0f} |" in text
    assert f"| {store['k']} | {store['bytes']:.0f} |" in offline.markdown(data)
