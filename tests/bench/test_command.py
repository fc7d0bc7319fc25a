"""`python -m bench` has one grammar for all questions."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench import __main__ as command
from bench import questions, store
from bench.report import document, readme

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The options with which a question has been asked; answers are stored in another folder."""
    calls: list[dict[str, Any]] = []

    def collect(
        rows: int = 8, factors: Sequence[float] = (1.0, 2.0), name: str = "x", fast: bool = False
    ) -> dict[str, Any]:
        calls.append({"rows": rows, "factors": factors, "name": name, "fast": fast})
        if name == "no GPU":
            raise questions.Unanswerable("there is no GPU")
        return {"sum": rows * sum(factors), "shape": (rows, 1), "bad": name == "bad"}

    module = SimpleNamespace(
        __doc__="A question.",
        collect=collect,
        markdown=lambda data: f"the sum is {data['sum']}, of {data['shape']}",
        plot=lambda data, path: Path(path).write_text(f"{data['sum']}"),
        failures=lambda data: ["it is bad"] if data["bad"] else [],
    )
    monkeypatch.setattr(command, "question", lambda name: module)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "store", lambda name, data: store.store(name, data, tmp_path))
    monkeypatch.setattr(command, "load", lambda name: store.load(name, tmp_path))
    return calls


DEFAULTS = {"rows": 8, "factors": (1.0, 2.0), "name": "x", "fast": False}


def test_a_question_is_asked_and_printed(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["traffic"]) == 0
    assert asked == [DEFAULTS]
    assert capsys.readouterr().out == "the sum is 24.0, of [8, 1]\n"
    assert list(tmp_path.iterdir()) == []


def test_options_are_the_parameters(asked: list[dict[str, Any]]) -> None:
    options = ["--rows", "3", "--factors", "5", "0.5", "--name", "y", "--fast"]
    assert command.main(["traffic", *options]) == 0
    assert asked == [{"rows": 3, "factors": [5.0, 0.5], "name": "y", "fast": True}]


def test_an_answer_is_saved_and_shown_again(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["traffic", "--save"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"traffic.json", "traffic.png"}
    assert json.loads((tmp_path / "traffic.json").read_text())["data"]["sum"] == 24.0
    first = capsys.readouterr().out
    assert command.main(["traffic", "--stored"]) == 0
    assert capsys.readouterr().out == first
    assert len(asked) == 1


@pytest.mark.parametrize(
    "options", [["--save", "--rows", "9"], ["--stored", "--rows", "9"], ["--save", "--stored"]]
)
def test_what_is_stored_is_the_answer_of_the_bare_command(
    asked: list[dict[str, Any]], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["traffic", *options])
    assert stop.value.code == 2
    assert not asked
    assert options[0] in capsys.readouterr().err


def test_figures_and_pictures(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "there.png"
    assert command.main(["traffic", "--json", "--plot", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["sum"] == 24.0
    assert picture.read_text() == "24.0"


def test_failures_fail_the_command(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["traffic", "--name", "bad"]) == 1
    assert "it is bad" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        command.main(["traffic", "--name", "no GPU"])
    assert stop.value.code == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_all_are_those_of_the_report(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "SECTIONS", {"traffic": "Traffic", "floor": "Floors"})
    assert command.main(["all"]) == 0
    assert len(asked) == 2 and list(tmp_path.iterdir()) == []
    assert command.main(["all", "--save"]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"traffic", "floor"}


def test_the_report_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = readme.README.read_text("utf-8")
    here, results = tmp_path / "README.md", tmp_path / "RESULTS.md"
    here.write_text(readme.BLOCK.sub(r"\1\nout of date\n\n\3", written), "utf-8")
    assert here.read_text("utf-8") != written
    monkeypatch.setattr(readme, "README", here)
    monkeypatch.setattr(document, "DOCUMENT", results)
    assert command.main(["report"]) == 0
    assert str(results) in capsys.readouterr().out
    assert here.read_text("utf-8") == written
    assert results.read_text("utf-8") == document.render()


def test_a_stored_answer_is_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["traffic", "--stored"]) == 0
    assert capsys.readouterr().out.strip() in document.DOCUMENT.read_text("utf-8")


def test_without_a_question_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, text in questions.QUESTIONS.items():
        assert f"{name} {text}" in printed


MODULES = sorted(
    path.stem
    for path in (ROOT / "bench" / "questions").glob("*.py")
    if not path.stem.startswith(("_", "test_"))
)


def test_every_module_is_a_question() -> None:
    assert sorted(questions.QUESTIONS) == MODULES
    assert set(document.SECTIONS) <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_question_has_what_the_command_needs(name: str) -> None:
    module: ModuleType = questions.question(name)
    assert f"`python -m bench {name}`" in (module.__doc__ or "")
    assert callable(module.markdown)
    for parameter in inspect.signature(module.collect).parameters.values():
        assert parameter.default is not parameter.empty, parameter


def test_the_table_in_the_readme_of_bench_has_every_question() -> None:
    rows = re.findall(
        r"^\| (.+\?) \| `python -m bench (\w+)` \| .+ \|$",
        (ROOT / "bench" / "README.md").read_text("utf-8"),
        flags=re.MULTILINE,
    )
    assert {name: text for text, name in rows} == questions.QUESTIONS
