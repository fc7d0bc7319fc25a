"""akl_triton.extras compared with its formulas in float64, and its errors."""

from __future__ import annotations

import doctest
import functools
import math
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import akl_triton
from akl_triton import extras
from akl_triton.extras import dpkd, dpkd_loss, kl_regularised_policy_loss, policy, sinkd, sinkd_loss
from akl_triton.reference import reference_adaptive_kl

NAN = math.nan


def random(
    *shape: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradients(loss: Tensor, *inputs: Tensor, seed: int = 7) -> list[Tensor]:
    """The gradients under a random upstream gradient."""
    upstream = random(*loss.shape, seed=seed).to(loss.dtype)
    return list(torch.autograd.grad(loss, inputs, upstream))


# The Sinkhorn distance


def sinkhorn(
    student: Tensor, teacher: Tensor, temperature: float, epsilon: float, iterations: int
) -> Tensor:
    """The distance [N] in float64, from the plan itself and with the cost written out."""
    q = torch.softmax(student.double() / temperature, dim=-1)
    p = torch.softmax(teacher.double() / temperature, dim=-1)
    cost = (q[:, None, :] - p[None, :, :]).abs().sum(-1)
    plan = torch.exp(-cost / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan / plan.sum(dim=0, keepdim=True)
    return (plan * cost).sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbers", [(2.0, 0.1, 20), (1.0, 0.05, 1), (0.7, 1.0, 3)], ids=str)
def test_sinkd_is_the_oracle(numbers: tuple[float, float, int], dtype: torch.dtype) -> None:
    student = random(13, 37, seed=0, dtype=dtype).requires_grad_()
    teacher = random(13, 37, seed=1, dtype=dtype)
    temperature, epsilon, iterations = numbers
    loss = sinkd_loss(
        student,
        teacher,
        temperature=temperature,
        epsilon=epsilon,
        iterations=iterations,
        reduction="none",
    )
    oracle = sinkhorn(student, teacher, *numbers)
    # The fp32 rounding of a cost of up to 2 is divided by epsilon before it is exponentiated.
    rounding = 1e-6 + 8 * 2**-23 / epsilon
    assert (loss - oracle).abs().max() <= rounding * oracle.max()
    (grad,), (exact,) = gradients(loss, student), gradients(oracle, student)
    exact_size, of_dtype = exact.abs().max(), torch.finfo(dtype).eps
    assert (grad.double() - exact).abs().max() <= (rounding + of_dtype) * exact_size
    assert exact_size > 0.05


def test_sinkd_takes_rows_of_the_cost_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = random(11, 19, seed=0).requires_grad_(), random(11, 19, seed=1)
    whole = sinkd_loss(student, teacher)
    (grad,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(sinkd, "BUFFER", 3 * teacher.numel())
    parts = sinkd_loss(student, teacher)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, student)[0], grad)


def test_sinkd_does_not_underflow() -> None:
    """exp(-2 / 1e-3) is 0 in fp32, and in float64."""
    student = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 40.0], [0.0, 0.0, 40.0]])
    loss = sinkd_loss(student, teacher, temperature=1.0, epsilon=1e-3)
    assert loss.item() == pytest.approx(2.0)
    assert gradients(loss, student)[0].isfinite().all()


def test_sinkd_of_tokens_that_count() -> None:
    """The plan depends on the valid tokens alone; the others may hold anything."""
    student, teacher = random(2, 5, 17, seed=0), random(2, 5, 17, seed=1)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    student[~mask], teacher[~mask] = NAN, math.inf
    student.requires_grad_()
    loss = sinkd_loss(student, teacher, mask=mask, reduction="none")
    expected = sinkd_loss(student[mask], teacher[mask], reduction="none")
    torch.testing.assert_close(loss[mask], expected)
    assert (loss[~mask] == 0).all()
    (grad,) = gradients(loss, student)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).all()
    mean = sinkd_loss(student, teacher, mask=mask)
    torch.testing.assert_close(mean, expected.mean())
    total = sinkd_loss(student, teacher, mask=mask, reduction="sum")
    torch.testing.assert_close(total, expected.sum())


