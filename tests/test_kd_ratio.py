"""kd_ratio: the weighted sum with the cross-entropy of the labels, at both doors and backends. It
is compared with the loss that a training loop would write down, in float64 and by autograd.
tests/test_family.py has every member and every kind of row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from akl_triton import (
    AdaptiveKLLoss,
    LinearDistillationLoss,
    distillation_loss,
    forward_kl,
    linear_distillation_loss,
)
from akl_triton.options import Backend
from akl_triton.reference import reference_cross_entropy

V, H = 300, 6
SHAPE = (2, 5)
IGNORED = -100
LABELS = (torch.arange(10) * 31 % V).view(SHAPE)
LABELS[0, 3] = LABELS[1, 1] = IGNORED


def sides(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weights of student and teacher, whose logits have a deviation of about
    3."""
    g = torch.Generator().manual_seed(seed)
    shapes = (*SHAPE, H), (V, H), (*SHAPE, H), (V, H)
    return tuple(1.1 * torch.randn(shape, generator=g) for shape in shapes)  # type: ignore[return-value]


def written_down(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    kd_ratio: float,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale_by_t2: bool = False,
) -> Tensor:
    """The mean over the tokens of kd_ratio KL(teacher || student) + (1 - kd_ratio)
    cross-entropy."""
    if softcap is not None:
        student = softcap * torch.tanh(student / softcap)
    log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if scale_by_t2:
        kl = kl * temperature**2
    counts = labels != IGNORED
    cross_entropy = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return kd_ratio * kl[counts].mean() + (1.0 - kd_ratio) * cross_entropy


