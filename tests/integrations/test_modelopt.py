"""`DistillationLoss` is a criterion of NVIDIA ModelOpt as it is, and computes what ModelOpt's does.

pip install nvidia-modelopt==0.47.0, with which this was tested.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import AdaptiveKLLoss, DistillationLoss, adaptive_kl, forward_kl

pytest.importorskip("modelopt")
pytest.importorskip("transformers")
import modelopt.torch.distill as mtd

from tests.support.tiny_models import VOCABULARY, tiny_model

B, L = 2, 6
IDS = torch.randint(5, 90, (B, L), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[0, :3] = -100
LAYERS = ("lm_head", "lm_head")


def models() -> tuple[Any, Any, Any]:
    """Student, a copy of it, and teacher."""
    student = tiny_model("llama").train()
    return student, copy.deepcopy(student), tiny_model("llama", seed=1, hidden_size=64).train()


def converted(student: Any, teacher: Any, criterion: Any, balancer: Any = None) -> Any:
    config = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer}
    return mtd.convert(student, mode=[("kd_loss", config)])


def logits_of(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        theirs: Tensor = teacher.eval()(input_ids=IDS).logits
    ours: Tensor = student(input_ids=IDS).logits
    return ours, theirs


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model: Any, loss: Tensor, expected_model: Any, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    ours, theirs = gradients(model), gradients(expected_model)
    assert ours.keys() == theirs.keys() and "lm_head.weight" in ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_its_own_loss_of_a_token():
    """With the same temperature both have the factor T^2."""
    student, other, teacher = models()
    mine = DistillationLoss("forward_kl", temperature=2.0, scale_by_t2=True, reduction="none")
    its = mtd.LogitsDistillationLoss(temperature=2.0, reduction="none")
    losses = []
    for model, criterion in ((student, mine), (other, its)):
        distilled = converted(model, copy.deepcopy(teacher), {LAYERS: criterion})
        distilled(input_ids=IDS)
        losses.append(distilled.compute_kd_loss(loss_reduction_fn=lambda x: x[LABELS > 50].sum()))
    assert_same_training(student, losses[0], other, losses[1])
    assert losses[0] > 0


def test_its_reductions():
    """Its means divide by all entries, or by the sequences, where ours divides by the tokens."""
    logits = torch.randn(2, B, L, VOCABULARY, generator=torch.Generator().manual_seed(0))
    ours = forward_kl(*logits)
    its = [mtd.LogitsDistillationLoss(reduction=name)(*logits) for name in ("mean", "batchmean")]
    torch.testing.assert_close(its[0], ours / VOCABULARY)
    torch.testing.assert_close(its[1], ours * L)


@pytest.mark.parametrize("num_items", [None, 31])
def test_labels_shift_and_count(num_items):
    """`compute_kd_loss` passes what the call of a criterion takes."""
    student, other, teacher = models()
    model = converted(student, copy.deepcopy(teacher), {LAYERS: AdaptiveKLLoss(mu=0.8, shift=1)})
    model(input_ids=IDS)
    loss = model.compute_kd_loss(labels=LABELS, num_items=num_items)
    expected = adaptive_kl(*logits_of(other, teacher), LABELS, mu=0.8, shift=1, num_items=num_items)
    assert_same_training(model, loss, other, expected)


def test_a_step_with_the_loss_of_the_labels():
    student, other, teacher = models()
    balancer = mtd.StaticLossBalancer(kd_loss_weight=0.7)
    criterion = {LAYERS: AdaptiveKLLoss(shift=1)}
    model = converted(student, copy.deepcopy(teacher), criterion, balancer)
    output = model(input_ids=IDS, labels=LABELS)
    loss = model.compute_kd_loss(student_loss=output.loss, labels=LABELS)
    kd = adaptive_kl(*logits_of(other, teacher), LABELS, shift=1)
    cross_entropy = other(input_ids=IDS, labels=LABELS).loss
    assert_same_training(model, loss, other, 0.7 * kd + 0.3 * cross_entropy)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    exported = mtd.export(model)
    state = other.state_dict()
    for name, value in exported.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)


def test_the_code_of_the_document():
    document = Path(__file__).parents[2] / "docs" / "frameworks.md"
    code, _ = re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), flags=re.DOTALL)
    student, other, teacher = models()
    names: dict[str, Any] = {
        "AdaptiveKLLoss": AdaptiveKLLoss,
        "mtd": mtd,
        "student": student,
        "teacher": copy.deepcopy(teacher),
        "batch": {"input_ids": IDS, "labels": LABELS},
    }
    exec(code, names)
    expected = adaptive_kl(*logits_of(other, teacher), LABELS, shift=1)
    torch.testing.assert_close(names["loss"], expected)
    assert "lm_head.weight" in gradients(names["model"])
