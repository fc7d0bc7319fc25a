"""Every figure in README.md is in a block that is written from the stored answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import store
from bench.report import readme

ROOT = Path(__file__).resolve().parents[3]
# A number of bytes, time, instructions or quality, with digits that could be out of date.
FIGURE = re.compile(
    r"\d\s*(?:bytes|[KMGT]i?B|ms|ns|s|seconds|minutes|instructions|registers|scans|sectors"
    r"|times|nats|layers|steps|%)(?![\w/])"
)


def test_the_readme_is_what_is_stored() -> None:
    text = readme.README.read_text("utf-8")
    assert readme.render(text) == text


def test_every_block_is_there_once() -> None:
    names = [name for _, name, _ in readme.BLOCK.findall(readme.README.read_text("utf-8"))]
    assert sorted(names) == sorted(readme.BLOCKS)


def test_no_figure_stands_outside_of_the_blocks() -> None:
    rest = readme.BLOCK.sub("", readme.README.read_text("utf-8"))
    assert [rest[max(0, m.start() - 40) : m.end()] for m in FIGURE.finditer(rest)] == []


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("on_real_logits", '"milliseconds": ', '"milliseconds": 9'),
        ("on_real_logits", '"temporaries_mib": ', '"temporaries_mib": 9'),
        ("linear", '"peak_bytes": ', '"peak_bytes": 9'),
        ("compiled", '"ours": ', '"ours": 9'),
        ("operators", '"bytes": ', '"bytes": 9'),
        ("demo", '"forward_kl": ', '"forward_kl": 9'),
        ("demo", '"all logits": ', '"all logits": 9'),
        ("instructions", '"instructions": ', '"instructions": 9'),
        ("traffic", '"instructions": ', '"instructions": 9'),
    ],
)
def test_a_changed_figure_is_drift(
    section: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in store.RESULTS.glob("*.json"):
        text = path.read_text("utf-8")
        if path.stem == section:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / path.name).write_text(text, "utf-8")
    monkeypatch.setattr(readme, "load", lambda name: store.load(name, tmp_path))
    text = readme.README.read_text("utf-8")
    assert readme.render(text) != text


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no block 'cost', but costs"):
        readme.render("<!-- python -m bench report: cost -->\n<!-- end -->")


def test_a_claim_that_no_longer_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = store.load("demo")["data"]
    for point in data["points"]:
        point["head_share"] = 1 - point["head_share"]
    monkeypatch.setattr(readme, "load", lambda name: {"data": data})
    with pytest.raises(ValueError, match="no longer in order"):
        readme.demo()
