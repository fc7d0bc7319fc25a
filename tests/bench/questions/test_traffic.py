"""The bytes that the compiled kernels read and write, on rows for which they can be counted by
hand."""

from __future__ import annotations

import json
import os

import pytest
from torch import Tensor

from bench.questions import traffic

compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not counted"
)


@compiled
def test_scans_of_a_row(rows: tuple[Tensor, Tensor]) -> None:
    found = traffic.scans(*rows, temperature=1.0)
    sure, unsure, tied = found["boundary"]
    assert sure == 0.0
    assert unsure >= 1.0
    assert tied >= 1.0
    sure_cut, _, tied_cut = found["cut"]
    assert sure_cut == 0.0
    assert tied_cut >= 0.5  # half of the ties are in the head: it is read so far
    summary = traffic.summarise(found)
    assert summary["rows_without"] == pytest.approx(1 / 3)
    assert summary["max"] == max(b + c for b, c in zip(*found.values(), strict=True))


@compiled
def test_traffic_of_rows(rows: tuple[Tensor, Tensor]) -> None:
    """The compulsory bytes are those of both logits, and those of the gradient once."""
    cases = [traffic.case(*rows, temperature=1.0, synthetic=kind) for kind in (False, True)]
    case = cases[0]
    for phase, written in (("forward", 0.0), ("backward", 2.0), ("with_gradient", 2.0)):
        of_row = 100 / rows[0].shape[1]  # bytes of a row's loss and state
        assert case[phase]["compulsory_read"] == pytest.approx(4.0, abs=of_row)
        assert case[phase]["compulsory_written"] == pytest.approx(written, abs=of_row)
        assert case[phase]["bytes_written"] == pytest.approx(written, abs=of_row)
        assert case[phase]["bytes_read"] >= 4.0
    forward, backward, both = case["forward"], case["backward"], case["both"]
    assert both["bytes_read"] == pytest.approx(forward["bytes_read"] + backward["bytes_read"])
    assert forward["launches"] == backward["launches"] == 1 / 3
    # Statistics and divergence each read both rows; the boundary reads the teacher's as often as
    # the scans say.
    assert forward["bytes_read"] == pytest.approx(2 * 4 + 2 * case["scans"]["mean"], rel=0.1)
    data = {"arch": "sm_90", "texts": ["objects"], "cases": cases}
    table = traffic.markdown(json.loads(json.dumps(data)))
    assert table.count(f"| {rows[0].shape[1]:,} | bfloat16 | 1 |") == 2
