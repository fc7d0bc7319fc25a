"""The question about the bytes of a GPU's memory, with programs in the place of `ncu`."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from bench.questions import Unanswerable, dram

STAND_INS = Path(__file__).resolve().parents[3] / "bench" / "stand_ins"


def test_bytes_per_position_stand_next_to_the_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program makes every call, in the order in which its bytes are read."""
    monkeypatch.setenv("PATH", f"{STAND_INS}:{os.environ['PATH']}")
    data = dram.collect(tmp_path, tiny=True)
    with (tmp_path / "dram.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data["results"]) == 8
    found = {(row["loss"], row["phase"]): row for row in rows if row["vocabulary"] == "1000"}
    assert set(found) == {
        *(("adaptive_kl", "inplace"), ("adaptive_kl", "both")),
        *(("forward_kl", "both"), ("reverse_kl", "both")),
    }
    first = found["adaptive_kl", "inplace"]
    assert (first["device"], first["rows"]) == ("cpu", "16")
    assert (float(first["read"]), float(first["written"])) == (4.0, 2.0)  # of 16,000 positions
    bounds = "counted_l2_serves_later_sweeps", "counted_l2_serves_none"
    assert float(first[bounds[0]]) == 6.0 and 14.0 < float(first[bounds[1]]) < 14.5
    assert [float(found["forward_kl", "both"][bound]) for bound in bounds] == [10.0, 10.0]
    assert "| adaptive_kl | inplace | cpu | 16 | 1,000 | 4.00 | 2.00 | 6.00 | 6.00 to 14." in (
        dram.markdown(data)
    )


def test_without_ncu_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unanswerable, match="ncu is not on PATH"):
        dram.collect(tmp_path, tiny=True)


def test_counters_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(
        "#!/bin/sh\n"
        "while [ $1 != --log-file ]; do shift; done\n"
        "echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission' >$2\n"
        "exit 1\n"
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Unanswerable, match="may not be read"):
        dram.collect(tmp_path / "results", tiny=True)
    assert not (tmp_path / "results" / "dram.csv").exists()
