"""A Trainer whose teacher is pairs in the columns of its dataset."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import DivergenceStats, distillation_loss, teacher_pairs
from akl_triton.integrations import PairCollator, pairs, teacher_of

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
import datasets
import transformers

from akl_triton.integrations.transformers import DistillationTrainer
from tests.support.tiny_models import VOCABULARY, tiny_model

LENGTHS = (8, 5, 7, 3, 8, 6, 4, 8)


def sequences() -> list[dict[str, Tensor]]:
    """Of several lengths, with labels for some of their tokens."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(5, 90, (length,), generator=g)
        labels = ids.clone()
        labels[: i % 3] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def with_pairs(teacher: Any, k: int = VOCABULARY, temperature: float = 1.0) -> list[dict[str, Any]]:
    rows = []
    for row in sequences():
        with torch.no_grad():
            found = teacher_pairs(teacher(input_ids=row["input_ids"][None]).logits, k, temperature)
        assert found.log_tail is not None
        columns = (found.ids[0], found.log_probs[0], found.log_tail[0])
        rows.append(
            {
                **row,
                **dict(zip(pairs.COLUMNS, columns, strict=True)),
                "teacher_temperature": torch.tensor(temperature),
            }
        )
    return rows


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sequences without pairs, which no collator of ours has seen."""
    batch = {}
    for name, fill in {"input_ids": 0, "labels": -100}.items():
        values = [row[name] for row in rows]
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, True, fill)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def student_and_teacher() -> tuple[Any, Any]:
    return tiny_model("llama"), tiny_model("llama", seed=1, hidden_size=64)


def trainer_of(student: Any, folder: Any, rows: Any, **given: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    of_args = {name: given.pop(name) for name in list(given) if name.startswith(("per_", "grad"))}
    args = transformers.TrainingArguments(**{**defaults, **of_args})
    given.setdefault("data_collator", PairCollator())
    trainer = DistillationTrainer(student, args, train_dataset=rows, eval_dataset=rows, **given)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def losses(trainer: Any) -> list[dict[str, float]]:
    return [
        {name: logs[name] for name in ("loss", "forward_kl", "reverse_kl", "gap")}
        for logs in trainer.state.log_history
        if "loss" in logs
    ]


@pytest.mark.parametrize("size", [4, 1])
def test_all_pairs_are_the_teacher(tmp_path, size):
    """Also where micro-batches are of unequal length, and in evaluation."""
    student, teacher = student_and_teacher()
    expected = copy.deepcopy(student)
    options: dict[str, Any] = {"temperature": 2.0, "kd_ratio": 0.7}
    accumulate = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    rows = datasets.Dataset.from_list(
        [{name: x.tolist() for name, x in row.items()} for row in with_pairs(teacher, 112, 2.0)]
    ).with_format("torch")
    ours = trainer_of(student, tmp_path, rows, **options, **accumulate)
    dense = trainer_of(
        expected,
        tmp_path,
        sequences(),
        teacher_model=teacher,
        data_collator=pad,
        **options,
        **accumulate,
    )
    start = copy.deepcopy(student)
    for trainer in (ours, dense):
        trainer.train()
    for name, p in student.named_parameters():
        torch.testing.assert_close(p, expected.get_parameter(name), rtol=0.0, atol=1e-5, msg=name)
    assert (
        max((p - start.get_parameter(n)).abs().max() for n, p in student.named_parameters()) > 1e-4
    )
    for found, exact in zip(losses(ours), losses(dense), strict=True):
        assert found == pytest.approx(exact, rel=1e-4)
    metrics = {name: x for name, x in dense.evaluate().items() if "per_second" not in name}
    found = ours.evaluate()
    for name in ("loss", *DivergenceStats._fields):
        assert found[f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-4), name
    logits = ours.predict(rows).predictions
    torch.testing.assert_close(
        torch.from_numpy(logits),
        torch.from_numpy(dense.predict(sequences()).predictions),
        rtol=1e-3,
        atol=1e-4,
    )


def test_few_pairs(tmp_path):
    student, teacher = student_and_teacher()
    rows = with_pairs(teacher, 5)
    trainer = trainer_of(student, tmp_path, rows)
    batch = PairCollator()(rows[:4])
    loss, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    found = teacher_of(batch)
    expected = distillation_loss(outputs.logits, found, batch["labels"], shift=1)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0.0)
    dense = distillation_loss(
        outputs.logits, teacher(**pad(sequences()[:4])).logits.detach(), batch["labels"], shift=1
    )
    assert loss < dense


def test_a_step_without_a_tail(tmp_path):
    student, teacher = student_and_teacher()
    rows = [
        {name: x for name, x in row.items() if name != "teacher_log_tail"}
        for row in with_pairs(teacher, 5)
    ]
    trainer = trainer_of(student, tmp_path, rows)
    trainer.train()
    other, _ = student_and_teacher()
    tailed = trainer_of(other, tmp_path, with_pairs(teacher, 5))
    tailed.train()
    for found, exact in zip(losses(trainer), losses(tailed), strict=True):
        assert found == pytest.approx(exact, rel=1e-3)


def test_the_collator_pads():
    _, teacher = student_and_teacher()
    rows = with_pairs(teacher, 5)
    batch = PairCollator(pad_token_id=9)(rows)
    for i, row in enumerate(rows):
        length = LENGTHS[i]
        for name in ("input_ids", "labels", *pairs.COLUMNS):
            assert torch.equal(batch[name][i, :length], row[name].to(batch[name].dtype)), name
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (8 - length)
        assert (batch["input_ids"][i, length:] == 9).all()
        assert (batch["labels"][i, length:] == -100).all()
        assert (batch["teacher_ids"][i, length:] == -1).all()
    lists = [{name: x.tolist() for name, x in row.items()} for row in rows]
    for name, values in PairCollator(9)(lists).items():
        torch.testing.assert_close(values, batch[name], check_dtype=False)
    unlabelled = [{name: x for name, x in row.items() if name != "labels"} for row in rows]
    labels = PairCollator(9)(unlabelled)["labels"]
    assert torch.equal(labels, batch["input_ids"].where(batch["attention_mask"].bool(), -100))


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: x for key, x in row.items() if key != name}


def test_rows_that_do_not_fit():
    _, teacher = student_and_teacher()
    first, second, *_ = with_pairs(teacher, 5)
    fewer = {**second, **{name: second[name][:, :4] for name in pairs.COLUMNS[:2]}}
    shorter = {**second, "teacher_ids": second["teacher_ids"][:4]}
    for rows, message in {
        (0, "teacher_ids"): r"^rows: expected teacher_ids, got input_ids, labels",
        (1, "labels"): r"^rows: expected the same columns in all rows .*without labels$",
    }.items():
        index, name = rows
        both = [first, second]
        both[index] = _without(both[index], name)
        with pytest.raises(ValueError, match=message):
            PairCollator()(both)
    with pytest.raises(ValueError, match=r"^teacher_ids: expected the same k in all rows"):
        PairCollator()([first, fewer])
    with pytest.raises(ValueError, match=r"^teacher_ids: expected as many positions as input_ids"):
        PairCollator()([first, shorter])
    with pytest.raises(TypeError, match=r"^labels: expected a tensor, an array or lists"):
        PairCollator()([{**first, "labels": "text"}])


def test_neither_or_both(tmp_path):
    student, teacher = student_and_teacher()
    rows = datasets.Dataset.from_list(
        [{name: x.tolist() for name, x in row.items()} for row in with_pairs(teacher, 5)]
    )
    neither = trainer_of(student, tmp_path, sequences(), data_collator=pad)
    both = trainer_of(student, tmp_path, rows, teacher_model=teacher)
    for call in (neither.train, neither.evaluate):
        with pytest.raises(ValueError, match=r"^teacher_model: expected a model, or batches that"):
            call()
    for call in (both.train, both.evaluate):
        with pytest.raises(ValueError, match=r"^teacher_model: expected None where the batch has"):
            call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizers": (1, 2)}, r"^tokenizers: expected None with a teacher that is pairs"),
        ({"same_vocabulary": False}, r"^same_vocabulary: expected True"),
        ({"divergence": "dkd"}, r"^divergence: expected one that a SparseTeacher suffices for"),
    ],
    ids=["tokenizers", "same_vocabulary", "divergence"],
)
def test_bad_arguments(tmp_path, given, message):
    student, teacher = student_and_teacher()
    with pytest.raises(ValueError, match=message):
        trainer_of(student, tmp_path, with_pairs(teacher, 5), **given)


def test_pairs_of_another_temperature(tmp_path):
    student, teacher = student_and_teacher()
    trainer = trainer_of(student, tmp_path, with_pairs(teacher, 5, 2.0))
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"^temperature: expected 2, that of the pairs in the"):
            call()


def test_examples_of_the_docstrings():
    results = doctest.testmod(pairs)
    assert results.attempted > 0 and results.failed == 0
