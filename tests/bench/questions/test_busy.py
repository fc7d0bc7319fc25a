"""The question about cliffs of the PyTorch backend, asked of small sizes."""

from __future__ import annotations

import torch

from bench.questions import busy


def test_no_cliff_at_a_busy_neighbour_or_a_slice() -> None:
    """Splitting every operator over threads takes tens of times as long when another process is
    busy, and taking one sequence at a time nine times; the bound is far from both, as this test may
    itself run on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data = busy.collect(rows=24, vocabulary=20_000, sequences=300, rounds=5)
    finally:
        torch.set_num_threads(threads)
    assert len(data["compared"]) == 2 + len(busy.SLICES)
    for one in data["compared"]:
        assert 0 < one["seconds"] < 4 * one["with"], one
    shown = busy.markdown(data)
    assert all(one["what"] in shown for one in data["compared"])
