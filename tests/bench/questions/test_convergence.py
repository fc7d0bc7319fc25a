"""Errors near convergence, measured on a few small rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from akl_triton import AdaptiveKL, ForwardKL, eager
from bench.questions import convergence
from bench.store import load

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no FMA"
)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(convergence, "VOCABULARY", 300)
    monkeypatch.setattr(convergence, "DISTANCES", (1.0, 1e-1, 1e-3, 1e-5))
    monkeypatch.setattr(convergence, "FAMILY", {"a": AdaptiveKL, "f": ForwardKL})
    stored: dict[str, Any] = json.loads(json.dumps(convergence.collect()))
    return stored


def test_errors_grow_as_the_student_nears_the_teacher(data: dict[str, Any], tmp_path: Path) -> None:
    for name in ("adaptive_kl", "forward_kl"):
        for by in convergence.COLOURS:
            errors = convergence._series(data, name, by, "gradient_error")
            assert errors[0] < 1e-6 and errors == sorted(errors) and errors[-1] < 0.1
            assert max(convergence._series(data, name, by, "loss_error")) < 1e-6
    assert convergence.failures(data) == []
    assert convergence.markdown(data).count("| `adaptive_kl` |") == 1
    convergence.plot(data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_stored_answer_has_no_negative_loss() -> None:
    stored = load("convergence")["data"]
    assert convergence.failures(stored) == []
    stored["points"][0]["lowest_loss"] = -1e-9
    assert len(convergence.failures(stored)) == 1


def test_a_wrong_gradient_is_an_error(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = eager._write
    monkeypatch.setattr(eager, "_write", lambda gradient, *rest: write(gradient * 1.01, *rest))
    wrong = convergence.collect()
    for by, least in ((convergence.BACKEND, 9e-3), (convergence.KERNELS, 0.0)):
        before, after = (
            convergence._series(x, "forward_kl", by, "gradient_error")[0] for x in (data, wrong)
        )
        assert after >= least and (after > before) == (by == convergence.BACKEND)
