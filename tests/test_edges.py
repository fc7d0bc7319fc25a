"""Batches with nothing to learn from: empty, of one token, all ignored, or with num_items of 0. The
loss is 0 with a live graph, or that of the valid tokens; it is never NaN, nor is there an error.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import adaptive_kl, linear_adaptive_kl

V, H = 200, 4
IGNORED = -100
SHAPES = [(0,), (1,), (2, 0), (0, 3), (2, 1), (1, 1), (2, 3), (0, 2, 2)]
COUNTS: dict[str, Any] = {
    "of the batch": None,
    "int": 7,
    "0": 0,
    "float": 2.5,
    "tensor": torch.tensor(7),
    "tensor 0": torch.tensor(0),
    "float tensor 0": torch.tensor(0.0),
}


def tensors(shape: tuple[int, ...], width: int, seed: int) -> Tensor:
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))


def loss_of(form: str, shape: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient of its sum)"""
    backend = options.pop("backend", "torch")
    if form == "linear":
        student, teacher = (tensors(shape, H, i).requires_grad_(i == 0) for i in range(2))
        weight, teacher_weight = (tensors((V,), H, i) for i in (2, 3))
        loss = linear_adaptive_kl(
            student, weight, teacher, teacher_weight, backend=backend, **options
        )
    else:
        student, teacher = (tensors(shape, V, i).requires_grad_(i == 0) for i in range(2))
        inplace = form == "in place"
        loss = adaptive_kl(student * 1, teacher, inplace=inplace, backend=backend, **options)
    assert loss.requires_grad
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def expected_count(labels: Tensor | None, shape: tuple[int, ...], shift: int) -> int:
    if labels is None:
        return int(torch.Size(shape).numel())
    return int((labels[..., shift:] != IGNORED).sum())


@pytest.mark.parametrize("form", ["logits", "in place", "linear"])
@pytest.mark.parametrize(
    ("labelled", "shift"),
    # A shift needs labels.
    [("no labels", 0), *itertools.product(("some", "all ignored"), (0, 1, 2, 5))],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reductions_of_edges(shape, labelled, shift, form):
    labels = None
    if labelled != "no labels":
        labels = torch.zeros(shape, dtype=torch.long)
        labels[..., -1:] = IGNORED
        if labelled == "all ignored":
            labels[:] = IGNORED
    options = {"labels": labels, "shift": shift}
    count = expected_count(labels, shape, shift)

    per_token, d_none = loss_of(form, shape, reduction="none", **options)
    total, d_sum = loss_of(form, shape, reduction="sum", **options)
    mean, d_mean = loss_of(form, shape, **options)
    assert per_token.shape == shape
    assert int((per_token != 0).sum()) == count
    torch.testing.assert_close(total, per_token.sum())
    torch.testing.assert_close(mean, total / max(count, 1))
    torch.testing.assert_close(d_sum, d_none)
    torch.testing.assert_close(d_mean, d_sum / max(count, 1))
    assert mean.isfinite() and d_mean.isfinite().all()
    assert (count > 0) == bool(d_sum.abs().sum() > 0)


@pytest.mark.parametrize("form", ["logits", "in place", "linear"])
@pytest.mark.parametrize("num_items", COUNTS)
@pytest.mark.parametrize("all_ignored", [False, True])
def test_num_items_of_any_kind(all_ignored, num_items, form):
    labels = torch.tensor([[1, 2, IGNORED], [3, IGNORED, 4]])
    if all_ignored:
        labels[:] = IGNORED
    total, d_sum = loss_of(form, (2, 3), labels=labels, reduction="sum")
    loss, gradient = loss_of(form, (2, 3), labels=labels, num_items=COUNTS[num_items])
    given = COUNTS[num_items]
    count = float((labels != IGNORED).sum()) if given is None else float(given)
    torch.testing.assert_close(loss, total / (count or 1.0))
    torch.testing.assert_close(gradient, d_sum / (count or 1.0))
    if all_ignored:
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("form", ["logits", "in place", "linear"])
def test_a_sequence_of_one_token_has_no_next_one(form, backend):
    """Both backends give exactly 0, with a graph that gives exactly 0."""
    labels = torch.zeros(2, 1, dtype=torch.long)
    loss, gradient = loss_of(form, (2, 1), labels=labels, shift=1, backend=backend)
    assert loss == 0 and not gradient.any()