def test_sinkd_of_no_token_is_0_with_a_graph() -> None:
    student = random(3, 5, seed=0).requires_grad_()
    loss = sinkd_loss(student, random(3, 5, seed=1), mask=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and (student.grad == 0).all()  # type: ignore[union-attr]


def test_sinkd_of_unlike_vocabularies() -> None:
    student, teacher = random(6, 9, seed=0), random(6, 12, seed=1)
    padded = torch.cat([student, torch.full((6, 3), -math.inf)], dim=1)
    torch.testing.assert_close(sinkd_loss(student, teacher), sinkd_loss(padded, teacher))
    torch.testing.assert_close(sinkd_loss(teacher, student), sinkd_loss(teacher, padded))


# Direct preference


def logps(*shape: int, seed: int) -> Tensor:
    return -random(*shape, seed=seed).abs()


@pytest.mark.parametrize("length_normalised", [False, True])
def test_dpkd_is_the_oracle(length_normalised: bool) -> None:
    """Each pair is computed by itself, with the closed-form gradient."""
    pairs, long, short, beta = 5, 7, 4, 0.3
    chosen, rejected = logps(pairs, long, seed=0), logps(pairs, short, seed=1)
    teacher_chosen, teacher_rejected = logps(pairs, long, seed=2), logps(pairs, short, seed=3)
    chosen_mask = torch.arange(long) < torch.tensor([[7], [3], [1], [5], [2]])
    rejected_mask = torch.arange(short) >= torch.tensor([[0], [1], [3], [2], [0]])
    for values, mask in ((chosen, chosen_mask), (teacher_chosen, chosen_mask)):
        values[~mask] = NAN
    rejected[~rejected_mask] = -math.inf
    teacher_rejected[~rejected_mask] = -math.inf
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = dpkd_loss(
        chosen,
        rejected,
        teacher_chosen,
        teacher_rejected,
        beta=beta,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
        length_normalised=length_normalised,
        reduction="none",
    )
    upstream = random(pairs, seed=9)
    grads = torch.autograd.grad(loss, (chosen, rejected), upstream)
    for pair in range(pairs):
        rewards, rates = [], []
        for student, teacher, mask in (
            (chosen, teacher_chosen, chosen_mask),
            (rejected, teacher_rejected, rejected_mask),
        ):
            kept = mask[pair]
            rate = beta / int(kept.sum()) if length_normalised else beta
            ratio = student.detach()[pair, kept].double() - teacher[pair, kept].double()
            rewards.append(rate * ratio.sum().item())
            rates.append(rate)
        margin = rewards[0] - rewards[1]
        assert loss[pair].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
        slope = -upstream[pair].item() / (1.0 + math.exp(margin))
        for grad, mask, rate in zip(
            grads, (chosen_mask, rejected_mask), (rates[0], -rates[1]), strict=True
        ):
            assert (grad[pair, ~mask[pair]] == 0).all()
            for value in grad[pair, mask[pair]].tolist():
                assert value == pytest.approx(slope * rate, rel=1e-4)


def test_dpkd_is_the_loss_of_the_authors_script_for_one_token_a_position() -> None:
    """The likeliest token of the teacher and of the student: dpkd/main.py, get_distil_loss."""
    student, teacher = (random(3, 5, 11, seed=seed).log_softmax(-1) for seed in (0, 1))
    y_t, y_s = teacher.argmax(-1, keepdim=True), student.argmax(-1, keepdim=True)
    of_student = (student.gather(-1, y_t) - student.gather(-1, y_s)).squeeze(-1)
    of_teacher = (teacher.gather(-1, y_t) - teacher.gather(-1, y_s)).squeeze(-1)
    expected = -torch.log(torch.sigmoid(0.4 * (of_student - of_teacher)))
    loss = dpkd_loss(
        student.gather(-1, y_t),
        student.gather(-1, y_s),
        teacher.gather(-1, y_t),
        teacher.gather(-1, y_s),
        beta=0.4,
        reduction="none",
    )
    torch.testing.assert_close(loss, expected)


def test_dpkd_counts_whole_pairs() -> None:
    values = [logps(3, 4, seed=seed) for seed in range(4)]
    mask = torch.ones(3, 4, dtype=torch.bool)
    empty = mask.clone()
    empty[1] = False
    options: dict[str, Any] = dict(chosen_mask=mask, rejected_mask=empty)
    loss = dpkd_loss(*values, **options, reduction="none")
    assert loss[1] == 0 and (loss[[0, 2]] > 0).all()
    torch.testing.assert_close(dpkd_loss(*values, **options), loss.sum() / 2)
    torch.testing.assert_close(dpkd_loss(*values, **options, reduction="sum"), loss.sum())


# The policy gradient


@pytest.mark.parametrize(("penalty", "weight"), [("forward_kl", 1.0), ("reverse_kl", 0.0)])
def test_policy_loss_is_the_oracle(penalty: Any, weight: float) -> None:
    shape, coefficient = (2, 6, 23), 0.3
    student, reference = random(*shape, seed=0).requires_grad_(), random(*shape, seed=1)
    sampled = torch.arange(12).view(2, 6)
    advantages = random(2, 6, seed=2)
    mask = torch.arange(6).expand(2, 6) >= 2
    log_probs = student.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
    inputs = (log_probs, advantages, student, reference)
    options: dict[str, Any] = dict(coefficient=coefficient, penalty=penalty, mask=mask)
    loss, stats = kl_regularised_policy_loss(
        *inputs, **options, reduction="none", return_stats=True
    )

    rows = student.detach().flatten(0, 1)
    oracle = reference_adaptive_kl(rows, reference.flatten(0, 1), weight=weight)
    pi = torch.softmax(rows.double(), dim=-1)
    counted, flat = mask.flatten(), advantages.flatten().double()
    policy_loss = -flat * pi.gather(1, sampled.view(-1, 1))[:, 0].log() * counted
    divergence = oracle.loss * counted
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, check_dtype=False)
    close(loss.flatten(), policy_loss + coefficient * divergence)
    close(stats.policy_loss.flatten(), policy_loss)
    close(stats.penalty.flatten(), divergence)
    assert not stats.penalty.requires_grad and not stats.policy_loss.requires_grad
    close(
        kl_regularised_policy_loss(*inputs, **options),
        (policy_loss + coefficient * divergence).sum() / counted.sum(),
    )

    upstream = random(2, 6, seed=7)
    (grad,) = torch.autograd.grad(loss, student, upstream)
    chosen = torch.nn.functional.one_hot(sampled.flatten(), shape[-1])
    expected = flat[:, None] * (pi - chosen) + coefficient * oracle.grad
    close(grad.flatten(0, 1), expected * (counted * upstream.flatten())[:, None])


