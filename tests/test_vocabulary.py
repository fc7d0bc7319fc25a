"""vocab_size: the tokens of a vocabulary whose logits are padded, at every door."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import (
    AdaptiveKL,
    Divergence,
    JensenShannon,
    SparseTeacher,
    adaptive_kl,
    distillation_loss,
    linear_distillation_loss,
    teacher_pairs,
)
from akl_triton.cli.bench import peak_memory
from akl_triton.integrations import check_vocabularies

N, TOKENS, V_S, V_T = 5, 200, 208, 224


def padded(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of student [N, V_S] and teacher [N, V_T], whose padding must not be looked at."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(N, V_S, generator=g), torch.randn(N, V_T, generator=g)
    student[:, TOKENS:], teacher[:, TOKENS:] = 50.0, torch.nan
    return student, teacher


def loss_and_gradient(student: Tensor, teacher: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(
        leaf * 1 if options.get("inplace") else leaf, teacher, reduction="none", **options
    )
    (loss * torch.arange(1.0, N + 1)).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("divergence", [AdaptiveKL(), JensenShannon()], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_padding_has_no_probability_and_no_gradient(
    divergence: Divergence, inplace: bool, pairs: bool
) -> None:
    student, teacher = padded()
    of_tokens: Tensor | SparseTeacher = teacher[:, :TOKENS]
    given: Tensor | SparseTeacher = teacher
    if pairs:
        given = of_tokens = teacher_pairs(teacher[:, :TOKENS], 8)
    options: dict[str, Any] = {
        "labels": torch.arange(N),
        "kd_ratio": 0.5,
        "divergence": divergence,
        "inplace": inplace,
    }
    loss, gradient = loss_and_gradient(student, given, vocab_size=TOKENS, **options)
    expected, of_part = loss_and_gradient(student[:, :TOKENS].contiguous(), of_tokens, **options)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient[:, :TOKENS], of_part)
    assert torch.equal(gradient[:, TOKENS:], torch.zeros(N, V_S - TOKENS))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states(reduction: Any) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 16, generator=g)
    student, teacher = torch.randn(V_S, 16, generator=g), torch.randn(V_T, 16, generator=g)
    student[TOKENS:] *= 9.0
    results = []
    whole: dict[str, Any] = {"vocab_size": TOKENS}
    for rows, options in ((slice(None), whole), (slice(TOKENS), {})):
        leaves = hidden.clone().requires_grad_(), student.clone().requires_grad_()
        loss = linear_distillation_loss(
            leaves[0], leaves[1][rows], hidden, teacher[rows], reduction=reduction, **options
        )
        loss.sum().backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*results)
    weight_gradient = results[0][2]
    assert weight_gradient is not None and not weight_gradient[TOKENS:].any()


def test_nothing_is_copied() -> None:
    """Gradient and statistics alone, where the gradient of a slice is made twice."""
    student = torch.randn(64, 40_000, requires_grad=True)
    teacher = torch.randn(64, 40_000)

    def step(**options: Any) -> int:
        def call() -> None:
            torch.autograd.grad(adaptive_kl(student, teacher, **options), student)

        return peak_memory(call, student.device)

    assert step(vocab_size=39_990) < 1.02 * step()


@pytest.mark.parametrize("vocab_size", [0, -3, V_S + 1])
def test_sizes_that_are_refused(vocab_size: int) -> None:
    student, teacher = padded()
    message = f"vocab_size: expected an integer from 1 to {V_S}, of {V_S} of student_logits, {V_T}"
    with pytest.raises(ValueError, match=message):
        adaptive_kl(student, teacher, vocab_size=vocab_size)
    with pytest.raises(ValueError, match="vocab_size: expected an integer from 1 to 208"):
        linear_distillation_loss(
            student, torch.eye(V_S), teacher, torch.eye(V_T), vocab_size=vocab_size
        )


def test_a_label_in_the_padding_is_no_token() -> None:
    student, teacher = padded()
    with pytest.raises(ValueError, match=f"tokens from 0 to {TOKENS - 1}"):
        adaptive_kl(student, teacher, torch.full((N,), TOKENS), kd_ratio=0.5, vocab_size=TOKENS)


def test_models_with_unlike_padding_have_the_same_vocabulary() -> None:
    with pytest.raises(ValueError, match="if these are padding, pass vocab_size"):
        check_vocabularies(V_S, V_T)
    check_vocabularies(V_S, V_T, vocab_size=TOKENS)
