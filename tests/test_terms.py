"""The terms of the family in PyTorch: their formulas in float64, their rounding in fp32 near p = q
and at a forbidden token, and the bound of their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import (
    DKD,
    DecoupledKL,
    Divergence,
    EntropySwitch,
    LKHybrid,
    divergences,
    verify,
)
from akl_triton.reference import reference_divergence
from akl_triton.terms import LARGEST_LOG, LARGEST_U, TERMS

Numbers = tuple[float, ...]
MEMBERS: list[tuple[str, Numbers]] = [
    ("jensen_shannon", (0.5,)),
    ("jensen_shannon", (0.01,)),
    ("jensen_shannon", (0.99,)),
    ("skew_kl", (0.1,)),
    ("skew_kl", (1e-4,)),
    ("skew_reverse_kl", (0.1,)),
    ("skew_reverse_kl", (1e-4,)),
    ("skew_reverse_kl_detached", (0.1,)),
    ("skew_reverse_kl_detached", (0.7,)),
    ("total_variation", ()),
    ("alpha", (0.5,)),
    ("alpha", (0.001,)),
    ("alpha", (0.999,)),
    ("alpha", (3.0,)),
    ("alpha", (-1.5,)),
    ("alpha_beta", (0.2, 0.7)),
    ("alpha_beta", (0.05, 0.05)),
    ("alpha_beta", (0.6, 0.9)),
    ("alpha_beta", (1.5, -0.5)),
    ("alpha_beta", (-0.4, 1.2)),
    ("alpha_beta", (0.4, -0.9)),
    ("todi", ()),
    ("jeffreys", ()),
]
every_member = pytest.mark.parametrize(("name", "numbers"), MEMBERS, ids=str)


def members_of_degree(least: float) -> Any:
    """The members, without the alpha-beta divergences of a degree a + b below that."""
    some = [
        (name, numbers) for name, numbers in MEMBERS if name != "alpha_beta" or sum(numbers) > least
    ]
    return pytest.mark.parametrize(("name", "numbers"), some, ids=str)


def oracle(student: Tensor, teacher: Tensor, name: str, numbers: Numbers) -> Any:
    names = {"jensen_shannon": ["beta"], "alpha": ["a"], "alpha_beta": ["a", "b"]}
    named: dict[str, Any] = dict(zip(names.get(name, ["alpha"]), numbers, strict=False))
    if name.startswith("skew_reverse_kl"):
        named["detach"] = name.endswith("_detached")
        name = "skew_reverse_kl"
    return reference_divergence(student, teacher, name, **named)


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def entries(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """p, q, ln p, ln q and u in float64."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return log_p.exp(), log_q.exp(), log_p, log_q, log_p - log_q


def held(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """The same in fp32 for logits that may be -inf, by the rule in the docstring of the module."""
    p, q, log_p, log_q, u = (x.float() for x in entries(student, teacher))
    u = u.nan_to_num(nan=0.0, posinf=LARGEST_U, neginf=-LARGEST_U)
    return p, q, log_p.clamp(min=-LARGEST_LOG), log_q.clamp(min=-LARGEST_LOG), u


def test_every_function_has_the_name_of_its_key() -> None:
    assert all(terms.__name__ == name for name, terms in TERMS.items())
    assert set(TERMS) == {name for name, _ in MEMBERS}


@every_member
def test_the_formulas(name: str, numbers: Numbers) -> None:
    """The terms are those of the oracle when computed in its precision, up to c (p - q) in a
    term."""
    student, teacher = random_logits(6, 40, seed=0), random_logits(6, 40, seed=1)
    given = entries(student, teacher)
    copies = [x.clone() for x in given]
    x, g = TERMS[name](*given, *numbers)
    assert all(map(torch.equal, given, copies)), "a function changed what it was given"
    exact = oracle(student, teacher, name, numbers)
    q = given[1]
    torch.testing.assert_close((x + g).sum(-1), exact.loss, rtol=1e-10, atol=1e-12)
    gradient = g - q * g.sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, exact.grad, rtol=1e-9, atol=1e-11)


@every_member
def test_normal_form(name: str, numbers: Numbers) -> None:
    """Phi and its derivative are 0 at p = q, for every p alike."""
    log = torch.linspace(-9.0, 0.0, 50, dtype=torch.float64)[None]
    zero = torch.zeros_like(log)
    x, g = TERMS[name](log.exp(), log.exp(), log, log, zero, *numbers)
    assert (x == 0.0).all() and (g == 0.0).all()
    step = 1e-5
    x, g = TERMS[name](
        log.exp() * math.exp(step), log.exp(), log + step, log, zero + step, *numbers
    )
    if name != "total_variation":  # which has a corner there
        assert (
            (x + g).abs()
            <= 2.0 * step**2 * log.exp().pow(sum(numbers[:2]) if name == "alpha_beta" else 1.0)
        ).all()


# Below, the terms of 3000 entries are not of the size of probabilities.
@members_of_degree(0.5)
@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_near_equality(name: str, numbers: Numbers, noise: float) -> None:
    """In fp32 a loss that ought to be about noise^2 / 2 is not negative by more than rounding."""
    teacher = random_logits(8, 3000, seed=2)
    teacher[0, 5] += 15.0
    student = teacher + random_logits(8, 3000, seed=3, scale=noise)
    given = [x.float() for x in entries(student, teacher)]
    x, g = TERMS[name](*given, *numbers)
    loss = x.sum(-1) + g.sum(-1)
    exact = oracle(student, teacher, name, numbers)
    assert (loss >= -1e-7).all()
    assert (loss - exact.loss).abs().max() <= 1e-7 + 1e-4 * exact.loss.max()
    gradient = g - given[1] * g.sum(-1, keepdim=True)
    if name != "total_variation":
        assert (gradient - exact.grad).abs().max() <= 2e-7 + 1e-4 * exact.grad.abs().max()