def test_policy_loss_ignores_what_does_not_count() -> None:
    student, reference = random(4, 9, seed=0), random(4, 9, seed=1)
    log_probs, advantages = logps(4, seed=2), random(4, seed=3)
    mask = torch.tensor([True, False, True, False])
    for values in (student, reference, log_probs, advantages):
        values[~mask] = NAN
    log_probs.requires_grad_(), student.requires_grad_()
    loss = kl_regularised_policy_loss(
        log_probs, advantages, student, reference, coefficient=0.5, mask=mask, reduction="none"
    )
    assert (loss[~mask] == 0).all()
    for grad in gradients(loss, log_probs, student):
        assert (grad[~mask] == 0).all() and grad.isfinite().all() and (grad[mask] != 0).any()


def test_policy_loss_takes_any_divergence() -> None:
    student, reference = random(4, 9, seed=0).requires_grad_(), random(4, 9, seed=1)
    log_probs, advantages = logps(4, seed=2), random(4, seed=3)
    adaptive = functools.partial(akl_triton.adaptive_kl, mu=0.8, reduction="none")
    loss = kl_regularised_policy_loss(
        log_probs, advantages, student, reference, coefficient=0.5, penalty=adaptive
    )
    expected = (-advantages * log_probs + 0.5 * adaptive(student, reference)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, student), gradients(expected, student))


# Errors

