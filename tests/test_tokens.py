"""The valid tokens and their weights: labels, mask, token_weights and shift, at both doors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import DistillationLoss, adaptive_kl, distillation_loss, linear_distillation_loss
from tests.support.logits import generator

V, H = 40, 6
SHAPE = (2, 5)
IGNORED = -100


def of_tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, mask, token_weights), in which every combination of the three occurs."""
    labels = (
        torch.arange(10).view(SHAPE).masked_fill(torch.arange(10).view(SHAPE) % 4 == 1, IGNORED)
    )
    mask = torch.arange(10).view(SHAPE) % 3 != 0
    weights = torch.rand(SHAPE, generator=generator(seed)) + 0.1
    weights[0, 2], weights[1, 4] = 0.0, -2.0
    return labels, mask, weights


def evaluate(door: str, dtype: torch.dtype, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of all that is trained under a random upstream."""
    g = generator(1)
    if door == "logits":
        student = torch.randn(*SHAPE, V, generator=g).to(dtype).requires_grad_()
        teacher = torch.randn(*SHAPE, V, generator=g).to(dtype)
        loss = distillation_loss(2 * student, teacher, **options)
        trained = [student]
    else:
        hidden = torch.randn(*SHAPE, H, generator=g).to(dtype).requires_grad_()
        weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
        teacher = torch.randn(*SHAPE, H, generator=g).to(dtype)
        teacher_weight = torch.randn(V, H, generator=g).to(dtype)
        loss = linear_distillation_loss(
            hidden, weight, teacher, teacher_weight, chunk_bytes=2**10, **options
        )
        trained = [hidden, weight]
    upstream = torch.randn(loss.shape, generator=generator(2))
    return loss.detach(), list(torch.autograd.grad(loss, trained, upstream))


DOORS = ("logits", "hidden states")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("door", DOORS)
def test_a_mask_is_labels_that_are_ignored(door: str, shift: int) -> None:
    labels, mask, _ = of_tokens()
    both = labels.masked_fill(~mask, IGNORED)
    for given, as_labels in (
        ({"mask": mask}, torch.zeros_like(labels).masked_fill(~mask, IGNORED)),
        ({"mask": mask, "labels": labels}, both),
    ):
        loss, gradients = evaluate(door, torch.float32, shift=shift, **given)
        expected, of_expected = evaluate(door, torch.float32, shift=shift, labels=as_labels)
        assert torch.equal(loss, expected)
        assert all(map(torch.equal, gradients, of_expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "reduction, num_items", [("none", None), ("sum", None), ("mean", None), ("mean", 7.5)]
)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("door", [*DOORS, "in place"])
def test_weights_multiply_the_loss_of_a_token(
    door: str, shift: int, reduction: str, num_items: float | None, dtype: torch.dtype
) -> None:
    """The weights act as if the losses of the tokens were multiplied by hand, and then reduced."""
    labels, mask, weights = of_tokens()
    inplace = {"inplace": True} if door == "in place" else {}
    door = "logits" if inplace else door
    common: dict[str, Any] = {"labels": labels, "mask": mask, "shift": shift}
    loss, gradients = evaluate(
        door, dtype, reduction=reduction, num_items=num_items, token_weights=weights,
        **common, **inplace,
    )  # fmt: skip

    valid = torch.zeros(SHAPE, dtype=torch.bool)
    factor = torch.zeros(SHAPE)
    length = SHAPE[1] - shift
    valid[:, :length] = (labels != IGNORED)[:, shift:] & mask[:, shift:]
    factor[:, :length] = weights[:, shift:]
    if reduction == "mean":
        factor = factor / (num_items or valid.sum())
    upstream = torch.randn(
        SHAPE if reduction == "none" else (), generator=generator(2)
    )  # that of `evaluate`
    per_token, _ = evaluate(door, dtype, reduction="none", **common)
    expected = per_token * factor
    expected = expected if reduction == "none" else expected.sum()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)

    # The same gradients from the loss per token, whose upstream has the factor.
    with_factor = upstream * factor
    of_tokens_alone = []
    for row in range(valid.numel()):
        one = torch.zeros(SHAPE, dtype=torch.bool)
        one.view(-1)[row] = True
        if valid.view(-1)[row]:
            of_tokens_alone.append((one, with_factor.view(-1)[row]))
    total = [torch.zeros_like(x, dtype=torch.float64) for x in gradients]
    for one, scale in of_tokens_alone:
        alone_mask = torch.zeros(SHAPE, dtype=torch.bool)
        alone_mask[:, shift:] = one[:, :length] if shift else one
        _, alone = evaluate(door, torch.float32, reduction="sum", mask=alone_mask, shift=shift)
        up = torch.randn((), generator=generator(2))
        total = [t + x.double() * (scale / up).double() for t, x in zip(total, alone, strict=True)]
    eps = torch.finfo(dtype).eps
    for ours, exact in zip(gradients, total, strict=True):
        torch.testing.assert_close(
            ours.double(), exact, rtol=8 * eps, atol=16 * eps * exact.abs().max().item() + 1e-7
        )


def test_an_ignored_token_weighs_nothing_whatever_its_weight() -> None:
    labels, _, weights = of_tokens()
    weights[labels == IGNORED] = torch.nan
    for door in DOORS:
        loss, gradients = evaluate(door, torch.float32, labels=labels, token_weights=weights)
        assert loss.isfinite() and all(x.isfinite().all() for x in gradients)


def test_weights_without_labels_leave_the_end_of_a_shifted_sequence_out() -> None:
    weights = torch.ones(SHAPE)
    for door in DOORS:
        ours, _ = evaluate(door, torch.float32, token_weights=weights, shift=2)
        expected, _ = evaluate(
            door, torch.float32, labels=torch.zeros(SHAPE, dtype=torch.int64), shift=2
        )
        torch.testing.assert_close(ours, expected)


def test_compiled_in_one_graph() -> None:
    labels, mask, weights = of_tokens()
    student, teacher = torch.randn(2, *SHAPE, V, generator=generator(3))
    module = DistillationLoss("adaptive_kl", shift=1)

    def run(student: Tensor, teacher: Tensor) -> Any:
        return module(student, teacher, labels, mask=mask, token_weights=weights)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), run(student, teacher))


def test_means_of_statistics_are_over_the_tokens_that_count() -> None:
    labels, mask, _ = of_tokens()
    student, teacher = torch.randn(2, *SHAPE, V, generator=generator(3))
    valid = mask & (labels != IGNORED)
    loss, stats = adaptive_kl(student, teacher, labels, mask=mask, return_stats=True)
    means = stats.means(valid)
    for name, column in stats._asdict().items():
        torch.testing.assert_close(means[name], column[valid].mean(), equal_nan=True)
    w, forward, reverse = stats.forward_weight, stats.forward_kl, stats.reverse_kl
    torch.testing.assert_close((w * forward + (1 - w) * reverse)[valid].mean(), loss)
    nothing = stats.means(torch.zeros_like(valid))
    assert all(mean == 0 for mean in nothing.values())