def limits(name: str, numbers: Numbers) -> tuple[bool, bool]:
    """Whether phi has a finite limit at (p, 0), and at (0, q)."""
    if name in ("todi", "jeffreys"):
        return False, False
    if name == "alpha":
        return numbers[0] < 1.0, numbers[0] > 0.0
    if name == "alpha_beta":
        return numbers[1] > 0.0 < sum(numbers), numbers[0] > 0.0 < sum(numbers)
    return True, True


@every_member
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_forbidden_token(name: str, numbers: Numbers, side: str) -> None:
    """A term has the limit of the oracle where that is finite, and is not NaN where it is not."""
    student, teacher = random_logits(4, 20, seed=4), random_logits(4, 20, seed=5)
    for x, which in ((student, "student"), (teacher, "teacher")):
        if side in (which, "both"):
            x[:, 3] = -math.inf
    given = held(student, teacher)
    x, g = TERMS[name](*given, *numbers)
    assert not x.isnan().any() and not g.isnan().any()
    if side != "both" and not limits(name, numbers)[side == "teacher"]:
        x[:, 3], g[:, 3] = 0.0, 0.0
    exact = oracle(student, teacher, name, numbers)
    torch.testing.assert_close((x.sum(-1) + g.sum(-1)).double(), exact.loss, rtol=2e-5, atol=1e-6)
    gradient = g - given[1] * g.sum(-1, keepdim=True)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=2e-5, atol=1e-6)


@every_member
def test_finite_entries_give_finite_terms(name: str, numbers: Numbers) -> None:
    """The bound holds however far apart the sides are, up to where logarithms are held."""
    nats = torch.tensor([0.0, 1.0, 30.0, 80.0, 88.0, 104.0, 200.0, 1e4, 1e20, LARGEST_LOG])
    log_p, log_q = (-x.flatten()[None] for x in torch.meshgrid(nats, nats, indexing="ij"))
    for factor in (1.0, LARGEST_U / LARGEST_LOG):
        u = (log_p - log_q) * factor
        x, g = TERMS[name](log_p.exp(), log_q.exp(), log_p, log_q, u, *numbers)
        assert x.isfinite().all() and g.isfinite().all()


def rows_far_and_near(vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Float64 (student, teacher) [1024, vocabulary] of every spread and every distance, in four
    kinds: noise, independent sides, a heavy token that moves alone, and a tail that moves as
    one."""
    generator = torch.Generator().manual_seed(seed)

    def powers(low: float, high: float) -> Tensor:
        return 10.0 ** (low + (high - low) * torch.rand(256, 1, generator=generator))

    def noise(width: int = vocabulary) -> Tensor:
        return torch.randn(256, width, generator=generator)

    teachers = [noise() * powers(-1, 2) for _ in range(4)]
    teachers[2] = torch.zeros(256, vocabulary)
    teachers[2][:, :1] = math.log(vocabulary) + 3.0 * noise(1)
    teachers[3][:, :1] += powers(0, 1.5)
    students = [x.clone() for x in teachers]
    students[0] += noise() * powers(-2, 2)
    students[1] = noise() * powers(-1, 2)
    students[2][:, :1] += noise(1) * powers(-2, 1)
    students[3][:, 1:] += noise(1) * powers(-2, 1)
    return torch.cat(students).double(), torch.cat(teachers).double()


def steepness(name: str, numbers: Numbers) -> float:
    kind = divergences.FAMILY[name.removesuffix("_detached")]
    member = kind(*numbers)
    assert isinstance(member, divergences.SumOfTerms)
    return member.steepness


@members_of_degree(0.0)
@pytest.mark.parametrize("vocabulary", [2, 30, 300])
def test_steepness_bounds_the_gradient(
    name: str, numbers: Numbers, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergences, "WIDEST", vocabulary)
    largest = 0.0
    for seed in range(3):
        exact = oracle(*rows_far_and_near(vocabulary, seed), name, numbers)
        of_loss = exact.grad.abs().amax(-1) / (2.0 + exact.loss)
        largest = max(largest, of_loss[of_loss.isfinite()].max().item())
    assert largest <= (1.0 + 1e-12) * steepness(name, numbers)


@pytest.mark.parametrize("vocabulary", [2, 30, 300])
@pytest.mark.parametrize(
    "divergence",
    [
        DKD(),
        DKD(alpha=9.0, beta=0.0),
        DecoupledKL(),
        DecoupledKL(alpha=0.0, beta=20.0),
        DecoupledKL(alpha=5.0, kappa=0.0),
        EntropySwitch(),
        LKHybrid(),
    ],
    ids=str,
)
def test_steepness_of_divergences_of_whole_rows(divergence: Divergence, vocabulary: int) -> None:
    for seed in range(3):
        student, teacher = rows_far_and_near(vocabulary, seed)
        for label in (0, vocabulary - 1):
            labels = torch.full((len(student),), label)
            exact = verify.exact(divergence, student, teacher, labels=labels).oracle
            of_loss = exact.grad.abs().amax(-1) / (2.0 + exact.loss)
            largest = of_loss[of_loss.isfinite()].max().item()
            assert largest <= (1.0 + 1e-12) * divergence.steepness


def test_steepness_is_reached() -> None:
    """The gradient of a large exponent is that many times its loss."""
    exact = oracle(*rows_far_and_near(3, 0), "alpha", (5.0,))
    of_loss = exact.grad.abs().amax(-1) / (2.0 + exact.loss)
    assert steepness("alpha", (5.0,)) == 4.0
    assert of_loss[of_loss.isfinite()].max() > 3.99