LOGITS = {"student_logits": torch.zeros(2, 5), "teacher_logits": torch.zeros(2, 5)}
LOGPS = {
    f"{side}_{output}_logps": torch.zeros(2, length)
    for side in ("student", "teacher")
    for output, length in (("chosen", 4), ("rejected", 3))
}
POLICY = {
    "log_probs": torch.zeros(2),
    "advantages": torch.zeros(2),
    "student_logits": torch.zeros(2, 5),
    "reference_logits": torch.zeros(2, 5),
    "coefficient": 0.1,
}
BAD: list[tuple[Callable[..., Any], dict[str, Any], str, Any, str]] = [
    (sinkd_loss, LOGITS, "teacher_logits", torch.zeros(3, 5), r"leading dimensions .* \[2\], got"),
    (sinkd_loss, LOGITS, "teacher_logits", torch.zeros(2, 5, requires_grad=True), "detach"),
    (sinkd_loss, LOGITS, "student_logits", torch.zeros(2, 5).int(), "got .*int32"),
    (sinkd_loss, LOGITS, "mask", torch.ones(2), r"expected a bool tensor, .*, got \[2\] float32"),
    (sinkd_loss, LOGITS, "mask", torch.ones(3).bool(), r"expected the shape of .*\[2\], got \[3\]"),
    (sinkd_loss, LOGITS, "temperature", 0.0, "expected a finite number in .0, inf., got 0.0"),
    (sinkd_loss, LOGITS, "epsilon", -1.0, "got -1.0"),
    (sinkd_loss, LOGITS, "iterations", 0, "expected an integer >= 1, got 0"),
    (sinkd_loss, LOGITS, "iterations", 2.5, "expected an int, got float"),
    (sinkd_loss, LOGITS, "reduction", "batchmean", "expected one of .*, got 'batchmean'"),
    (dpkd_loss, LOGPS, "teacher_chosen_logps", torch.zeros(2, 3), r"student_chosen.*\[2, 4\], got"),
    (dpkd_loss, LOGPS, "teacher_chosen_logps", torch.zeros(2, 4, requires_grad=True), "detach"),
    (dpkd_loss, LOGPS, "student_chosen_logps", torch.zeros(2, 4).long(), "floating-point.*int64"),
    (dpkd_loss, LOGPS, "student_chosen_logps", torch.tensor(0.0), r"expected \[..., L\]"),
    (dpkd_loss, LOGPS, "student_rejected_logps", [0.0], "expected a torch.Tensor, got list"),
    (dpkd_loss, LOGPS, "beta", 0.0, "got 0.0"),
    (dpkd_loss, LOGPS, "chosen_mask", torch.ones(2, 3).bool(), "student_chosen_logps"),
    (dpkd_loss, LOGPS, "rejected_mask", torch.ones(2, 3), "labels != -100"),
    (dpkd_loss, LOGPS, "length_normalised", 1, "expected True or False, got int"),
    (kl_regularised_policy_loss, POLICY, "advantages", torch.zeros(3), r"log_probs, \[2\], got"),
    (kl_regularised_policy_loss, POLICY, "advantages", torch.zeros(2).requires_grad_(), "detach"),
    (kl_regularised_policy_loss, POLICY, "student_logits", torch.zeros(2), r"\[2, 'V'\]"),
    (kl_regularised_policy_loss, POLICY, "student_logits", torch.zeros(2, 5).double(), "float64"),
    (kl_regularised_policy_loss, POLICY, "reference_logits", torch.zeros(3, 5), r"got \[3, 5\]"),
    (kl_regularised_policy_loss, POLICY, "coefficient", -0.1, "expected a number >= 0, got -0.1"),
    (kl_regularised_policy_loss, POLICY, "penalty", "kl", "'forward_kl', 'reverse_kl', got 'kl'"),
    (kl_regularised_policy_loss, POLICY, "penalty", akl_triton.reverse_kl, 'reduction="none"'),
    (kl_regularised_policy_loss, POLICY, "mask", torch.ones(2), "expected a bool tensor"),
]


@pytest.mark.parametrize(("function", "good", "name", "value", "message"), BAD)
def test_errors_name_the_argument(
    function: Callable[..., Any], good: dict[str, Any], name: str, value: Any, message: str
) -> None:
    function(**good)
    with pytest.raises((ValueError, TypeError), match=f"^{name}: .*{message}"):
        function(**{**good, name: value})


def test_pairs_have_the_same_prompts() -> None:
    shapes: dict[str, Any] = {**LOGPS, "student_rejected_logps": torch.zeros(3, 3)}
    shapes["teacher_rejected_logps"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"^student_rejected_logps: .*leading.*\[2\].*\[3, 3\]"):
        dpkd_loss(**shapes)


# The package


def test_the_package_does_not_import_them() -> None:
    code = "import sys, akl_triton; print([m for m in sys.modules if 'extras' in m])"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [sinkd, dpkd, policy], ids=lambda module: module.__name__)
def test_examples_of_docstrings(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("name", [n for n in extras.__all__ if n.endswith("_loss")])
def test_docstrings_have_their_headings(name: str) -> None:
    text = getattr(extras, name).__doc__
    for heading in ("Math", "Args", "Shape", "Dtype", "Raises", "Reference", "Example"):
        assert f"{heading}:" in text
    assert "needs no kernel" in text
