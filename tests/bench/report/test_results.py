"""RESULTS.md has the figures that bench/results holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import store
from bench.report import document


def test_results_are_what_is_stored() -> None:
    assert document.DOCUMENT.read_text("utf-8") == document.render()


FIGURES = {
    "instructions": "registers",
    "family": "exps",
    "traffic": "bytes_read",
    "operators": "bytes",
    "growth": "bytes",
    "convergence": "gradient_error",
    "linear": "peak_bytes",
    "trainer_step": "loss_peak_bytes",
    "sharded_heads": "bytes",
    "vocabulary_parallel": "bytes",
    "sparse": "compulsory",
    "offline": "bytes",
    "floor": "nanoseconds",
    "on_real_logits": "milliseconds",
    "demo": "head_share",
}


def test_every_section_has_a_figure() -> None:
    assert FIGURES.keys() == document.SECTIONS.keys()


@pytest.mark.parametrize("section", document.SECTIONS)
def test_a_changed_figure_is_drift(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RESULTS.md differs once all figures of one name have changed."""
    for path in store.RESULTS.glob("*.json"):
        text = path.read_text("utf-8")
        if path.stem == section:
            name = f'"{FIGURES[section]}": '
            assert name in text
            text = text.replace(name, f"{name}9")
        (tmp_path / path.name).write_text(text, "utf-8")
    monkeypatch.setattr(document, "load", lambda name: store.load(name, tmp_path))
    written = document.DOCUMENT.read_text("utf-8").splitlines()
    assert [line for line in document.render().splitlines() if line not in written]
