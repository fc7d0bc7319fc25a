"""The stored demo has the figures that `akl-triton demo` writes and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from akl_triton import cli
from akl_triton.cli import demo as cli_demo
from bench.questions import Unanswerable, demo

PRINTED = """30 layers teach 12: 2 steps of 256 tokens, 1024 held out, float32 on cpu
Peak memory of the AKL loss and its gradient: 45 MiB from hidden states, 1,130
MiB through all logits
"""
POINTS = [
    cli_demo.Point(step, name, 4.0 - step, 5.0 + step, 0.25)
    for step in (0, 2)
    for name in ("AKL", "FKL", "RKL")
]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The files and the output of a run, without running it."""
    calls: list[Sequence[str]] = []

    def main(arguments: Sequence[str]) -> int:
        calls.append(arguments)
        folder = arguments[arguments.index("--output") + 1]
        cli_demo.write_csv(POINTS, Path(folder) / "akl_demo.csv")
        print(PRINTED)
        return 0

    monkeypatch.setattr(cli, "main", main)
    return calls


def test_what_is_stored(printed: list[Sequence[str]], tmp_path: Path) -> None:
    data = demo.collect(steps=2)
    assert printed[0][:5] == ["demo", "--device", "cpu", "--steps", "2"]
    assert data["peak_mib"] == {"hidden states": 45, "all logits": 1130}
    assert (data["teacher_layers"], data["student_layers"], data["steps"]) == (30, 12, 2)
    assert (data["tokens"], data["dtype"], data["device"]) == (256, "float32", "cpu")
    assert data["points"] == [point._asdict() for point in POINTS]
    start, last = demo.first_and_last(data, "reverse_kl")
    assert (start, last) == (5.0, {"AKL": 7.0, "FKL": 7.0, "RKL": 7.0})
    assert "| KL(teacher ‖ student), nats | 4.00 | 2.00 | 2.00 | 2.00 |" in demo.markdown(data)
    demo.plot(data, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 0


def test_a_run_that_prints_something_else_is_refused(
    printed: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PRINTED", "30 layers teach 12")
    with pytest.raises(ValueError, match="does not print what it did: 30 layers teach 12"):
        demo.collect()


def test_a_demo_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "main", lambda arguments: 2)
    with pytest.raises(Unanswerable, match="does not run here"):
        demo.collect()
