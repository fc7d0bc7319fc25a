"""The oracle of the divergence family: by hand, derivatives, identities and limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from akl_triton.reference import (
    DivergenceResult,
    reference_adaptive_kl,
    reference_cross_entropy,
    reference_divergence,
)

INF = math.inf
Numbers = dict[str, Any]
MEMBERS: list[tuple[str, Numbers]] = [
    ("jensen_shannon", {"beta": 0.5}),
    ("jensen_shannon", {"beta": 0.1}),
    ("skew_kl", {"alpha": 0.1}),
    ("skew_kl", {"alpha": 0.7}),
    ("skew_reverse_kl", {"alpha": 0.1, "detach": False}),
    ("skew_reverse_kl", {"alpha": 0.1, "detach": True}),
    ("skew_reverse_kl", {"alpha": 0.7, "detach": False}),
    ("total_variation", {}),
    ("alpha", {"a": 0.3}),
    ("alpha", {"a": 2.0}),
    ("alpha", {"a": -0.5}),
    ("alpha_beta", {"a": 0.2, "b": 0.7}),
    ("alpha_beta", {"a": 0.6, "b": 0.9}),
    ("alpha_beta", {"a": 1.5, "b": -0.5}),
    ("alpha_beta", {"a": -0.4, "b": 1.2}),
    ("alpha_beta", {"a": 0.4, "b": -0.9}),
    ("alpha_beta", {"a": -0.4, "b": -0.9}),
    ("todi", {}),
    ("jeffreys", {}),
]
every_member = pytest.mark.parametrize(("name", "numbers"), MEMBERS, ids=str)
# The limits at (p, 0) and at (0, q) as functions of the mass that is left; None: infinite.
Limit = Callable[[float, Numbers], float] | None
DROPPED: tuple[Limit, Limit] = (None, None)


def limits(name: str, numbers: Numbers) -> tuple[Limit, Limit]:
    """As in the table of the docstring, written for numbers."""

    def power(end: float, other: float) -> Limit:
        total = end + other
        return (lambda x, _: x**total / (end * total)) if end > 0 and total > 0 else None

    if name == "alpha":
        return power(1.0 - numbers["a"], numbers["a"]), power(numbers["a"], 1.0 - numbers["a"])
    if name == "alpha_beta":
        return power(numbers["b"], numbers["a"]), power(numbers["a"], numbers["b"])
    table: dict[str, tuple[Limit, Limit]] = {
        "jensen_shannon": (
            lambda p, n: -n["beta"] * p * math.log(n["beta"]),
            lambda q, n: -(1.0 - n["beta"]) * q * math.log(1.0 - n["beta"]),
        ),
        "skew_kl": (lambda p, n: -p * math.log(n["alpha"]), lambda q, n: 0.0),
        "skew_reverse_kl": (lambda p, n: 0.0, lambda q, n: -q * math.log(n["alpha"])),
        "total_variation": (lambda p, n: 0.5 * p, lambda q, n: 0.5 * q),
        "todi": DROPPED,
        "jeffreys": DROPPED,
    }
    return table[name]


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def forbid(logits: Tensor, tokens: list[int]) -> Tensor:
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.long), -INF)


def naive(log_p: Tensor, log_q: Tensor, name: str, n: Numbers) -> Tensor:
    """sum phi from finite ln p and ln q, for autograd, with what is constant detached."""
    p, q = log_p.exp(), log_q.exp()
    u = log_p - log_q
    if name == "jensen_shannon":
        m = n["beta"] * p + (1.0 - n["beta"]) * q
        phi = n["beta"] * p * (p / m).log() + (1.0 - n["beta"]) * q * (q / m).log()
    elif name == "skew_kl":
        phi = p * (p / (n["alpha"] * p + (1.0 - n["alpha"]) * q)).log()
    elif name == "skew_reverse_kl":
        m = (1.0 - n["alpha"]) * p + n["alpha"] * q
        phi = q * (q / (m.detach() if n["detach"] else m)).log()
    elif name == "total_variation":
        phi = (p - q).abs() / 2.0
    elif name == "alpha":
        a = n["a"]
        phi = (p**a * q ** (1.0 - a) - a * p - (1.0 - a) * q) / (a * (a - 1.0))
    elif name == "alpha_beta":
        a, b = n["a"], n["b"]
        phi = p ** (a + b) / (b * (a + b)) + q ** (a + b) / (a * (a + b)) - p**a * q**b / (a * b)
    elif name == "todi":
        v = torch.sigmoid(u).detach()
        phi = v * p * u - (1.0 - v) * q * u
    else:
        phi = p * u - q * u
    total: Tensor = phi.sum(-1)
    return total


class _ClosedForm(torch.autograd.Function):
    """The oracle's loss with the oracle's gradient as its derivative."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *arguments: Any) -> Tensor:
        teacher, name, options = arguments
        result = reference_divergence(student, teacher, name, **options)
        ctx.save_for_backward(result.grad)
        return result.loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return upstream[0][:, None] * grad, None, None, None