SETTINGS: dict[str, dict[str, Any]] = {
    "half": {"kd_ratio": 0.5},
    "another temperature": {"kd_ratio": 0.2, "temperature": 2.5, "scale_by_t2": True},
    "softcap": {"kd_ratio": 0.7, "softcap": 4.0},
    "labels alone": {"kd_ratio": 0.0, "temperature": 2.5},
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_logits(setting: str, inplace: bool, backend: Backend, device: torch.device) -> None:
    options = dict(SETTINGS[setting])
    hidden, weight, teacher_hidden, teacher_weight = sides()
    leaf = (hidden @ weight.T).requires_grad_()
    teacher = teacher_hidden @ teacher_weight.T
    exact = written_down(leaf.double(), teacher.double(), LABELS, **options)
    (exact_gradient,) = torch.autograd.grad(exact, leaf)

    softcap = options.pop("softcap", None)
    student = leaf.detach().to(device).requires_grad_()
    loss = distillation_loss(
        1.0 * student,
        teacher.to(device),
        LABELS.to(device),
        divergence="forward_kl",
        student_softcap=softcap,
        inplace=inplace,
        backend=backend,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.cpu(), exact_gradient, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("setting", ["half", "another temperature"])
def test_hidden_states(setting: str, backend: Backend, device: torch.device) -> None:
    """Some tokens of each chunk are ignored; the labels stay with their rows."""
    tensors = [x.to(device).requires_grad_(i < 2) for i, x in enumerate(sides())]
    hidden, weight, teacher_hidden, teacher_weight = (x.double() for x in tensors)
    teacher = (teacher_hidden @ teacher_weight.T).cpu()
    exact = written_down((hidden @ weight.T).cpu(), teacher, LABELS, **SETTINGS[setting])
    expected = torch.autograd.grad(exact, tensors[:2])
    loss = linear_distillation_loss(
        *(tensors[0], tensors[1], tensors[2], tensors[3]),
        LABELS.to(device),
        divergence="forward_kl",
        chunk_bytes=3 * 8 * V,
        backend=backend,
        **SETTINGS[setting],
    )
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, tensors[:2]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def test_a_label_that_is_no_token_makes_its_row_nan_alone(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a path that looks at no value, as on a GPU, the other rows are as with good labels."""
    monkeypatch.setattr("akl_triton.checks.check_targets", lambda *_: None)
    student = torch.randn(4, V, generator=torch.Generator().manual_seed(1)).to(device)
    teacher = torch.randn(4, V, generator=torch.Generator().manual_seed(2)).to(device)
    good = torch.tensor([0, 1, 2, V - 1], device=device)
    results = []
    for labels in (good, torch.tensor([0, -1, V, V - 1], device=device)):
        for inplace in (False, True):
            leaf = student.clone().requires_grad_()
            loss = distillation_loss(
                1.0 * leaf,
                teacher,
                labels,
                kd_ratio=0.5,
                reduction="none",
                inplace=inplace,
                backend=backend,
            )
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for of_good, of_bad in zip(results[:2], results[2:], strict=True):
        for right, ours in zip(of_good, of_bad, strict=True):
            assert ours[1:3].isnan().all()
            assert torch.equal(ours[0], right[0]) and torch.equal(ours[3], right[3])


def test_the_cross_entropy_is_a_statistic(backend: Backend, device: torch.device) -> None:
    student = torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(3)).to(device)
    labels = LABELS.to(device)
    _, stats = forward_kl(
        student,
        student,
        labels,
        kd_ratio=0.5,
        temperature=3.0,
        return_stats=True,
        backend=backend,
    )
    of_tokens = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(stats.cross_entropy.flatten(), of_tokens)
    _, stats = forward_kl(student, student, labels, return_stats=True, backend=backend)
    assert stats.cross_entropy[labels != IGNORED].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shift_and_mask(dtype: torch.dtype) -> None:
    """The cross-entropy is that of the tokens that follow."""
    student, teacher = torch.randn(2, *SHAPE, V, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(10).view(SHAPE) % 3 != 0
    shifted = F.pad(LABELS.masked_fill(~mask, IGNORED), (0, 1), value=IGNORED)[:, 1:]
    loss = forward_kl(student, teacher, LABELS.to(dtype), mask=mask, shift=1, kd_ratio=0.3)
    exact = written_down(student.double(), teacher.double(), shifted, 0.3)
    torch.testing.assert_close(loss.double(), exact)


def test_gradients_in_fp16_survive_a_loss_scale() -> None:
    """A gradient that is written in place, before the scale is known, neither overflows nor
    vanishes."""
    g = torch.Generator().manual_seed(5)
    student, teacher = (4.0 * torch.randn(8, 2000, generator=g)).half(), torch.zeros(8, 2000).half()
    labels = torch.arange(8)
    exact = reference_cross_entropy(student, labels).grad / 8
    leaf = student.clone().requires_grad_()
    loss = forward_kl(1.0 * leaf, teacher, labels, kd_ratio=0.0, inplace=True)
    (gradient,) = torch.autograd.grad(loss * 2.0**10, leaf)
    error = (gradient.double() / 2.0**10 - exact).norm() / exact.norm()
    assert gradient.isfinite().all() and error < 1e-3


def test_modules() -> None:
    hidden, weight, teacher_hidden, teacher_weight = sides()
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    expected = distillation_loss(student, teacher, LABELS, kd_ratio=0.4)
    torch.testing.assert_close(AdaptiveKLLoss(kd_ratio=0.4)(student, teacher, LABELS), expected)
    linear = LinearDistillationLoss(kd_ratio=0.4)
    loss = linear(hidden, weight, teacher_hidden, teacher_weight, LABELS)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kd_ratio", [-0.1, 1.1, float("nan")])
def test_the_ratio_is_between_0_and_1(kd_ratio: float) -> None:
    with pytest.raises(ValueError, match=r"^kd_ratio: expected a finite number in \[0, 1\]"):
        AdaptiveKLLoss(kd_ratio=kd_ratio)


def test_without_labels_there_is_no_cross_entropy() -> None:
    student = torch.zeros(2, V)
    with pytest.raises(ValueError, match=r"^kd_ratio: expected 1 without labels, .*got 0\.5"):
        distillation_loss(student, student, mask=torch.ones(2).bool(), kd_ratio=0.5)


@pytest.mark.parametrize("label", [-1, V])
def test_labels_have_to_be_tokens_of_the_student(label: int) -> None:
    """Labels of tokens that are not valid may be anything."""
    student, teacher = torch.zeros(2, V), torch.zeros(2, V + 10)
    labels = torch.tensor([3, label])
    with pytest.raises(ValueError, match=rf"^labels: expected -100 or tokens from 0 .*got {label}"):
        distillation_loss(student, teacher, labels, kd_ratio=0.5)
    distillation_loss(student, teacher, labels)
    distillation_loss(student, teacher, labels, kd_ratio=0.5, mask=labels == 3)
