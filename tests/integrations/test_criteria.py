"""The losses for recipes are those of whole logits; tests of the frameworks show that they fit."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from akl_triton import AdaptiveKL, adaptive_kl, distillation_loss, divergence
from akl_triton.integrations import criteria
from akl_triton.integrations.criteria import AutoModelLoss, TorchtuneLoss

B, L, V = 2, 7, 24
GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = 3.0 * torch.randn(2, B, L, V, generator=GENERATOR)
LABELS = torch.randint(V, (B, L), generator=GENERATOR)
LABELS[0, 2:5] = LABELS[:, -1] = -100
NONE = torch.full_like(LABELS, -100)


def assert_same(ours: torch.Tensor, expected: torch.Tensor, *students: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    (ours_gradient,) = torch.autograd.grad(ours, students[:1])
    (gradient,) = torch.autograd.grad(expected, students[1:] or students)
    torch.testing.assert_close(ours_gradient, gradient)


@pytest.mark.parametrize("chunks", [1, 3, 7, 20])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adaptive_kl", {"mu": 0.8}),
        ("skew_kl", {"alpha": 0.2, "temperature": 2.0, "scale_by_t2": True}),
        ("reverse_kl", {"kd_ratio": 0.3}),
    ],
)
def test_chunks(chunks, name, options):
    student = STUDENT.clone().requires_grad_()
    loss_function = TorchtuneLoss(name, num_output_chunks=chunks, **options)
    cut = (x.chunk(chunks, dim=1) for x in (student, TEACHER))
    ours = loss_function(*cut, LABELS)
    fields = {key: options.pop(key) for key in ("mu", "alpha") if key in options}
    expected = distillation_loss(
        student, TEACHER, LABELS, divergence=divergence(name, **fields), **options
    )
    assert_same(ours, expected, student)


def test_chunks_without_a_token_have_a_loss_of_zero():
    student = STUDENT.clone().requires_grad_()
    loss = TorchtuneLoss(num_output_chunks=2)(student.chunk(2, 1), TEACHER.chunk(2, 1), NONE)
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("count", [None, 40, 1])
def test_labels_of_the_step(count):
    student = STUDENT.clone().requires_grad_()
    ours = AutoModelLoss("adaptive_kl", mu=0.8)(student, TEACHER, LABELS, num_batch_labels=count)
    assert_same(ours, adaptive_kl(student, TEACHER, LABELS, mu=0.8, num_items=count), student)


@pytest.mark.parametrize("kind", [TorchtuneLoss, AutoModelLoss])
def test_ignored_tokens(kind):
    """Both recipes read the number."""
    loss_function = kind(ignore_index=7)
    assert (loss_function.ignore_index, kind().ignore_index) == (7, -100)
    labels = LABELS.clone()
    labels[labels == -100] = 7
    cut = (lambda x: x.chunk(8, 1)) if kind is TorchtuneLoss else (lambda x: x)
    ours = loss_function(cut(STUDENT), cut(TEACHER), labels)
    torch.testing.assert_close(ours, adaptive_kl(STUDENT, TEACHER, labels, ignore_index=7))


def test_what_is_logged():
    assert (AutoModelLoss(temperature=2.0).temperature, AutoModelLoss().temperature) == (2.0, 1.0)
    assert AutoModelLoss("adaptive_kl", mu=0.8).divergence == AdaptiveKL(mu=0.8)


@pytest.mark.parametrize("kind", [TorchtuneLoss, AutoModelLoss])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "adaptive"}, "divergence: expected one of 'adaptive_kl'"),
        ({"divergence": "reverse_kl", "mu": 0.5}, "expected options among .*, got mu"),
        ({"mu": 2.0}, "mu: expected"),
        ({"temprature": 2.0}, "got temprature; did you mean temperature?"),
        ({"shift": 1}, "got shift"),
        ({"reduction": "sum"}, "got reduction"),
        ({"inplace": True}, "got inplace"),
        ({"return_stats": True}, "got return_stats"),
        ({"num_items": 3}, "got num_items"),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**options)


def test_bad_chunks():
    with pytest.raises(ValueError, match="num_output_chunks: expected an int >= 1, got 0"):
        TorchtuneLoss(num_output_chunks=0)
    loss_function = TorchtuneLoss(num_output_chunks=4)
    cut, other = STUDENT.chunk(4, 1), STUDENT.chunk(3, 1)
    with pytest.raises(ValueError, match=r"student_logits: expected 4 chunks, .* got .*Tensor"):
        loss_function(STUDENT, TEACHER, LABELS)
    with pytest.raises(ValueError, match=r"teacher_logits: expected 4 chunks, .* got 3 chunks"):
        loss_function(cut, other, LABELS)


@pytest.mark.parametrize(
    ("key", "section", "kind"),
    [("_component_", "kd_loss", TorchtuneLoss), ("_target_", "kd_loss_fn", AutoModelLoss)],
)
def test_the_configurations_of_the_document(key, section, kind):
    yaml = pytest.importorskip("yaml")
    document = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text("utf-8")
    (text,) = re.findall(rf"```yaml\n([^`]*{key}: akl_triton[^`]*)```", document)
    options = yaml.safe_load(text)[section]
    path, _, name = options.pop(key).rpartition(".")
    assert path == criteria.__name__ and getattr(criteria, name) is kind
    assert kind(**options).divergence == AdaptiveKL(mu=0.5)


def test_examples_of_docstrings() -> None:
    results: Any = doctest.testmod(criteria)
    assert results.attempted > 0
    assert results.failed == 0
