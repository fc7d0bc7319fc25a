"""The PyTorch backend's sums of terms against the float64 oracle, by the rule of akl_triton.verify.

Powers that are not bounded get a larger epsilon, which grows with their exponent.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import divergences, eager, eager_terms, terms
from akl_triton.divergences import (
    Alpha,
    AlphaBeta,
    Jeffreys,
    JensenShannon,
    Rule,
    SkewKL,
    SkewReverseKL,
    SumOfTerms,
    ToDi,
    TotalVariation,
)
from akl_triton.kernels.layout import STATISTICS
from akl_triton.reference import (
    DivergenceResult,
    mapped_logits,
    reference_adaptive_kl,
    shared_vocabulary,
)
from akl_triton.rows import LogitMap, RowResult, damping
from akl_triton.verify import EPSILON, Exact, exact, faults
from tests.support import torch_backend
from tests.support.logits import generator, rows_of_vocabulary
from tests.support.trace import peak_temporaries

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMBERS = (
    JensenShannon(),
    JensenShannon(0.1),
    SkewKL(),
    SkewKL(0.7),
    SkewReverseKL(),
    SkewReverseKL(0.1, detach=True),
    TotalVariation(),
    Alpha(),
    Alpha(0.9),
    Alpha(2.0),
    Alpha(-0.5),
    AlphaBeta(),
    AlphaBeta(0.6, 0.9),
    AlphaBeta(1.3, -0.3),
    ToDi(),
    Jeffreys(),
)
every_member = pytest.mark.parametrize("divergence", MEMBERS, ids=str)
TEMPERATURES = (0.5, 1.0, 2.0, 3.7)
IDENTITY = LogitMap()


def forward(
    student: Tensor,
    teacher: Tensor,
    divergence: SumOfTerms,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    maps: tuple[LogitMap, LogitMap] = (IDENTITY, IDENTITY),
    **options: Any,
) -> RowResult:
    """The forward pass into outputs full of NaN."""
    return torch_backend.forward_of(
        Rule(divergence, temperature, *maps), student, teacher, valid, **options
    )


def run(
    student: Tensor,
    teacher: Tensor,
    divergence: SumOfTerms,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    upstream: Tensor | None = None,
    maps: tuple[LogitMap, LogitMap] = (IDENTITY, IDENTITY),
) -> tuple[RowResult, Tensor]:
    """Forward, then backward."""
    result = forward(student, teacher, divergence, temperature=temperature, valid=valid, maps=maps)
    gradient = torch.full_like(student, torch.nan)
    upstream = torch.ones(1).expand(len(student)) if upstream is None else upstream
    rule = Rule(divergence, temperature, *maps)
    eager.backward(upstream, student, teacher, valid, None, result.state, rule, gradient)
    return result, gradient


def log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float, maps: tuple[LogitMap, LogitMap]
) -> tuple[Tensor, Tensor]:
    """ln p and ln q [N, V] in float64."""
    s, t = (
        torch.log_softmax(mapped_logits(x, of.softcap, of.scale) / temperature, dim=-1)
        for x, of in zip(shared_vocabulary(student, teacher), maps, strict=True)
    )
    return t, s


def largest_exponent(divergence: SumOfTerms) -> float:
    """The largest exponent of a power that is not bounded, or 0."""
    exponents = [x for name, x in vars(divergence).items() if name in ("a", "b")]
    if isinstance(divergence, Alpha):
        exponents.append(1.0 - divergence.a)
    return max(exponents) if any(x < 0.0 for x in exponents) else 0.0


def check(
    student: Tensor,
    teacher: Tensor,
    divergence: SumOfTerms,
    temperature: float = 1.0,
    maps: tuple[LogitMap, LogitMap] = (IDENTITY, IDENTITY),
) -> None:
    """Loss and gradient of every row."""
    upstream = torch.randn(len(student), generator=generator(99))
    result, gradient = run(
        student, teacher, divergence, temperature=temperature, maps=maps, upstream=upstream
    )
    of_student, of_teacher = maps
    of = exact(
        divergence,
        student,
        teacher,
        temperature=temperature,
        student_softcap=of_student.softcap,
        teacher_softcap=of_teacher.softcap,
        student_logit_scale=of_student.scale,
        teacher_logit_scale=of_teacher.scale,
    )
    log_p, log_q = log_probabilities(student, teacher, temperature, maps)
    # In fp32 a power that is not bounded is as exact as its exponent times ln p.
    spread = torch.stack((log_p, log_q)).nan_to_num(neginf=0.0).abs().amax((0, 2))
    epsilon = EPSILON * (1.0 + 0.2 * largest_exponent(divergence) * spread)
    within = of.oracle.loss.abs() < 1e37  # fp32 holds what is beyond
    assert result.loss.isfinite().all() and (result.loss[~within] > 1e35).all()
    found = faults(result.loss[within], None, rows_of(of, within), epsilon=epsilon[within])
    if isinstance(divergence, TotalVariation):  # whose gradient jumps where u changes its sign
        within &= (((log_p - log_q).abs() > 1e-6) | (log_p == log_q)).all(-1)
    # A g is a probability times a function of u, which rounds as if it were not near 0.
    size = of_student.scale / temperature * torch.maximum(log_p, log_q).amax(-1).exp()
    terms = (of.oracle.grad.abs().amax(-1) + size)[:, None].expand_as(gradient)
    found += faults(
        None,
        gradient[within],
        rows_of(of, within),
        upstream=upstream[within],
        epsilon=epsilon[within],
        terms=terms[within],
    )
    assert not found, "\n".join(found)


def rows_of(of: Exact, rows: Tensor) -> Exact:
    return Exact(*(DivergenceResult(*(x[rows] for x in part)) for part in of))


@every_member
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 1500])
def test_every_temperature(divergence: SumOfTerms, dtype: torch.dtype, vocabulary: int) -> None:
    student, teacher = (x.to(dtype) for x in rows_of_vocabulary(vocabulary))
    for temperature in TEMPERATURES:
        check(student, teacher, divergence, temperature)


@every_member
def test_a_large_vocabulary(divergence: SumOfTerms) -> None:
    student, teacher = rows_of_vocabulary(50257, seed=1)
    check(student.bfloat16(), teacher.bfloat16(), divergence, 1.0)


@every_member
@pytest.mark.parametrize(("v_s", "v_t"), [(1, 9), (9, 1), (1400, 1500), (1500, 1400)])
def test_vocabularies_that_differ(divergence: SumOfTerms, v_s: int, v_t: int) -> None:
    student, teacher = rows_of_vocabulary(max(v_s, v_t), seed=4)
    student, teacher = student[:, :v_s].clone(), teacher[:, :v_t].clone()
    for forbidden in (False, True):
        if forbidden:
            student[:, 4::3], teacher[:, 4::5] = -INF, -INF
        for temperature in TEMPERATURES[1:3]:
            check(student, teacher, divergence, temperature)


@every_member
@pytest.mark.parametrize("forbidden", ["student", "teacher", "both", "each its own", "most"])
def test_forbidden_tokens(divergence: SumOfTerms, forbidden: str) -> None:
    student, teacher = rows_of_vocabulary(400, seed=5)
    g = generator(6)
    share = 0.9 if forbidden == "most" else 0.2
    mask, other = (torch.rand(student.shape, generator=g) < share for _ in range(2))
    mask[0] = other[0] = False
    if forbidden != "teacher":
        student = student.masked_fill(mask, -INF)
    if forbidden != "student":
        teacher = teacher.masked_fill(other if forbidden == "each its own" else mask, -INF)
    for temperature in TEMPERATURES[:3]:
        check(student, teacher, divergence, temperature)


@every_member
def test_near_equality(divergence: SumOfTerms) -> None:
    """A student close to its teacher has no negative loss."""
    _, teacher = rows_of_vocabulary(3000, seed=7)
    for noise in (1e-6, 1e-5, 1e-4, 1e-3):
        student = teacher + noise * torch.randn(teacher.shape, generator=generator(8))
        for temperature in TEMPERATURES:
            loss = forward(student, teacher, divergence, temperature=temperature).loss
            assert (loss >= 0.0).all()
            if not isinstance(divergence, TotalVariation):
                check(student, teacher, divergence, temperature)


@every_member
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_equal_to_teacher(divergence: SumOfTerms, dtype: torch.dtype) -> None:
    _, teacher = rows_of_vocabulary(1500, seed=9)
    teacher = teacher.to(dtype)
    result, gradient = run(teacher.clone(), teacher, divergence)
    assert (result.loss == 0.0).all() and (gradient == 0.0).all()


MAPS = {  # of the student, of the teacher
    "softcaps": (LogitMap(3.0), LogitMap(5.0)),
    "scales": (LogitMap(scale=0.5), LogitMap(scale=2.0)),
    "one softcap": (LogitMap(30.0, 1.5), LogitMap()),
}


@every_member
@pytest.mark.parametrize("maps", MAPS)
def test_mapped_logits(divergence: SumOfTerms, maps: str) -> None:
    student, teacher = rows_of_vocabulary(1500, seed=10)
    student[2, 7] = teacher[3, 9] = -INF
    check(student, teacher, divergence, 1.5, MAPS[maps])


@every_member
@pytest.mark.parametrize("forbidden", [False, True])
def test_without_looking(
    divergence: SumOfTerms, forbidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_backend.never_look(monkeypatch)
    student, teacher = rows_of_vocabulary(1500, seed=12)
    if forbidden:
        student[1:, 3::7], teacher[1:, 5::11] = -INF, -INF
    for temperature in TEMPERATURES:
        check(student, teacher[:, :1400], divergence, temperature)


@every_member
@pytest.mark.parametrize("looking", [False, True])
def test_invalid_rows(
    divergence: SumOfTerms, looking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of invalid rows are exactly zero whatever they hold; the others are as if
    alone."""
    if not looking:
        torch_backend.never_look(monkeypatch)
    valid = torch.tensor([True, False, True, True, False, True])
    student, teacher = (x[:6].clone() for x in rows_of_vocabulary(3000, seed=13))
    student[~valid, 5], teacher[~valid, 7] = torch.nan, INF
    upstream = torch.randn(6, generator=generator(14))
    result, gradient = run(student, teacher, divergence, valid=valid, upstream=upstream)
    alone, alone_gradient = run(
        student[valid], teacher[valid], divergence, upstream=upstream[valid]
    )
    for ours, expected in zip(result, alone, strict=True):
        assert (ours[~valid] == 0.0).all()
        torch.testing.assert_close(ours[valid], expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (gradient[~valid] == 0.0).all()
    torch.testing.assert_close(gradient[valid], alone_gradient, rtol=1e-5, atol=1e-7)


@every_member
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
def test_a_broken_row_is_nan_alone(divergence: SumOfTerms, side: str, poison: str) -> None:
    student, teacher = rows_of_vocabulary(200, seed=15)
    sound, sound_gradient = run(student, teacher, divergence)
    broken, other = (student, teacher) if side == "student" else (teacher, student)
    if poison == "all -inf":
        broken[1] = -INF
    else:
        broken[1, 3] = float(poison)
        other[1] = -INF  # all but the broken entry is dropped where that is the rule
        other[1, 3] = 0.0
    result, gradient = run(student, teacher, divergence)
    assert result.loss[1].isnan() and gradient[1].isnan().all() and result.stats[1].isnan().all()
    others = torch.arange(10) != 1
    torch.testing.assert_close(result.loss[others], sound.loss[others], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[others], sound_gradient[others], rtol=1e-5, atol=1e-6)


@every_member
@pytest.mark.parametrize(("v_s", "v_t"), [(1500, 1500), (1600, 1500), (1500, 1600)])
def test_one_pass_and_in_place(divergence: SumOfTerms, v_s: int, v_t: int) -> None:
    student, teacher = rows_of_vocabulary(1600, seed=16)
    student, teacher = student[:, :v_s].bfloat16().contiguous(), teacher[:, :v_t].bfloat16()
    student[4, 9], teacher[4, 11] = -INF, -INF
    upstream = torch.randn(10, generator=generator(17))
    result, gradient = run(student, teacher, divergence, upstream=upstream)

    out = student.clone()
    eager.backward(upstream, out, teacher, None, None, result.state, Rule(divergence), out)
    assert torch.equal(out, gradient)

    out = student.clone()
    once = forward(out, teacher, divergence, upstream=upstream, out=out)
    assert torch.equal(out, gradient)
    for ours, expected in zip(once, result, strict=True):
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@every_member
def test_damped(divergence: SumOfTerms) -> None:
    """Divided by a power of two, the gradient of a row stays within the bound of its steepness."""
    student, teacher = rows_of_vocabulary(1500, seed=18)
    upstream = torch.ones(10)
    _, gradient = run(student, teacher, divergence)
    out = torch.empty_like(student)
    loss = forward(student, teacher, divergence, upstream=upstream, out=out, damped=True).loss
    assert torch.equal(out * damping(loss)[:, None], gradient)
    assert (out.abs() <= 2.0 * divergence.steepness).all()


@every_member
def test_statistics(divergence: SumOfTerms) -> None:
    """The statistics that need neither a head nor a weight are right; the others are NaN."""
    student, teacher = rows_of_vocabulary(1500, seed=19)
    student[2:5, 7::9], teacher[3:6, 9::11] = -INF, -INF
    stats = dict(
        zip(STATISTICS, forward(student, teacher[:, :1400], divergence).stats.T, strict=True)
    )
    oracle = reference_adaptive_kl(student, teacher[:, :1400])
    entropies = "student_entropy", "teacher_entropy", "top1_agreement"
    for name in ("forward_kl", "reverse_kl", "gap", *entropies):
        torch.testing.assert_close(
            stats[name].double(), getattr(oracle, name), rtol=1e-6, atol=1e-6
        )
    for name in ("forward_weight", "head_mass", "head_size"):
        assert stats[name].isnan().all()


EXTREME_MAPS = {
    "plain": (LogitMap(), LogitMap()),
    "scales": (LogitMap(scale=1e-20), LogitMap(scale=1e20)),
    "softcaps": (LogitMap(30.0), LogitMap(50.0)),
}


def extreme_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Finite (student, teacher) [64, 40]: every pair of eight kinds."""
    g = generator(20)
    largest = torch.finfo(dtype).max
    noise = torch.randn(40, generator=g)
    masked = noise.clone()
    masked[20:] = -largest
    other = noise.clone()
    other[:20] = -largest
    peak = noise.clone()
    peak[3] = largest
    both_ends = torch.where(noise > 0.0, largest, -largest)
    kinds = (
        noise,
        masked,
        other,
        peak,
        both_ends,
        both_ends.flip(0),
        torch.full((40,), -largest),
        noise * 1e4,
    )
    pairs = list(itertools.product(kinds, kinds))
    student, teacher = (torch.stack(x).to(dtype) for x in zip(*pairs, strict=True))
    return student, teacher


@every_member
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_logits_give_finite_results(divergence: SumOfTerms, dtype: torch.dtype) -> None:
    student, teacher = extreme_rows(dtype)
    for temperature, (name, maps) in itertools.product(
        (1e-30, 1e-3, 1.0, 1e3, 1e30), EXTREME_MAPS.items()
    ):
        result, gradient = run(student, teacher, divergence, temperature=temperature, maps=maps)
        assert result.loss.isfinite().all(), (temperature, name)
        assert (result.loss >= 0.0).all(), (temperature, name)
        if dtype != torch.float16:
            assert gradient.isfinite().all(), (temperature, name)


@every_member
def test_the_lowest_number_is_not_minus_infinity(divergence: SumOfTerms) -> None:
    """finfo.min, a common mask, is a finite logit on both sides."""
    student, teacher = rows_of_vocabulary(64, seed=21)
    for x in (student, teacher):
        x[:, 50:] = torch.finfo(torch.float32).min
    check(student, teacher, divergence, 1.0)


@pytest.mark.parametrize("budget", [2**22, 2**26])
@pytest.mark.parametrize("kind", ["random", "forbidden", "widths", "scattered"])
@pytest.mark.parametrize("looking", [True, False])
@pytest.mark.parametrize("divergence", [SkewKL(), AlphaBeta(1.3, -0.3)], ids=str)
def test_temporaries_stay_within_the_budget(
    divergence: SumOfTerms,
    kind: str,
    budget: int,
    looking: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "TEMPORARY_BYTES", budget)
    if not looking:
        torch_backend.never_look(monkeypatch)
    student, teacher = torch.randn(2, 48, 32000, generator=generator(24)).half()
    valid = None
    if kind == "forbidden":
        teacher[:, ::2], student[:, ::3] = -INF, -INF
    elif kind == "widths":
        student, teacher = student[:, :8000].contiguous(), teacher
    elif kind == "scattered":
        valid = torch.arange(48) % 3 > 0

    gradient, upstream = torch.empty_like(student), torch.ones(48)

    def both_ways() -> None:
        state = forward(student, teacher, divergence, valid=valid).state
        rule = Rule(divergence)
        eager.backward(upstream, student, teacher, valid, None, state, rule, gradient)

    peak = peak_temporaries(both_ways, monkeypatch)
    assert peak <= budget, f"{peak / 2**20:.1f} MiB"


def test_rows_that_are_held_do_not_touch_the_others() -> None:
    """One row of a run may need care; the others keep their results to within rounding."""
    student, teacher = rows_of_vocabulary(1500, seed=22)
    sound, sound_gradient = run(student, teacher, AlphaBeta())
    student[3, 5], teacher[4, 6] = -INF, torch.finfo(torch.float32).min
    result, gradient = run(student, teacher, AlphaBeta())
    others = [0, 1, 2, 5, 6, 7, 8, 9]
    torch.testing.assert_close(result.loss[others], sound.loss[others], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[others], sound_gradient[others], rtol=1e-5, atol=1e-7)


@every_member
def test_threads_change_nothing(divergence: SumOfTerms) -> None:
    student, teacher = rows_of_vocabulary(20000, seed=25)
    student[2, 7] = teacher[3, 9] = -INF
    one, gradient = run(student, teacher, divergence)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two, other = run(student, teacher, divergence)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(gradient, other) and torch.equal(one.loss, two.loss)


def test_a_registered_function_of_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered function needs no change of the backend."""
    monkeypatch.setattr(divergences, "FAMILY", dict(divergences.FAMILY))
    monkeypatch.setattr(divergences, "TERMS", dict(divergences.TERMS))
    monkeypatch.setattr(eager_terms, "TERMS", divergences.TERMS)

    class Mine(Jeffreys):
        name = "mine"

    def halved(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, g = terms.jeffreys(*given)
        return x / 2.0, g / 2.0

    divergences.register(Mine, torch=halved)
    student, teacher = rows_of_vocabulary(300, seed=23)
    student[2, 7] = teacher[3, 9] = -INF
    ours, gradient = run(student, teacher, Mine())
    theirs, twice = run(student, teacher, Jeffreys())
    torch.testing.assert_close(2.0 * ours.loss, theirs.loss)
    torch.testing.assert_close(2.0 * gradient, twice)

    divergences.register(Mine, triton=halved)
    with pytest.raises(ValueError, match=r"^backend: expected 'triton', as mine was registered"):
        run(student, teacher, Mine())
