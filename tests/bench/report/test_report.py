"""What the documents say of cost is what bench/results holds, and each figure has its command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import store
from bench.__main__ import main
from bench.lab.compile import TARGETS
from bench.questions.floor import Work, floor, work
from bench.questions.instructions import kernel_costs
from bench.report import document as report
from bench.report import goals
from bench.report.tables import table

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md", "bench/RESULTS.md")
# A number with a unit of cost or of quality.
FIGURE = re.compile(
    r"\d\s*(?:bytes|[KMGT]i?B|ms|ns|s|seconds|minutes|instructions|registers|scans|sectors"
    r"|times|nats|%)(?![\w/])"
)
COMMAND = re.compile(r"`[^`\n]*\b(?:python3? -m|pytest|akl-triton|make|bench/gpu\.sh)\b[^`\n]*`")


def test_results_are_what_is_stored() -> None:
    assert report.DOCUMENT.read_text("utf-8") == report.render()


def test_the_readme_has_the_stored_table() -> None:
    found = report.SUMMARY.findall(report.README.read_text("utf-8"))
    assert [text.strip() for text in found] == [report.summary()]


def test_a_changed_figure_is_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in report.SECTIONS:
        stored = store.load(name)
        if name == "growth":
            stored["data"]["over_rows"][0]["bytes"] += 0.01
        store.store(name, stored["data"], tmp_path)
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    load = store.load
    monkeypatch.setattr(report, "load", lambda name: load(name, tmp_path))
    changed, written = (
        text.splitlines() for text in (report.render(), report.DOCUMENT.read_text())
    )
    of_rows = [line for line in changed if line not in written and not line.startswith("| [")]
    assert len(of_rows) == 1


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
@pytest.mark.parametrize("target", TARGETS)
def test_stored_instructions_are_those_of_the_kernels(target: str) -> None:
    stored = store.load("instructions")
    if stored["versions"]["triton"] != importlib.metadata.version("triton"):
        pytest.skip("another Triton compiled the kernels")
    (case,) = (
        case
        for case in stored["data"]["ours"]
        if (case["loss"], case["target"], case["dtype"]) == ("adaptive_kl", target, "bf16")
        and 151_936 in case["vocabularies"]
    )
    for name, cost in kernel_costs("adaptive_kl", target, 151_936).items():
        found = json.loads(json.dumps({**asdict(cost), "per_position": cost.per_position}))
        assert found == case["kernels"][name], "the kernels have changed: python -m bench report"


def test_the_command_writes_both_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, document = tmp_path / "README.md", tmp_path / "RESULTS.md"
    written = report.README.read_text("utf-8")
    readme.write_text(report.SUMMARY.sub("\nout of date\n", written), "utf-8")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "DOCUMENT", document)
    assert main(["report"]) == 0
    assert str(document) in capsys.readouterr().out
    assert readme.read_text("utf-8") == written
    assert document.read_text("utf-8") == report.render()


def test_the_command_shows_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["traffic", "--stored"]) == 0
    assert capsys.readouterr().out.strip() in report.DOCUMENT.read_text("utf-8")


def sections(text: str) -> Iterator[str]:
    """The text under each heading of the second level."""
    yield from re.split(r"^## ", text, flags=re.MULTILINE)


def without_command(text: str) -> list[str]:
    return [s for s in sections(text) if FIGURE.search(s) and not COMMAND.search(s)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_comes_with_a_command(document: str) -> None:
    for bare in without_command((ROOT / document).read_text("utf-8")):
        figures = [bare[max(0, m.start() - 40) : m.end()] for m in FIGURE.finditer(bare)]
        pytest.fail(f"{document}, {bare.splitlines()[0]!r}: no command for {figures}")


@pytest.mark.parametrize("figure", ["3.1 times faster", "14.4 bytes", "38 instructions", "5 %"])
def test_a_figure_without_a_command_is_found(figure: str) -> None:
    assert without_command(f"# Title\n\n## Speed\n\nIt takes {figure}.\n")
    assert not without_command(f"## Speed\n\nIt takes {figure}, says `python -m bench traffic`.\n")
    assert without_command(f"## Speed\n\n{figure}\n\n## Other\n\n`python -m bench traffic`\n")


def test_every_goal_has_a_line_and_a_command() -> None:
    lines = goals.markdown(
        {name: store.load(name)["data"] for name in report.SECTIONS}
    ).splitlines()
    assert len(lines) == 2 + len(goals.goals())
    for goal, line in zip(goals.goals(), lines[2:], strict=True):
        assert goal.text in line and f"`python -m bench {goal.section}`" in line


def test_a_goal_that_is_missed_says_so() -> None:
    data = store.load("instructions")["data"]
    for case in data["ours"]:
        for kernel in case["kernels"].values():
            kernel["stack_bytes"] = 8
            kernel["resident_blocks"] = 1
            for stage in kernel["stages"]:
                stage["instructions"] *= 2
                stage["loads"] = {"2": 1}
    text = goals.markdown({"instructions": data})
    for part in ("A + B + C", "bytes of stack", "least width", "blocks of 8 warps"):
        (line,) = (line for line in text.splitlines() if part in line)
        assert "**not met**" in line


# ---------------------------------------------------------------- the floor

DEVICE: dict[str, Any] = {
    **{"sms": 100, "clock": 1e9, "mufu": 10, "issue": 100},
    **{"bandwidth": 2e12, "copy": 1e12},
}


@pytest.mark.parametrize(
    ("of", "reuse", "seconds", "bound"),
    [
        (Work(bytes=14, bytes_once=6, exps=6, instructions=40), False, 14e-12, "bytes"),
        (Work(bytes=14, bytes_once=6, exps=8, instructions=40), True, 8e-12, "exps"),
        (Work(bytes=14, bytes_once=6, exps=6, instructions=150), True, 15e-12, "instructions"),
    ],
)
def test_the_floor_is_the_largest_of_three(
    of: Work, reuse: bool, seconds: float, bound: str
) -> None:
    at_least, limit = floor(of, DEVICE, reuse)
    assert at_least == pytest.approx(seconds)
    assert limit == bound


def test_without_a_measured_copy_the_data_sheet_counts() -> None:
    sheet = {key: value for key, value in DEVICE.items() if key != "copy"}
    of = Work(bytes=14, bytes_once=6, exps=0, instructions=0)
    assert floor(of, sheet, False)[0] == pytest.approx(7e-12)


def test_work_of_a_kernel() -> None:
    """Three sweeps of bf16 pairs and a gradient: 14 bytes, 6 where each logit is read once."""

    def stage(name: str, width: int, stores: int) -> dict[str, Any]:
        return {
            **{"stage": name, "positions": 8.0, "instructions": 80, "exps": 16},
            **{"loads": {str(width): 2}, "stores": {"16": stores} if stores else {}},
        }

    stages = [stage("A", 16, 0), stage("R", 8, 0), stage("B", 16, 0), stage("C", 16, 1)]
    kernel = {"stages": stages}
    none = {"R": 0.0}
    assert work([kernel], none) == Work(bytes=14, bytes_once=6, exps=6, instructions=30)
    assert work([kernel, kernel], none) == Work(28, bytes_once=12, exps=12, instructions=60)
    scanned = Work(bytes=19, bytes_once=6, exps=11, instructions=55)
    assert work([kernel], {"R": 2.5}) == scanned
    stages.append(stage("cut", 8, 0))
    assert work([kernel], {"R": 2.0, "cut": 0.5}) == scanned


def test_a_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        table(("a", "b"), [("1",)])