# (p, q) = (3/4, 1/2), (1/4, 1/2), and what each of the two entries adds.
BY_HAND: list[tuple[str, Numbers, tuple[float, float]]] = [
    (
        "jensen_shannon",
        {"beta": 0.5},  # m = 5/8, 3/8
        (
            0.375 * math.log(6 / 5) + 0.25 * math.log(4 / 5),
            0.125 * math.log(2 / 3) + 0.25 * math.log(4 / 3),
        ),
    ),
    ("skew_kl", {"alpha": 0.5}, (0.75 * math.log(6 / 5), 0.25 * math.log(2 / 3))),
    (
        "skew_reverse_kl",
        {"alpha": 0.2, "detach": False},  # m = 7/10, 3/10
        (0.5 * math.log(5 / 7), 0.5 * math.log(5 / 3)),
    ),
    ("total_variation", {}, (0.125, 0.125)),
    ("alpha", {"a": 2.0}, (0.0625, 0.0625)),
    ("alpha_beta", {"a": 1.0, "b": 2.0}, (7 / 384, 5 / 384)),
    ("todi", {}, (0.25 * math.log(1.5), 0.25 * math.log(2.0))),
    ("jeffreys", {}, (0.25 * math.log(1.5), 0.25 * math.log(2.0))),
]


@pytest.mark.parametrize(("name", "numbers", "entries"), BY_HAND, ids=str)
def test_one_row_by_hand(name: str, numbers: Numbers, entries: tuple[float, float]) -> None:
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    result = reference_divergence(torch.zeros(1, 2), teacher, name, **numbers)
    assert result.loss.item() == pytest.approx(sum(entries), abs=1e-15)


@every_member
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_and_gradient(name: str, numbers: Numbers, temperature: float) -> None:
    """Against autograd through the definition, and against finite differences of the loss except
    where a part of it is constant."""
    teacher = random_logits(3, 7, seed=1)
    student = random_logits(3, 7, seed=2).requires_grad_()

    def closed_form(x: Tensor) -> Any:
        return _ClosedForm.apply(x, teacher, name, {"temperature": temperature, **numbers})

    result = reference_divergence(student, teacher, name, temperature=temperature, **numbers)
    assert result.loss.dtype == result.grad.dtype == torch.float64
    log_p, log_q = (x.div(temperature).log_softmax(-1) for x in (teacher, student))
    loss = naive(log_p, log_q, name, numbers)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.grad, grad, rtol=1e-12, atol=1e-14)
    if name != "todi" and not numbers.get("detach"):
        assert torch.autograd.gradcheck(closed_form, student)


