"""The question about a step of training, asked of tiny models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("gguf")

from akl_triton import eager, rows
from bench.inputs import trainer_steps
from bench.inputs.trainer_steps import Setting, batch_of, without_layers
from bench.questions import Unanswerable, trainer_step
from tests.support.tiny_models import tiny_model

B, L, VOCABULARY = 4, 32, 4_096


def tiny_setting(sequences: int = B, length: int = L) -> Setting:
    """A teacher that is wider, and a student whose embeddings and lm_head are not trained."""
    student = tiny_model("llama", tie_word_embeddings=True, vocab_size=VOCABULARY)
    student.get_input_embeddings().requires_grad_(False)
    teacher = tiny_model("llama", seed=1, hidden_size=64, vocab_size=VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (sequences, length), generator=generator)
    return Setting(student, teacher.requires_grad_(False), batch_of(ids))


@pytest.fixture(scope="module")
def answer() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_step, "smollm2_setting", tiny_setting)
        patch.setattr(eager, "TEMPORARY_BYTES", 2**16)
        patch.setattr(rows, "BLOCK_BYTES", 2**16)
        return json.dumps(trainer_step.collect(sequences=B, length=L, chunk_mib=1, rounds=2))


@pytest.fixture
def asked(answer: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(answer)
    return data


def test_every_way_computes_the_same(asked: dict[str, Any]) -> None:
    assert trainer_step.failures(asked) == []
    jensen_shannon, forward_kl = (case["methods"] for case in asked["cases"])
    for methods in (jensen_shannon, forward_kl):
        for method in methods:
            assert method["loss"] == pytest.approx(methods[0]["loss"], rel=1e-5)
            assert method["gradient_error"] < 1e-5
    assert forward_kl[0]["loss"] > 2 * jensen_shannon[0]["loss"] > 0.02


def test_a_step_is_more_than_its_loss(asked: dict[str, Any]) -> None:
    logits = 4 * B * L * VOCABULARY
    for case in asked["cases"]:
        stock, chunked, *ours = case["methods"]
        for method in case["methods"]:
            assert method["step_peak_bytes"] > method["loss_peak_bytes"] > 0
            assert len(method["step_seconds"]) == len(method["loss_seconds"]) == 2
        assert stock["loss_peak_bytes"] > 5 * logits
        assert chunked["loss_peak_bytes"] > 5 * logits
        default, small = (method["loss_peak_bytes"] for method in ours)
        assert 2 * logits < default < 3 * logits
        assert 2**20 < small < 2 * 2**20


def test_the_answer_has_a_line_for_each_way(asked: dict[str, Any]) -> None:
    case = asked["cases"][0]
    case["methods"][2] |= {"loss_peak_bytes": 3 * 2**20, "loss_seconds": [1.0, 2.0]}
    case["methods"][0] |= {"loss_seconds": [10.0, 5.0]}
    text = trainer_step.markdown(asked)
    for method in case["methods"]:
        assert sum(line.startswith(f"| {method['name']} |") for line in text.splitlines()) == 2
    (line, _) = (x for x in text.splitlines() if x.startswith("| distillation_loss_of_models |"))
    assert line.startswith("| distillation_loss_of_models | 3 | 0.25 |")


def test_a_wrong_way_fails(asked: dict[str, Any]) -> None:
    asked["cases"][1]["methods"][3]["gradient_error"] = 1e-2
    (failure,) = trainer_step.failures(asked)
    assert failure.startswith("gradient_error 1.0e-02 of distillation_loss_of_models, chunk_bytes")
    asked["cases"][1]["methods"][3]["gradient_error"] = float("nan")
    assert len(trainer_step.failures(asked)) == 1


def test_layers_come_back() -> None:
    setting = tiny_setting()
    layers = [model.model.layers for model in (setting.student, setting.teacher)]
    with without_layers(setting):
        assert not len(setting.student.model.layers) and not len(setting.teacher.model.layers)
    assert [model.model.layers for model in (setting.student, setting.teacher)] == layers
    assert all(len(of_model) == 2 for of_model in layers)


def test_another_trl_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_steps, "version_obstacle", lambda package: f"another {package}")
    with pytest.raises(Unanswerable, match="another trl"):
        trainer_step.collect()
