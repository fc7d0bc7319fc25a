"""`akl-triton teach` writes what the teacher says of a text, and leaves out what it has written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("pyarrow")
pytest.importorskip("datasets")

from akl_triton import teacher_pairs
from akl_triton.cli import main, pair
from akl_triton.cli.teach import read_documents
from akl_triton.offline import open_pairs, stored_in
from tests.support import tiny_smollm2

TEXT = "The teacher is run once, and the student reads what it has said. " * 6


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "load_teacher", tiny_smollm2.load_teacher)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def teach(text: Path, *options: str) -> int:
    folder = str(text.parent / "pairs")
    fixed = ("--output", folder, "--device", "cpu", "--top-k", "5")
    return main(["teach", "smollm2", str(text), *fixed, *options])


def test_what_is_stored_is_what_the_teacher_says(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--temperature", "2", "--context", "32", "--batch", "3")
    assert teach(text, *options) == 0
    first = " ".join(capsys.readouterr().out.split())
    teacher, tokenizer = tiny_smollm2.load_teacher()
    folder = text.parent / "pairs"
    assert (stored_in(folder).k, stored_in(folder).temperature) == (5, 2.0)
    rows: Any = open_pairs(folder, tokenizer=tokenizer, teacher=teacher, streaming=True)
    tokens: list[int] = []
    for row in rows:
        assert row["document"] == "text.txt" and row["position"] == len(tokens)
        tokens += row["input_ids"].tolist()
        with torch.no_grad():
            exact = teacher_pairs(teacher(input_ids=row["input_ids"][None]).logits[0], 5, 2.0)
        assert torch.equal(row["teacher_ids"].int(), exact.ids)
        torch.testing.assert_close(row["teacher_log_probs"], exact.log_probs, rtol=1e-3, atol=0.0)
    assert tokens == tokenizer(TEXT)["input_ids"]
    found = re.search(r": ([\d,]+) tokens, 5 pairs each, ([\d,]+) bytes, ([\d.]+) bytes", first)
    assert found is not None and int(found[1].replace(",", "")) == len(tokens)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert float(found[3]) == pytest.approx(size / len(tokens), abs=0.05)
    files = sorted(folder.iterdir())
    assert teach(text, *options) == 0  # nothing is left to do
    assert sorted(folder.iterdir()) == files
    assert f": {found[1]} tokens" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "2048"), "--context: expected at most 1024 tokens"),
        (("--top-k", "6"), "got k 5 in place of 6"),
        (("--temperature", "2"), "got temperature 1.0 in place of 2.0"),
        (("--temperature", "0"), "expected a number > 0, got 0"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_what_cannot_be_done(
    text: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert teach(text) == 0
    try:
        code: Any = teach(text, *options)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chapters = read_documents("python-docs")
    assert len(chapters) > 50 and len({name for name, _ in chapters}) == len(chapters)
    assert teach(tmp_path / "none.txt") == 2
    assert "TEXT: expected a text file in UTF-8, or python-docs" in capsys.readouterr().err