@pytest.mark.parametrize(
    ("name", "numbers"), [("entropy_switch", {"tau": 1.2}), ("lk_hybrid", {"eta": 3.0})], ids=str
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_weights_that_are_statistics_of_the_row(
    name: str, numbers: Numbers, temperature: float
) -> None:
    """Constant in the backward pass: against autograd with detached weights."""
    teacher = random_logits(6, 7, seed=1) * torch.linspace(0.1, 2.0, 6)[:, None]
    student = random_logits(6, 7, seed=2).requires_grad_()
    result = reference_divergence(student, teacher, name, temperature=temperature, **numbers)
    log_p, log_q = (x.div(temperature).log_softmax(-1) for x in (teacher, student))
    p, q, u = log_p.exp(), log_q.exp(), log_p - log_q
    forward, reverse, variation = (p * u).sum(-1), -(q * u).sum(-1), 0.5 * (p - q).abs().sum(-1)
    if name == "entropy_switch":
        on = -(p * log_p).sum(-1) > 1.2
        assert on.any() and (temperature == 3.0 or not on.all())
        loss = reverse + on * forward
    else:
        w = torch.exp(-3.0 * (1.0 - variation)).detach()
        loss = w * forward + (1.0 - w) * variation
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.grad, grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.5])
def test_decoupled_kl_is_the_papers_error_of_all_pairs(kappa: float, temperature: float) -> None:
    """1/4 sum_ij w_i w_j ((t_i - t_j) - (s_i - s_j))^2, of which ours takes no pairs, and the
    cross-entropy of p and q less the entropy of p."""
    teacher = random_logits(3, 7, seed=1)
    student = random_logits(3, 7, seed=2).requires_grad_()
    options: Numbers = {"alpha": 0.6, "beta": 1.7, "kappa": kappa, "temperature": temperature}
    result = reference_divergence(student, teacher, "decoupled_kl", **options)
    t, s = teacher / temperature, student / temperature
    p = t.softmax(-1)
    w = p**kappa / (p**kappa).sum(-1, keepdim=True)
    pairs = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
    squares = 0.25 * (w[:, :, None] * w[:, None, :] * pairs.square()).sum((-1, -2))
    cross_entropy = -(p * s.log_softmax(-1)).sum(-1)
    loss = 1.7 * squares + 0.6 * (cross_entropy - torch.special.entr(p).sum(-1))
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.grad, grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dkd(temperature: float) -> None:
    """The KLs of (P, 1 - P) and of the other tokens' probabilities, by autograd."""
    teacher = random_logits(4, 7, seed=1)
    student = random_logits(4, 7, seed=2).requires_grad_()
    labels = torch.tensor([0, 6, 3, 3])
    options: Numbers = {"alpha": 0.6, "beta": 3.0, "temperature": temperature}
    result = reference_divergence(student, teacher, "dkd", labels=labels, **options)
    losses = []
    for s, t, label in zip(student / temperature, teacher / temperature, labels, strict=True):
        q, p = s.softmax(-1), t.softmax(-1)
        others = torch.arange(7) != label
        of_q, of_p = (torch.stack((x[label], x[others].sum())) for x in (q, p))
        target = (of_p * (of_p / of_q).log()).sum()
        p_rest, q_rest = (x[others] / x[others].sum() for x in (p, q))
        losses.append(0.6 * target + 3.0 * (p_rest * (p_rest / q_rest).log()).sum())
    loss = torch.stack(losses)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.grad, grad, rtol=1e-12, atol=1e-13)


def test_dkd_is_the_forward_kl_where_the_rest_weighs_what_the_label_leaves() -> None:
    student, teacher = pair(20)
    labels = torch.tensor([0, 29, 3, 3])
    left = 1.0 - teacher.softmax(-1).gather(-1, labels[:, None])
    for row in range(4):
        one = slice(row, row + 1)
        numbers: Numbers = {"alpha": 1.0, "beta": left[row].item()}
        ours = reference_divergence(
            student[one], teacher[one], "dkd", labels=labels[one], **numbers
        )
        assert_same(ours, kl(student[one], teacher[one], forward=1.0))


