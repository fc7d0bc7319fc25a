"""The question about the losses of hidden states, with the lm_heads of a tiny model."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

import pytest

from akl_triton import eager, linear_ops, rows
from bench.inputs.linear_peers import linear_peers
from bench.questions import linear as question


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def test_memory_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, hidden, chunk = 4_096, 64, 64
    monkeypatch.setattr(question, "SMOLLM2_VOCABULARY", vocabulary)
    monkeypatch.setattr(question, "SMOLLM2_HIDDEN", hidden)
    monkeypatch.setitem(linear_ops.CHUNK_BYTES, "cpu", 2 * chunk * vocabulary * 4)
    monkeypatch.setattr(eager, "TEMPORARY_BYTES", 2**19)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2**16)
    data = json.loads(json.dumps(question.collect(tokens=512, time_tokens=64, rounds=1)))
    assert data["chunk_tokens"] == chunk
    predicted = sum(data["predicted_bytes"].values())
    assert predicted == 2 * chunk * vocabulary * 4 + 4 * vocabulary * hidden + 4 * 512 * hidden
    peaks = {row["name"]: row.get("peak_bytes") for row in data["methods"]}
    assert predicted <= peaks["linear_adaptive_kl"] <= 1.2 * predicted
    assert peaks["adaptive_kl of all logits, in place"] >= 2 * 512 * vocabulary * 4
    assert peaks["authors' code on all logits, from 256 tokens"] > 8 * 512 * vocabulary * 4
    assert data["time_ratio"] > 0
    text = question.markdown(data)
    assert f"C = {chunk}: " in text
    for peer in linear_peers(chunk):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {peer.name} |"))
        assert ("not measured" in line) == (peer.obstacle() is not None)
    if not is_installed("trl"):
        assert "trl 1.16.0 is measured, none is installed" in text
