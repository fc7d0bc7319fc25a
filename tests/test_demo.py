"""The demo on a random model of the same kind, which is small enough to be trained in no time."""

from __future__ import annotations

import copy
import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton.reference import reference_adaptive_kl

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("datasets")

from akl_triton.cli import demo, main, smollm2  # noqa: E402
from tests.support import tiny_smollm2  # noqa: E402

VOCABULARY = 128


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=smollm2.FIRST + smollm2.LAST + 3,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def tokenize(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) % VOCABULARY for character in text]}


def random_ids(sequences: int) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo_writes_curves_and_picture(
    dtype: str,
    teacher: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "load_teacher", lambda: (copy.deepcopy(teacher), tokenize))
    arguments = ["--steps", "2", "--device", "cpu", "--dtype", dtype, "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    assert re.search(r"gradient:\s+\d+\s+MiB\s+from\s+hidden", capsys.readouterr().out)

    with (tmp_path / "akl_demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["trained_with"]) for row in rows] == [
        (step, loss) for step in "012" for loss in ("AKL", "FKL", "RKL")
    ]
    figures = [[float(row[name]) for name in demo.Point._fields[2:]] for row in rows]
    assert all(math.isfinite(value) for row in figures for value in row)
    assert figures[0] == figures[1] == figures[2], "the three start from the same student"
    assert figures[6] != figures[7] != figures[8], "and diverge, as their losses differ"
    assert all(0.0 < share < 1.0 for *_, share in figures)
    assert (tmp_path / "akl_demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_student_of_pairs_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same start on the same batches as the one with the teacher, whose pairs say less."""
    monkeypatch.setattr(demo, "load_teacher", tiny_smollm2.load_teacher)
    arguments = ["--steps", "2", "--device", "cpu", "--offline", "--output", str(tmp_path)]

    def curves(pairs: int) -> list[list[float]]:
        monkeypatch.setattr(demo, "PAIRS", pairs)
        assert main(["demo", *arguments]) == 0
        with (tmp_path / "akl_demo.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            [float(row["forward_kl"]) for row in rows if row["trained_with"] == name]
            for name in ("AKL", "AKL from disk")
        ]

    vocabulary = len(tiny_smollm2.load_teacher()[1])
    dense, of_all = curves(vocabulary)
    assert len(dense) == 3 and abs(dense[-1] - dense[0]) > 1e-2
    assert of_all == pytest.approx(dense, rel=1e-3)
    dense, of_few = curves(4)
    assert of_few[0] == dense[0] and of_few[-1] != pytest.approx(dense[-1], rel=1e-3)


def train(
    folder: Path, student: Any, teacher: Any, name: str, ids: Tensor, steps: int, seed: int = 0
) -> Any:
    """A student trained with the loss it is named after."""
    student = copy.deepcopy(student)
    training = demo.training_arguments(str(folder), torch.device("cpu"), torch.float32, steps, seed)
    demo.distil(
        teacher, student, demo.DIVERGENCES[name], ids, training, transformers.TrainerCallback()
    )
    return student


def test_every_loss_teaches(teacher: Any, tmp_path: Path) -> None:
    """Each student ends nearer to the teacher by its own loss; the lm_head and the teacher do not
    change."""
    ids = random_ids(2)
    student = smollm2.shallow_copy(teacher)
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    exam = [(ids, teacher(ids).logits)]

    for name, own in (
        ("AKL", ("forward_kl", "reverse_kl")),
        ("FKL", ("forward_kl",)),
        ("RKL", ("reverse_kl",)),
    ):
        trained = train(tmp_path, student, teacher, name, ids, steps=12)
        start = demo.evaluate(0, name, student, exam, torch.float32)
        end = demo.evaluate(12, name, trained, exam, torch.float32)
        assert all(getattr(end, kl) < 0.8 * getattr(start, kl) for kl in own), (start, end)
        embedding = trained.get_input_embeddings().weight
        assert torch.equal(embedding, teacher.get_input_embeddings().weight)
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not list(tmp_path.iterdir()), "no checkpoint is written"


def test_the_fused_path_is_the_other_one_with_less_memory(
    teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(8)
    monkeypatch.setattr(demo, "CHUNK_BYTES", 2**14)
    student = smollm2.shallow_copy(teacher)
    with torch.no_grad():
        hidden, of_teacher = (model.model(ids).last_hidden_state for model in (student, teacher))
    hidden.requires_grad_()
    for name in demo.DIVERGENCES:
        losses = [
            demo.loss_of(name, student, hidden, teacher, of_teacher, ids, way)
            for way in (False, True)
        ]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))
    fused, of_logits = (
        demo.loss_peak(teacher, student, ids, torch.float32, way) for way in (False, True)
    )
    assert fused + 4 * ids.numel() * VOCABULARY < of_logits


def test_evaluate_is_the_mean_of_the_oracle(teacher: Any) -> None:
    ids = random_ids(3)
    student = smollm2.shallow_copy(teacher)
    exam = [(part, teacher(part).logits) for part in torch.split(ids, 2)]
    point = demo.evaluate(7, "AKL", student, exam, torch.float32)

    with torch.no_grad():
        s, t = (model(ids).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    oracle = reference_adaptive_kl(s, t)
    assert point[:2] == (7, "AKL")
    assert point.forward_kl == pytest.approx(oracle.forward_kl.mean().item(), rel=1e-5)
    assert point.reverse_kl == pytest.approx(oracle.reverse_kl.mean().item(), rel=1e-5)
    share = oracle.g_head.sum() / (oracle.g_head.sum() + oracle.g_tail.sum())
    assert point.head_share == pytest.approx(share.item(), rel=1e-5)


def test_the_student_is_the_teacher_without_its_middle(teacher: Any) -> None:
    student = smollm2.shallow_copy(teacher)
    kept = [*range(smollm2.FIRST), *range(-smollm2.LAST, 0)]
    assert student.config.num_hidden_layers == len(student.model.layers) == len(kept)
    assert teacher.config.num_hidden_layers == len(teacher.model.layers) == len(kept) + 3
    for mine, i in zip(student.model.layers, kept, strict=True):
        theirs = teacher.model.layers[i].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.state_dict().items())


def test_the_student_generates_with_its_cache_what_it_does_without(teacher: Any) -> None:
    student = smollm2.shallow_copy(teacher).eval()
    cached, plain = (
        student.generate(random_ids(1), max_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert cached.tolist() == plain.tolist()


def test_held_out_text_is_not_trained_on() -> None:
    train, held_out = smollm2.read_text(tokenize)
    assert held_out.shape == (smollm2.HELD_OUT, smollm2.SEQUENCE)
    assert len(train) > 100
    assert not {tuple(s) for s in held_out.tolist()} & {tuple(s) for s in train.tolist()}


@pytest.mark.parametrize("sequences", [3 * demo.BATCH, 3 * demo.BATCH + 1])
def test_batches_are_epochs_in_an_order_of_the_seed(
    teacher: Any, sequences: int, tmp_path: Path
) -> None:
    """The same for all students; what is left of an epoch makes no smaller batch."""
    ids = torch.arange(sequences)[:, None].expand(-1, 4).contiguous()
    student = smollm2.shallow_copy(teacher)
    steps = 6  # two epochs

    def drawn(name: str, seed: int) -> list[int]:
        batches: list[Tensor] = []

        def see(model: Any, args: Any, given: dict[str, Any]) -> None:
            if model.training:
                batches.append(given["input_ids"])

        with_hook = copy.deepcopy(student)
        with_hook.register_forward_pre_hook(see, with_kwargs=True)
        train(tmp_path, with_hook, teacher, name, ids, steps, seed)
        assert [batch.shape for batch in batches] == [(demo.BATCH, 4)] * steps
        return torch.cat(batches)[:, 0].tolist()

    order = drawn("AKL", 0)
    for epoch in (order[: len(order) // 2], order[len(order) // 2 :]):
        assert len(set(epoch)) == 3 * demo.BATCH
    assert order == drawn("AKL", 0) == drawn("RKL", 0) != drawn("AKL", 1)