@pytest.mark.parametrize(
    ("p", "q", "loss", "grad"),
    [
        ([0.5, 0.25, 0.25], [0.0, 0.5, 0.5], 0.5 * math.log(0.5), [0.0, 0.0, 0.0]),
        ([0.0, 0.5, 0.5], [0.5, 0.25, 0.25], math.log(2.0), [0.5, -0.25, -0.25]),
        ([0.5, 0.25, 0.25], [1.0, 0.0, 0.0], 0.5 * math.log(0.5), [0.0, 0.0, 0.0]),
        ([1.0, 0.0, 0.0], [0.5, 0.25, 0.25], math.log(2.0), [-0.5, 0.25, 0.25]),
        ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0], 0.0, [0.0, 0.0, 0.0]),
    ],
)
def test_dkd_where_a_side_has_the_label_alone_or_all_others(
    p: list[float], q: list[float], loss: float, grad: list[float]
) -> None:
    """Label 0; what would be infinite is dropped, as is the KL of the others where there are none
    on a side."""
    teacher, student = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    labels = torch.tensor([0])
    result = reference_divergence(student, teacher, "dkd", labels=labels, alpha=1.0, beta=3.0)
    assert result.loss.item() == pytest.approx(loss, abs=1e-15)
    assert result.grad[0].tolist() == pytest.approx(grad, abs=1e-15)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy(softcap: float | None) -> None:
    """Against PyTorch's, and a forbidden label has an infinite one."""
    student = random_logits(4, 7, seed=3).requires_grad_()
    labels = torch.tensor([0, 3, 6, 2])
    result = reference_cross_entropy(
        student, labels, student_softcap=softcap, student_logit_scale=0.5
    )
    s = 0.5 * student if softcap is None else softcap * torch.tanh(0.5 * student / softcap)
    loss = F.cross_entropy(s, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.grad, grad, rtol=1e-12, atol=1e-14)
    forbidden = reference_cross_entropy(forbid(random_logits(1, 7, seed=4), [2]), labels[3:])
    assert forbidden.loss.item() == INF and forbidden.grad.isfinite().all()


MAPS: dict[str, dict[str, Any]] = {
    "softcaps": {"student_softcap": 3.0, "teacher_softcap": 5.0},
    "scales": {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
    "both": {
        "student_softcap": 4.0,
        "teacher_softcap": 2.0,
        "student_logit_scale": 3.0,
        "teacher_logit_scale": 0.25,
    },
}


@pytest.mark.parametrize("maps", MAPS)
def test_mapped_logits(maps: str) -> None:
    student = forbid(random_logits(2, 6, seed=3), [4])
    teacher = forbid(random_logits(2, 6, seed=4), [1])
    options = MAPS[maps] | {"temperature": 1.5}
    result = reference_divergence(student, teacher, "skew_kl", alpha=0.2, **options)

    def mapped(x: Tensor, side: str) -> Tensor:
        scale: float = options.get(f"{side}_logit_scale", 1.0)
        cap: float | None = options.get(f"{side}_softcap")
        return scale * x if cap is None else cap * torch.tanh(scale * x / cap)

    free = forbid(student, []).masked_fill(student == -INF, 0.0).requires_grad_()
    s = mapped(free, "student").masked_fill(student == -INF, -INF)
    t = mapped(teacher, "teacher").masked_fill(teacher == -INF, -INF)
    plain = reference_divergence(s, t, "skew_kl", alpha=0.2, temperature=1.5)
    (expected,) = torch.autograd.grad(s, free, plain.grad)
    torch.testing.assert_close(result.loss, plain.loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(result.grad, expected, rtol=0, atol=1e-14)


@every_member
def test_student_equal_to_teacher(name: str, numbers: Numbers) -> None:
    logits = random_logits(4, 50, seed=5, scale=0.5)  # q^l is not large
    result = reference_divergence(logits, logits.clone(), name, **numbers)
    assert result.loss.abs().max() < 1e-10
    assert result.grad.abs().max() < 1e-10


# Identities. Both sides of each are the loss and the gradient.


def pair(seed: int) -> tuple[Tensor, Tensor]:
    return random_logits(4, 30, seed=seed), random_logits(4, 30, seed=seed + 1)


def assert_same(ours: DivergenceResult, expected: Any, atol: float = 1e-13) -> None:
    torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=atol)
    torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=atol)


