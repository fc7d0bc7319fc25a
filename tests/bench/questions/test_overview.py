"""The README's picture shows the stored answer, which is of a real token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from bench.questions import overview
from bench.store import load


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    data: dict[str, Any] = load("overview")["data"]
    return data


def test_the_token_adds_up(stored: dict[str, Any]) -> None:
    token = stored["token"]
    p, q, head = token["teacher"], token["student"], token["head_size"]
    gap = token["g_head"] + token["g_tail"]
    assert p == sorted(p, reverse=True)
    assert sum(p[:head]) <= 0.5 < sum(p[: head + 1])  # the exclusive rule at mu = 1/2
    in_head = sum(abs(a - b) for a, b in zip(p[:head], q[:head], strict=True))
    assert token["g_head"] == pytest.approx(in_head, rel=1e-12)
    assert token["forward_weight"] == pytest.approx(token["g_head"] / gap, rel=1e-12)
    assert head < len(p) and gap <= 2


def test_the_memory_is_that_of_the_linear_question(stored: dict[str, Any]) -> None:
    peaks = {
        method["name"].partition(",")[0]: method
        for method in load("linear")["data"]["methods"]
        if "peak_bytes" in method
    }
    drawn = stored["memory"]["methods"]
    assert len(drawn) == len(overview.METHODS)
    for method in drawn:
        assert method["mib"] * 2**20 == peaks[method["name"]]["peak_bytes"]
    assert [m["name"] for m in drawn if not m["measured"]] == ["authors' code on all logits"]


def test_the_picture_says_what_was_measured(
    stored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def kept(figure: matplotlib.figure.Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)
    overview.plot(stored, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size > 0
    token, memory = figures[0].axes
    assert f"w = {stored['token']['forward_weight']:.2f}" in token.get_title()
    labels = [text.get_text() for text in memory.texts]
    for method in stored["memory"]["methods"]:
        kind = "measured" if method["measured"] else "extrapolated"
        assert f" {method['mib']:,.0f} MiB, {kind}" in labels