def scaled(result: Any, factor: float) -> DivergenceResult:
    return DivergenceResult(*(factor * x for x in (result.loss, result.grad, result.terms)))


def kl(student: Tensor, teacher: Tensor, *, forward: float) -> Any:
    return reference_adaptive_kl(student, teacher, weight=forward)


def test_jensen_shannon_is_symmetric_at_one_half() -> None:
    student, teacher = pair(10)
    one = reference_divergence(student, teacher, "jensen_shannon", beta=0.3).loss
    other = reference_divergence(teacher, student, "jensen_shannon", beta=0.7).loss
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)
    one = reference_divergence(student, teacher, "jensen_shannon", beta=0.5).loss
    other = reference_divergence(teacher, student, "jensen_shannon", beta=0.5).loss
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)
    assert (one < math.log(2.0)).all()


def test_jensen_shannon_tends_to_the_kls() -> None:
    student, teacher = pair(12)
    tiny = 1e-7
    forward = reference_divergence(student, teacher, "jensen_shannon", beta=tiny)
    assert_same(scaled(forward, 1.0 / tiny), kl(student, teacher, forward=1.0), atol=1e-4)
    reverse = reference_divergence(student, teacher, "jensen_shannon", beta=1.0 - tiny)
    assert_same(scaled(reverse, 1.0 / tiny), kl(student, teacher, forward=0.0), atol=1e-4)


def test_jensen_shannon_is_made_of_skew_kls() -> None:
    student, teacher = pair(14)
    ours = reference_divergence(student, teacher, "jensen_shannon", beta=0.3)
    forward = reference_divergence(student, teacher, "skew_kl", alpha=0.3)
    reverse = reference_divergence(student, teacher, "skew_reverse_kl", alpha=0.7, detach=False)
    made = [0.3 * x + 0.7 * y for x, y in zip(forward, reverse, strict=True)]
    assert_same(ours, DivergenceResult(*made))


def test_skew_kls_tend_to_the_kls() -> None:
    student, teacher = pair(16)
    skew = reference_divergence(student, teacher, "skew_kl", alpha=1e-12)
    assert_same(skew, kl(student, teacher, forward=1.0), atol=1e-6)
    for detach in (False, True):
        skew = reference_divergence(student, teacher, "skew_reverse_kl", alpha=1e-12, detach=detach)
        assert_same(skew, kl(student, teacher, forward=0.0), atol=1e-6)


def test_skew_reverse_kl_is_the_skew_kl_of_swapped_sides() -> None:
    student, teacher = pair(18)
    ours = reference_divergence(student, teacher, "skew_reverse_kl", alpha=0.2, detach=True)
    swapped = reference_divergence(teacher, student, "skew_kl", alpha=0.2)
    torch.testing.assert_close(ours.loss, swapped.loss, rtol=0, atol=1e-14)


def test_total_variation_is_half_of_the_gap() -> None:
    student, teacher = pair(20)
    ours = reference_divergence(student, teacher, "total_variation")
    gap = reference_adaptive_kl(student, teacher).gap
    torch.testing.assert_close(ours.loss, gap / 2.0, rtol=0, atol=1e-15)


def test_alpha_at_one_half_is_four_times_squared_hellinger() -> None:
    student, teacher = pair(22)
    ours = reference_divergence(student, teacher, "alpha", a=0.5)
    product = torch.softmax(student, -1) * torch.softmax(teacher, -1)
    torch.testing.assert_close(ours.loss, 4.0 * (1.0 - product.sqrt().sum(-1)), rtol=0, atol=1e-14)


def test_alpha_at_two_is_half_of_chi_squared() -> None:
    student, teacher = pair(24)
    ours = reference_divergence(student, teacher, "alpha", a=2.0)
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    torch.testing.assert_close(ours.loss, ((p - q).square() / q).sum(-1) / 2.0)


def test_alpha_tends_to_the_kls() -> None:
    student, teacher = pair(26)
    for a, forward in ((1.0 - 1e-7, 1.0), (1.0 + 1e-7, 1.0), (1e-7, 0.0), (-1e-7, 0.0)):
        ours = reference_divergence(student, teacher, "alpha", a=a)
        assert_same(ours, kl(student, teacher, forward=forward), atol=1e-5)


def test_alpha_beta_tends_to_the_kls() -> None:
    student, teacher = pair(28)
    ours = reference_divergence(student, teacher, "alpha_beta", a=1.0, b=1e-7)
    assert_same(ours, kl(student, teacher, forward=1.0), atol=1e-5)
    ours = reference_divergence(student, teacher, "alpha_beta", a=1e-7, b=1.0)
    assert_same(ours, kl(student, teacher, forward=0.0), atol=1e-5)


def test_alpha_beta_at_one_one_is_half_of_the_squared_distance() -> None:
    student, teacher = pair(30)
    ours = reference_divergence(student, teacher, "alpha_beta", a=1.0, b=1.0)
    square = (torch.softmax(student, -1) - torch.softmax(teacher, -1)).square().sum(-1)
    torch.testing.assert_close(ours.loss, square / 2.0, rtol=0, atol=1e-15)


@pytest.mark.parametrize("a", [0.25, 0.9, 2.5, -1.5])
def test_alpha_beta_of_exponents_that_add_to_one_is_alpha(a: float) -> None:
    student, teacher = forbid(pair(32)[0], [2]), forbid(pair(32)[1], [5])
    ours = reference_divergence(student, teacher, "alpha_beta", a=a, b=1.0 - a)
    alpha = reference_divergence(student, teacher, "alpha", a=a)
    torch.testing.assert_close(ours.loss, alpha.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, alpha.grad, rtol=1e-12, atol=1e-12)


def test_jeffreys_and_todi_have_the_value_of_both_kls() -> None:
    student, teacher = pair(34)
    both = scaled(kl(student, teacher, forward=0.5), 2.0)
    assert_same(reference_divergence(student, teacher, "jeffreys"), both)
    todi = reference_divergence(student, teacher, "todi")
    torch.testing.assert_close(todi.loss, both.loss, rtol=0, atol=1e-13)
    assert not torch.allclose(todi.grad, both.grad)


# Forbidden tokens.


@every_member
def test_the_limit_of_a_forbidden_token(name: str, numbers: Numbers) -> None:
    """Token 1 is the student's alone to forbid, and token 2 the teacher's."""
    log_p = forbid(torch.tensor([[0.6, 0.3, 1.0, 0.1]], dtype=torch.float64).log(), [2])
    log_q = forbid(torch.tensor([[0.5, 1.0, 0.2, 0.3]], dtype=torch.float64).log(), [1])
    result = reference_divergence(log_q, log_p, name, **numbers)
    shared = [0, 3]
    # The entries both allow, as they are, and the limits from the table.
    expected = naive(log_p[:, shared], log_q[:, shared], name, numbers).item()
    for mass, limit in zip((0.3, 0.2), limits(name, numbers), strict=True):
        expected += 0.0 if limit is None else limit(mass, numbers)
    assert result.loss.item() == pytest.approx(expected, abs=1e-14)
    assert result.grad.isfinite().all()
    assert result.grad[0, 1].item() == 0.0


@every_member
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_finite_logits_approach_the_limit(name: str, numbers: Numbers, side: str) -> None:
    """A logit that falls brings loss and gradient to those at -inf, or the loss to infinity."""
    student, teacher = random_logits(1, 6, seed=36), random_logits(1, 6, seed=37)
    finite = limits(name, numbers)[0 if side == "student" else 1] is not None

    def at(logit: float) -> DivergenceResult:
        s, t = student.clone(), teacher.clone()
        (s if side == "student" else t)[0, 3] = logit
        return reference_divergence(s, t, name, **numbers)

    limit = at(-INF)
    off = [
        torch.cat(((at(x).loss - limit.loss)[:, None], at(x).grad - limit.grad), 1).abs().max()
        for x in (-20.0, -80.0, -160.0)
    ]
    assert limit.loss.isfinite() and limit.grad.isfinite().all()
    if finite:
        assert off[0] > off[1] >= off[2]
        assert off[2] < 1e-12
    else:
        assert off[0] < off[1] < off[2]


@pytest.mark.parametrize(
    ("name", "numbers"), [member for member in MEMBERS if limits(*member)[1] is None], ids=str
)
def test_a_dropped_token_adds_nothing(name: str, numbers: Numbers) -> None:
    """It has g_j = 0, but it takes its share q_j of G, as the sum over the others shows."""
    student, teacher = random_logits(1, 6, seed=38), forbid(random_logits(1, 6, seed=39), [2])
    free = student.clone().requires_grad_()
    log_q, others = free.log_softmax(-1), [0, 1, 3, 4, 5]
    loss = naive(teacher.log_softmax(-1)[:, others], log_q[:, others], name, numbers)
    (grad,) = torch.autograd.grad(loss.sum(), free)
    result = reference_divergence(student, teacher, name, **numbers)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.grad, grad, rtol=1e-13, atol=1e-13)


@every_member
def test_a_token_that_both_forbid_is_no_token(name: str, numbers: Numbers) -> None:
    student, teacher = random_logits(3, 6, seed=40), random_logits(3, 6, seed=41)
    without = [0, 1, 3, 5]
    result = reference_divergence(forbid(student, [2, 4]), forbid(teacher, [2, 4]), name, **numbers)
    fewer = reference_divergence(student[:, without], teacher[:, without], name, **numbers)
    torch.testing.assert_close(result.loss, fewer.loss, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(result.grad[:, without], fewer.grad, rtol=1e-14, atol=1e-14)
    assert (result.grad[:, [2, 4]] == 0.0).all()


@every_member
@pytest.mark.parametrize(("v_s", "v_t"), [(9, 12), (12, 9)])
def test_a_shorter_vocabulary_is_one_padded_with_minus_infinity(
    name: str, numbers: Numbers, v_s: int, v_t: int
) -> None:
    student, teacher = random_logits(4, v_s, seed=42), random_logits(4, v_t, seed=43)
    padded = reference_divergence(
        F.pad(student, (0, 12 - v_s), value=-INF),
        F.pad(teacher, (0, 12 - v_t), value=-INF),
        name,
        **numbers,
    )
    result = reference_divergence(student, teacher, name, **numbers)
    assert torch.equal(result.loss, padded.loss)
    assert torch.equal(result.grad, padded.grad[:, :v_s])


@every_member
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
def test_a_broken_row_is_nan_alone(name: str, numbers: Numbers, side: str, poison: str) -> None:
    other = {"student": "teacher", "teacher": "student"}[side]
    logits = {"student": random_logits(3, 6, seed=44), "teacher": random_logits(3, 6, seed=45)}
    sound = reference_divergence(logits["student"], logits["teacher"], name, **numbers)
    if poison == "all -inf":
        logits[side][1] = -INF
    else:
        logits[side][1, 3] = float(poison)
        # All but the broken entry is forbidden, and hence dropped where that is the rule.
        logits[other][1, [0, 1, 2, 4, 5]] = -INF
    result = reference_divergence(logits["student"], logits["teacher"], name, **numbers)
    for ours, expected in zip(result, sound, strict=True):
        assert ours[1].isnan().all()
        assert torch.equal(ours[::2], expected[::2])


def test_an_unknown_divergence_is_named() -> None:
    with pytest.raises(ValueError, match=r"^divergence: expected one of .*, got 'kl'$"):
        reference_divergence(torch.zeros(1, 2), torch.zeros(1, 2), "kl")
