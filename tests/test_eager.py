"""The PyTorch backend against the float64 oracle, by the rule of akl_triton.verify.

The two KLs and the adaptive weight are as exact as the plain formulas in fp32, so that they are
held to 1.01 times the error of those, where the rule allows twice. No rounding of the gradient to
the student's dtype is allowed beyond that of the fp32 gradient, either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from akl_triton import AdaptiveKL, MixedKL, eager, eager_chunks
from akl_triton.eager_head import SAMPLE
from akl_triton.kernels.layout import STATISTICS
from akl_triton.reference import (
    Head,
    Ties,
    authors_adaptive_kl,
    mapped_logits,
    mapped_slope,
    reference_adaptive_kl,
    shared_vocabulary,
)
from akl_triton.rows import LogitMap, RowResult
from akl_triton.verify import EPSILON, at_head, exact, faults, head_faults, sum_faults
from tests.support import torch_backend
from tests.support.logits import generator, rows_of_vocabulary
from tests.support.trace import peak_of_one_thread, peak_temporaries

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
YARDSTICK = 1.01
IDENTITIES = LogitMap(), LogitMap()
Maps: TypeAlias = tuple[LogitMap, LogitMap]  # of the student, of the teacher


class Options(NamedTuple):
    mu: float = 0.5
    temperature: float = 1.0
    head: Head = "exclusive"
    ties: Ties = "stable"


DEFAULTS = Options()


def statistics_of(result: RowResult) -> dict[str, Tensor]:
    return dict(zip(STATISTICS, result.stats.unbind(-1), strict=True))


def run(
    student: Tensor,
    teacher: Tensor,
    options: Options = DEFAULTS,
    *,
    valid: Tensor | None = None,
    weight: float | None = None,
    upstream: Tensor | None = None,
) -> tuple[RowResult, Tensor]:
    """Forward, then backward. The outputs start as NaN, which shows where nothing is written."""
    result = torch_backend.forward(student, teacher, valid, weight=weight, **options._asdict())
    grad = torch.full_like(student, torch.nan)
    upstream = torch.ones(1).expand(len(student)) if upstream is None else upstream
    torch_backend.backward(
        upstream,
        student,
        teacher,
        valid,
        result.state,
        temperature=options.temperature,
        out=grad,
    )
    return result, grad


def head_faults_of(
    stats: dict[str, Tensor], student: Tensor, teacher: Tensor, **options: Any
) -> list[str]:
    claims: dict[str, Any] = {
        name: stats[name] for name in ("head_size", "head_mass", "forward_weight")
    }
    return head_faults(student, teacher, **claims, **options)


def terms_of_gradient(
    student: Tensor, teacher: Tensor, w: Tensor, temperature: float, maps: Maps = IDENTITIES
) -> Tensor:
    """[N, V_s] the size of the terms whose difference is the gradient: its rounding is relative to
    them."""
    width = student.shape[-1]
    of_student, of_teacher = maps
    student, teacher = shared_vocabulary(student, teacher)
    log_p, log_q = (
        mapped_logits(x, of.softcap, of.scale).div(temperature).log_softmax(-1)
        for x, of in ((teacher, of_teacher), (student, of_student))
    )
    p, q = log_p.exp(), log_q.exp()
    u = (log_p - log_q).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    reverse_kl = (q * u).sum(-1, keepdim=True)
    w = w.double()[:, None]
    terms = w * (p + q) + (1.0 - w) * q * (1.0 + u.abs() + reverse_kl.abs())
    slope = mapped_slope(student, of_student.softcap, of_student.scale)
    return (terms * slope)[:, :width] / temperature


def check(student: Tensor, teacher: Tensor, options: Options = DEFAULTS) -> None:
    result, gradient = run(student, teacher, options)
    stats = statistics_of(result)
    w, size = stats["forward_weight"], stats["head_size"]
    found = head_faults_of(stats, student, teacher, **options._asdict())
    assert not (w > 1.0).any()

    temperature = options.temperature
    sums = {name: stats[name] for name in ("forward_kl", "reverse_kl", "gap")}
    found += sum_faults(sums, student, teacher, temperature=temperature, yardstick=YARDSTICK)
    of = exact(
        AdaptiveKL(options.mu, options.head, options.ties),
        student,
        teacher,
        size=size,
        forward_weight=w,
        gap=stats["gap"],
        temperature=temperature,
    )
    terms = terms_of_gradient(student, teacher, w, temperature)
    found += faults(result.loss, gradient, of, yardstick=YARDSTICK, roundings=0.0, terms=terms)
    assert not found, "\n".join(found)

    # Where the gap is rounding, so is the weight; but then it must hardly matter.
    taken = at_head(student, teacher, size, **options._asdict()).exact
    drift = (w.double() - taken.forward_weight).abs() * (taken.forward_kl - taken.reverse_kl).abs()
    assert (drift <= EPSILON * (1.0 + taken.loss)).all()


HEADS: tuple[Head, ...] = ("exclusive", "inclusive")
TIES: tuple[Ties, ...] = ("stable", "average")
EVERY_SETTING = list(
    itertools.starmap(
        Options, itertools.product((0.01, 0.5, 0.9, 0.999), (0.5, 1.0, 2.0, 4.0), HEADS, TIES)
    )
)
# A Latin square of them: every pair of values of any two options meets.
SOME_SETTINGS = [
    EVERY_SETTING[16 * mu + 4 * temperature + (mu + temperature) % 4]
    for mu in range(4)
    for temperature in range(4)
]


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 127, 1024, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_setting(vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher = rows_of_vocabulary(vocabulary)
    for options in EVERY_SETTING:
        check(student.to(dtype), teacher.to(dtype), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_large_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher = rows_of_vocabulary(vocabulary, seed=1)
    for options in SOME_SETTINGS[:: 1 if vocabulary == 32000 else 5]:
        check(student.to(dtype), teacher.to(dtype), options)


@pytest.mark.parametrize(("v_s", "v_t"), [(151936, 152064), (152064, 151936)])
def test_largest_vocabularies_that_differ(v_s: int, v_t: int) -> None:
    student, teacher = rows_of_vocabulary(152064, seed=2)
    for options in (Options(), Options(0.9, 4.0, "inclusive", "average")):
        check(student[1:9:2, :v_s].bfloat16(), teacher[1:9:2, :v_t].bfloat16(), options)


@pytest.mark.parametrize("vocabulary", [300, 4099])
def test_mixed_dtypes(vocabulary: int) -> None:
    student, teacher = rows_of_vocabulary(vocabulary, seed=3)
    for student_dtype, teacher_dtype in itertools.permutations(DTYPES, 2):
        for options in SOME_SETTINGS[::3]:
            check(student.to(student_dtype), teacher.to(teacher_dtype), options)


@pytest.mark.parametrize(("v_s", "v_t"), [(1, 9), (9, 1), (1400, 1500), (5000, 4097)])
def test_vocabularies_that_differ(v_s: int, v_t: int) -> None:
    student, teacher = rows_of_vocabulary(max(v_s, v_t), seed=4)
    for options in SOME_SETTINGS:
        check(student[:, :v_s], teacher[:, :v_t], options)


@pytest.mark.parametrize("vocabulary", [40, 4099])
@pytest.mark.parametrize("forbidden", ["student", "teacher", "both", "each its own", "most"])
def test_forbidden_tokens(vocabulary: int, forbidden: str) -> None:
    student, teacher = rows_of_vocabulary(vocabulary, seed=5)
    g = generator(6)
    share = 0.9 if forbidden == "most" else 0.2
    mask, other = (torch.rand(student.shape, generator=g) < share for _ in range(2))
    mask[0] = other[0] = False
    if forbidden != "teacher":
        student = student.masked_fill(mask, -INF)
    if forbidden != "student":
        teacher = teacher.masked_fill(other if forbidden == "each its own" else mask, -INF)
    for options in SOME_SETTINGS:
        check(student, teacher, options)


def test_lowest_number_is_not_minus_infinity() -> None:
    """finfo.min, a common mask, is a finite logit on both sides."""
    student, teacher = rows_of_vocabulary(64, seed=7)
    for x in (student, teacher):
        x[:, 50:] = torch.finfo(torch.float32).min
    check(student, teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_large_magnitude(dtype: torch.dtype) -> None:
    student, teacher = rows_of_vocabulary(2000, seed=8)
    for options in SOME_SETTINGS[::5]:
        check((student * 1e3 + 1e4).to(dtype), (teacher * 1e3 - 1e4).to(dtype), options)
        check((student + 1e4).to(dtype), (teacher - 1e4).to(dtype), options)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_sample_that_misleads(offset: int) -> None:
    """All mass is on the tokens that are sampled, or on none of them: the proof must catch it."""
    vocabulary, stride = 8192, 8192 // SAMPLE
    student, teacher = torch.randn(2, 4, vocabulary, generator=generator(9))
    teacher[0, offset::stride] += 20.0
    teacher[1, offset::stride] -= 20.0
    teacher[2, offset :: 2 * stride] += 5.0
    for options in EVERY_SETTING:
        check(student, teacher, options)


@pytest.fixture
def no_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_backend.never_look(monkeypatch)


@pytest.mark.usefixtures("no_looking")
@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_looking(dtype: torch.dtype, forbidden: bool) -> None:
    student, teacher = (x.to(dtype) for x in rows_of_vocabulary(1500, seed=10))
    if forbidden:
        student[1:, 3::7], teacher[1:, 5::11] = -INF, -INF
    for options in SOME_SETTINGS:
        check(student, teacher[:, :1400], options)


@pytest.mark.usefixtures("no_looking")
def test_invalid_rows_without_looking() -> None:
    check_invalid_rows([True, False, True, True, False, True])


@pytest.mark.parametrize(
    "pattern",
    [
        [True, False, True, True, False, True],
        [False, False, True, True, True, False],
        [False, True, False, False, False, False],
        [False] * 6,
        [True] * 6,
    ],
    ids=lambda pattern: "".join("01"[counts] for counts in pattern),
)
def test_invalid_rows(pattern: list[bool]) -> None:
    check_invalid_rows(pattern)


def check_invalid_rows(pattern: list[bool]) -> None:
    """The results of invalid rows are exactly zero whatever they hold; the others are as if
    alone."""
    valid = torch.tensor(pattern)
    student, teacher = rows_of_vocabulary(3000, seed=11)
    student, teacher = student[:6].clone(), teacher[:6].clone()
    student[~valid, 5], teacher[~valid, 7] = torch.nan, INF
    upstream = torch.randn(6, generator=generator(12))
    result, grad = run(student, teacher, valid=valid, upstream=upstream)
    alone, alone_grad = run(student[valid], teacher[valid], upstream=upstream[valid])
    for ours, expected in ((result.loss, alone.loss), (result.stats, alone.stats)):
        assert (ours[~valid] == 0.0).all()
        torch.testing.assert_close(ours[valid], expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert (grad[~valid] == 0.0).all()
    torch.testing.assert_close(grad[valid], alone_grad, rtol=1e-6, atol=1e-9)

    out = student.clone()
    together = torch_backend.forward(
        out, teacher, valid, upstream=upstream, weight=None, out=out, **DEFAULTS._asdict()
    )
    assert torch.equal(out, grad) and torch.equal(together.loss, result.loss)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
def test_a_broken_row_is_nan_alone(side: str, poison: str) -> None:
    student, teacher = rows_of_vocabulary(1500, seed=13)
    sound, sound_grad = run(student, teacher)
    broken = student if side == "student" else teacher
    if poison == "all -inf":
        broken[1] = -INF
    else:
        broken[1, 3] = float(poison)
    result, grad = run(student, teacher)
    assert result.loss[1].isnan() and result.stats[1].isnan().all() and grad[1].isnan().all()
    others = torch.arange(len(grad)) != 1
    torch.testing.assert_close(
        result.stats[others], sound.stats[others], rtol=1e-6, atol=1e-6, equal_nan=True
    )
    torch.testing.assert_close(grad[others], sound_grad[others], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_equal_to_teacher(dtype: torch.dtype) -> None:
    _, teacher = rows_of_vocabulary(1500, seed=14)
    teacher = teacher.to(dtype)
    result, grad = run(teacher.clone(), teacher)
    assert (result.loss == 0.0).all()
    stats = statistics_of(result)
    assert (stats["forward_weight"] == 0.5).all() and (stats["gap"] == 0.0).all()
    assert grad.abs().max() <= 1e-7


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_fixed_weight(weight: float) -> None:
    student, teacher = rows_of_vocabulary(1500, seed=15)
    student[2, 7], teacher[3, 9] = -INF, -INF
    result, grad = run(student, teacher, weight=weight)
    oracle = reference_adaptive_kl(student, teacher, weight=weight)
    torch.testing.assert_close(result.loss.double(), oracle.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), oracle.grad, rtol=1e-5, atol=1e-6)
    stats = statistics_of(result)
    torch.testing.assert_close(stats["gap"].double(), oracle.gap, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats["forward_weight"], torch.full((10,), weight))
    assert stats["head_mass"].isnan().all() and stats["head_size"].isnan().all()


MAPS = {  # of the student, of the teacher
    "softcaps": (LogitMap(3.0), LogitMap(5.0)),
    "scales": (LogitMap(scale=0.5), LogitMap(scale=2.0)),
    "softcap of the student": (LogitMap(30.0, 1.5), LogitMap()),
    "softcap of the teacher": (LogitMap(scale=0.25), LogitMap(4.0, 3.0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maps", MAPS)
def test_mapped_logits(maps: str, dtype: torch.dtype) -> None:
    """The maps reach the loss, the gradient and the head, and an infinity stays one."""
    of_student, of_teacher = MAPS[maps]
    student, teacher = (x.to(dtype) for x in rows_of_vocabulary(1500, seed=15))
    student[2, 7] = teacher[3, 9] = -INF
    broken_student, broken_teacher = student.clone(), teacher.clone()
    broken_student[0, 3], broken_teacher[1, 5] = INF, INF
    arguments: dict[str, Any] = {"student_map": of_student, "teacher_map": of_teacher}
    out = student.clone()
    result = torch_backend.forward(
        out, teacher, None, upstream=torch.ones(10), out=out, weight=0.3, temperature=1.5,
        **arguments,
    )  # fmt: skip
    flat: dict[str, Any] = {
        f"{side}_{name}": value
        for side, of in (("student", of_student), ("teacher", of_teacher))
        for name, value in (("softcap", of.softcap), ("logit_scale", of.scale))
    }
    of = exact(MixedKL(0.3), student, teacher, temperature=1.5, **flat)
    terms = terms_of_gradient(student, teacher, torch.full((10,), 0.3), 1.5, MAPS[maps])
    found = faults(result.loss, out, of, yardstick=YARDSTICK, roundings=0.0, terms=terms)

    def adaptive(s: Tensor, t: Tensor) -> RowResult:
        return torch_backend.forward(s, t, None, weight=None, **DEFAULTS._asdict(), **arguments)

    stats = statistics_of(adaptive(student, teacher))
    found += head_faults_of(stats, student, teacher, **flat)
    assert not found, "\n".join(found)
    broken = adaptive(broken_student, broken_teacher)
    assert broken.loss[:2].isnan().all() and broken.loss[2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("v_s", "v_t"), [(1500, 1500), (1600, 1500), (1500, 1600)])
def test_gradient_in_place(dtype: torch.dtype, v_s: int, v_t: int) -> None:
    """The backward into the student's memory, and the single pass into it, give the same bits as
    the backward into new memory."""
    student, teacher = rows_of_vocabulary(1600, seed=16)
    student, teacher = student[:, :v_s].to(dtype).contiguous(), teacher[:, :v_t].to(dtype)
    student[4, 9], teacher[4, 11] = -INF, -INF
    upstream = torch.randn(10, generator=generator(17))
    result, grad = run(student, teacher, upstream=upstream)

    out = student.clone()
    torch_backend.backward(upstream, out, teacher, None, result.state, temperature=1.0, out=out)
    assert torch.equal(out, grad)

    out = student.clone()
    once = torch_backend.forward(
        out, teacher, None, upstream=upstream, weight=None, out=out, **DEFAULTS._asdict()
    )
    assert torch.equal(out, grad)
    assert torch.equal(once.loss, result.loss) and torch.equal(
        *(x.stats.nan_to_num(-1.0) for x in (once, result))
    )


def test_upstream_scales_the_gradient() -> None:
    student, teacher = rows_of_vocabulary(1500, seed=18)
    _, grad = run(student, teacher)
    upstream = torch.randn(10, generator=generator(19))
    upstream[3] = 0.0
    _, scaled = run(student, teacher, upstream=upstream)
    torch.testing.assert_close(scaled, grad * upstream[:, None], rtol=1e-5, atol=1e-7)
    assert (scaled[3] == 0.0).all()
    _, halved = run(student, teacher, upstream=torch.tensor(0.5).expand(10))
    assert torch.equal(halved, grad * 0.5)


def test_strided_rows_and_no_rows() -> None:
    student, teacher = rows_of_vocabulary(1500, seed=20)
    wide = torch.full((2, 10, 3, 1511), torch.nan)
    wide[0, :, 1, 4:1504], wide[1, :, 1, 4:1504] = student, teacher
    result, grad = run(student, teacher)
    strided, strided_grad = run(wide[0, :, 1, 4:1504], wide[1, :, 1, 4:1504])
    assert torch.equal(*(x.stats.nan_to_num(-1.0) for x in (strided, result))) and torch.equal(
        strided_grad, grad
    )
    empty, empty_grad = run(student[:0], teacher[:0])
    assert empty.loss.shape == (0,) and empty_grad.shape == (0, 1500)


@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_defaults_of_pytorch_change_nothing(default: torch.dtype | str, forbidden: bool) -> None:
    """This includes the search for a head, and a default that puts new tensors on another
    device."""
    student, teacher = (x.bfloat16() for x in rows_of_vocabulary(4096, seed=24))
    if forbidden:
        student[:, ::3], teacher[:, ::5] = -INF, -INF
    upstream = torch.randn(10, generator=generator(25))
    maps: dict[str, Any] = {"student_map": LogitMap(30.0), "teacher_map": LogitMap(50.0, 2.0)}
    settings: list[tuple[Options, dict[str, Any]]] = [
        (DEFAULTS, {}),
        (Options(0.9, 2.0, "inclusive", "average"), maps),
    ]
    valid = torch.arange(10) % 4 > 0

    def every_output() -> list[Tensor]:
        outputs: list[Tensor] = []
        for options, of in settings:
            out = student.clone()
            result = torch_backend.forward(
                out,
                teacher,
                valid,
                upstream=upstream,
                weight=None,
                out=out,
                **options._asdict(),
                **of,
            )
            fixed = torch_backend.forward(
                student, teacher, None, weight=0.3, **options._asdict(), **of
            )
            grad = torch.empty_like(student)
            torch_backend.backward(
                upstream, student, teacher, None, fixed.state,
                temperature=options.temperature, out=grad, **of,
            )  # fmt: skip
            outputs += [*result, out, *fixed, grad]
        return [x.nan_to_num(nan=-1.0) for x in outputs]

    expected = every_output()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found = every_output()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for ours, other in zip(found, expected, strict=True):
        assert ours.dtype == other.dtype and torch.equal(ours, other)


def test_the_same_run_twice_is_bitwise_equal() -> None:
    student, teacher = (x.bfloat16() for x in rows_of_vocabulary(8192, seed=21))
    for options in SOME_SETTINGS[::3]:
        (first, first_grad), (second, second_grad) = (
            run(student, teacher, options) for _ in range(2)
        )
        assert torch.equal(first_grad, second_grad)
        for ours, again in zip(first, second, strict=True):
            assert torch.equal(ours.nan_to_num(-1.0), again.nan_to_num(-1.0))


@pytest.mark.parametrize("budget", [2**22, 2**26])
@pytest.mark.parametrize("kind", ["random", "equal", "two values", "forbidden", "scattered"])
@pytest.mark.parametrize("looking", [True, False])
@pytest.mark.parametrize("weight", [None, 0.5])
def test_temporaries_stay_within_the_budget(
    kind: str, budget: int, looking: bool, weight: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "TEMPORARY_BYTES", budget)
    if not looking:
        torch_backend.never_look(monkeypatch)
    student, teacher = torch.randn(2, 48, 32000, generator=generator(22)).half()
    valid = None
    if kind == "equal":
        teacher.fill_(1.0)
    elif kind == "two values":
        teacher.sign_()
    elif kind == "forbidden":
        teacher[:, ::2], student[:, ::3] = -INF, -INF
    elif kind == "scattered":
        valid = torch.arange(48) % 3 > 0
    grad = torch.empty_like(student)

    def both_ways() -> None:
        result = torch_backend.forward(student, teacher, valid, weight=weight, **DEFAULTS._asdict())
        torch_backend.backward(
            torch.ones(48), student, teacher, valid, result.state, temperature=1.0, out=grad
        )

    peak = peak_temporaries(both_ways, monkeypatch)
    assert peak <= budget, f"{peak / 2**20:.1f} MiB"


def test_a_tenth_of_the_memory_of_the_authors_computation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = torch.randn(2, 96, 49152, generator=generator(23)) * 3.0
    gradient_bytes = student.numel() * 4

    def authors() -> Tensor:
        free = student.detach().requires_grad_()
        grad: Tensor = torch.autograd.grad(authors_adaptive_kl(free, teacher), free)[0]
        return grad

    grad = torch.empty_like(student)

    def ours() -> None:
        result = torch_backend.forward(student, teacher, None, weight=None, **DEFAULTS._asdict())
        torch_backend.backward(
            torch.ones(96), student, teacher, None, result.state, temperature=1.0, out=grad
        )

    theirs = peak_of_one_thread(authors) - gradient_bytes
    assert peak_temporaries(ours, monkeypatch, threads=2) <= theirs / 10


# ---- finite logits at the ends of their dtype's range


def _masked(value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (x.to(dtype) for x in rows_of_vocabulary(1500))
    lowest = max(value, torch.finfo(dtype).min)
    student[:, ::3] = lowest
    teacher[:, 1::3] = lowest
    return student, teacher


def _large(value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (x.to(dtype) for x in rows_of_vocabulary(1500))
    largest = min(value, torch.finfo(dtype).max)
    student[:, 7], teacher[:, 11] = largest, largest
    student[::2, 9], teacher[1::2, 5] = largest, -largest
    return student, teacher


def _tiny(value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = rows_of_vocabulary(1500)
    return (student * value).to(dtype), (teacher * value).to(dtype)


EXTREMES: dict[str, Callable[[torch.dtype], tuple[Tensor, Tensor]]] = {
    "masks of -1e4": lambda dtype: _masked(-1e4, dtype),
    "masks of -1e9": lambda dtype: _masked(-1e9, dtype),
    "masks of -1e30": lambda dtype: _masked(-1e30, dtype),
    "masks of the lowest": lambda dtype: _masked(-INF, dtype),
    "logits of 1e30": lambda dtype: _large(1e30, dtype),
    "logits of the largest": lambda dtype: _large(INF, dtype),
    "subnormals": lambda dtype: _tiny(torch.finfo(dtype).tiny / 64, dtype),
    "all the lowest": lambda dtype: (
        torch.full((2, 300), torch.finfo(dtype).min, dtype=dtype),
        torch.full((2, 300), torch.finfo(dtype).min, dtype=dtype),
    ),
    "all the largest": lambda dtype: (
        torch.full((2, 300), torch.finfo(dtype).max, dtype=dtype),
        torch.full((2, 300), torch.finfo(dtype).max, dtype=dtype),
    ),
}
TEMPERATURES = (1e-30, 0.05, 1.0, 2.0, 1e30)
EXTREME_MAPS = {
    "plain": (LogitMap(), LogitMap()),
    "softcap": (LogitMap(30.0), LogitMap(50.0, 2.0)),
    "tiny softcap": (LogitMap(1e-30), LogitMap(1e-30)),
    "scale": (LogitMap(None, 1e-20), LogitMap(None, 1e20)),
}


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", EXTREMES)
def test_finite_logits_give_finite_results(
    kind: str, dtype: torch.dtype, weight: float | None
) -> None:
    """There is neither 0 * inf nor inf - inf, also in the part whose weight is 0; and results are
    near the oracle's wherever fp32 can hold those."""
    student, teacher = EXTREMES[kind](dtype)
    for temperature, (name, (of_student, of_teacher)) in itertools.product(
        TEMPERATURES, EXTREME_MAPS.items()
    ):
        what = f"T = {temperature}, {name}"
        result = torch_backend.forward(
            student, teacher, None, mu=0.4437, temperature=temperature, head="exclusive",
            ties="stable", weight=weight, student_map=of_student, teacher_map=of_teacher,
        )  # fmt: skip
        gradient = torch.empty_like(student)
        torch_backend.backward(
            torch.ones(len(student)), student, teacher, None, result.state,
            temperature=temperature, out=gradient, student_map=of_student, teacher_map=of_teacher,
        )  # fmt: skip
        assert result.loss.isfinite().all(), what
        unknown = ("cross_entropy", "head_mass", "head_size")[: 1 if weight is None else None]
        known = result.stats[:, [name not in unknown for name in STATISTICS]]
        assert known.isfinite().all(), what
        assert not gradient.isnan().any(), what
        if dtype != torch.float16:  # whose gradients may be too large for it
            assert gradient.isfinite().all(), what
        expected = reference_adaptive_kl(
            student, teacher, mu=0.4437, temperature=temperature, weight=weight,
            student_softcap=of_student.softcap, student_logit_scale=of_student.scale,
            teacher_softcap=of_teacher.softcap, teacher_logit_scale=of_teacher.scale,
        )  # fmt: skip
        near = (expected.loss.abs() < 1e6) & (expected.forward_kl.abs() < 1e30)
        near &= (expected.reverse_kl.abs() < 1e30) & (expected.gap > 1e-2)  # w is as good as that
        if temperature >= 0.05 and name == "plain" and near.any():
            torch.testing.assert_close(
                result.loss[near].double(), expected.loss[near], rtol=1e-4, atol=1e-5, msg=what
            )


# ---- heads of masses that fp32 holds exactly


@pytest.mark.parametrize("ties", ["stable", "average"])
@pytest.mark.parametrize("head", ["exclusive", "inclusive"])
@pytest.mark.parametrize("size", [8, 64, 2048])
def test_dyadic_masses_have_one_head(size: int, head: Head, ties: Ties) -> None:
    """With 2^k equal logits and mu = j / 2^k every mass is exact, and mu (1 +- 2e-6) is no
    excuse."""
    teacher = torch.full((1, size + 3), -INF)
    teacher[:, 2 : size + 2] = 1.5
    student = torch.randn(1, size + 3, generator=generator(1))
    for j in sorted({1, 2, 3, size // 2, size // 2 + 1, size - 1}):
        mu = j / size
        result = torch_backend.forward(
            student, teacher, None, mu=mu, temperature=1.0, head=head, ties=ties, weight=None
        )
        stats = dict(zip(STATISTICS, result.stats[0].tolist(), strict=True))
        assert stats["head_size"] == j
        assert stats["head_mass"] == mu
        expected = reference_adaptive_kl(student, teacher, mu=mu, head=head, ties=ties)
        assert stats["forward_weight"] == pytest.approx(expected.forward_weight.item(), rel=1e-5)


@pytest.mark.parametrize("head", ["exclusive", "inclusive"])
def test_a_head_has_at_least_one_token(head: Head) -> None:
    teacher = torch.tensor([[0.0, 9.0, 0.0, 0.0]])
    student = torch.randn(1, 4, generator=generator(1))
    result = torch_backend.forward(
        student, teacher, None, mu=1e-6, temperature=1.0, head=head, ties="stable", weight=None
    )
    assert dict(zip(STATISTICS, result.stats[0].tolist(), strict=True))["head_size"] == 1


# ---- rounding


@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5])
def test_both_sums_near_convergence(distance: float) -> None:
    """Each sum is of the order of distance^2: a difference of two logarithms would drown it."""
    teacher = 0.1 * torch.randn(16, 30000, generator=generator(0))
    student = teacher + distance * torch.randn(16, 30000, generator=generator(1))
    oracle = reference_adaptive_kl(student, teacher)
    options: dict[str, Any] = {**DEFAULTS._asdict(), "weight": None}
    stats = torch_backend.forward(student, teacher, None, **options).stats.double()
    for column, expected in ((0, oracle.forward_kl), (1, oracle.reverse_kl)):
        assert (stats[:, column] - expected).abs().max() < 3e-7


def test_a_head_of_half_a_million_tokens() -> None:
    vocabulary = 2**20 - 3
    teacher = 1e-3 * torch.randn(1, vocabulary, generator=generator(0))
    student = torch.zeros(1, vocabulary)
    result = torch_backend.forward(
        student,
        teacher,
        None,
        mu=0.5,
        temperature=1.0,
        head="exclusive",
        ties="stable",
        weight=None,
    )
    size = result.stats[:, STATISTICS.index("head_size")]
    assert not at_head(student, teacher, size).wrong.any()


def test_plus_infinity_under_a_softcap() -> None:
    """The tanh of +inf is 1, but a row with +inf has no softmax."""
    student, teacher = torch.randn(2, 3, 50, generator=generator(0))
    student[0, 3], teacher[1, 4] = INF, INF
    capped = LogitMap(30.0)
    result = torch_backend.forward(
        student, teacher, None, mu=0.5, temperature=1.0, head="exclusive", ties="stable",
        weight=None, student_map=capped, teacher_map=capped,
    )  # fmt: skip
    assert result.loss.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, None])
def test_an_infinity_that_one_of_the_sums_would_not_notice(weight: float | None) -> None:
    """exp2 of the far side is 0, so that only one of the sums meets its infinity."""
    for side in (0, 1):
        pair = list(3 * torch.randn(2, 2, 60, generator=generator(2)))
        pair[side][:, 7] = -INF
        pair[1 - side][:, 7] = -200.0
        student, teacher = pair
        result = torch_backend.forward(
            student, teacher, None, mu=0.5, temperature=1.0, head="exclusive", ties="stable",
            weight=weight,
        )  # fmt: skip
        expected = reference_adaptive_kl(student, teacher, weight=weight)
        torch.testing.assert_close(result.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
        gradient = torch.empty_like(student)
        torch_backend.backward(
            torch.ones(2), student, teacher, None, result.state, temperature=1.0, out=gradient
        )
        torch.testing.assert_close(gradient.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_the_head_is_found_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess whose bounds stall would never end; each round moves them at least twice as far."""
    rounds: list[int] = []
    greater = torch.gt

    def counted(*inputs: Any, **options: Any) -> Any:
        rounds[-1] += 1
        return greater(*inputs, **options)

    monkeypatch.setattr(torch, "gt", counted)
    misleading = torch.full((1, 4096), -3.0)
    misleading[:, 1::16] = 5.0  # between the tokens that are sampled
    for teacher in (*rows_of_vocabulary(4096)[1][:, None], misleading):
        for mu in (1e-4, 0.5, 0.9999):
            rounds.append(0)
            torch_backend.forward(
                torch.zeros(1, 4096), teacher, None, mu=mu, temperature=1.0, head="exclusive",
                ties="stable", weight=None,
            )  # fmt: skip
    assert max(rounds) <= 24


# ---- batches of sequences


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("of", [slice(None, 1), slice(None, 2), slice(1, None)], ids=str)
def test_slices_of_sequences_are_taken_in_runs(
    of: slice, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking one sequence at a time would take many times as long for a batch of short ones."""
    many = torch.randn(2, 200, 3, 40, generator=generator(0))
    student, teacher = many[0][:, of], many[1][:, of]
    rows = [x.reshape(-1, 40) for x in (student, teacher)]
    options: dict[str, Any] = {**DEFAULTS._asdict(), "weight": None}
    expected = torch_backend.forward(rows[0], rows[1], None, **options)
    runs = []
    exponentials = eager_chunks.exponentials

    def counted(*inputs: Any) -> Any:
        runs.append(len(inputs[0]))
        return exponentials(*inputs)

    monkeypatch.setattr(eager, "exponentials", counted)
    result = torch_backend.forward(student, teacher, None, **options)
    assert len(runs) <= 9 and sum(runs) == len(rows[0])
    assert torch.equal(result.loss, expected.loss)
    gradients = [torch.empty_like(rows[0]), torch.full_like(many[0], torch.nan)[:, of]]
    if inplace:
        gradients[1] = student
    for (s, t), out in zip(
        ((rows[0].clone(), rows[1]), (student, teacher)), gradients, strict=True
    ):
        upstream = torch.ones(len(rows[0]))
        torch_backend.backward(upstream, s, t, None, expected.state, temperature=1.0, out=out)
    assert torch.equal(gradients[1].reshape(-1, 40), gradients[0])


def test_tokens_that_only_the_student_finds_far_away_are_held() -> None:
    """A difference of logits of 1e37 where p is 0 and q is 1 exceeds fp32 when divided by T =
    1e-3."""
    teacher = torch.full((1, 300), -1e37)
    teacher[0, 0] = 0.0
    student = torch.full((1, 300), -1.0)
    student[0, 1] = 0.0
    for weight in (None, 0.0, 0.5):
        options = Options(temperature=1e-3)._asdict()
        result = torch_backend.forward(student, teacher, None, weight=weight, **options)
        assert result.loss.isfinite().all()
        assert result.stats[:, :3].isfinite().all()


def test_rows_that_span_more_than_fp32_and_are_scaled_down() -> None:
    """Logits at both ends of fp32 whose scale or temperature makes them moderate."""
    ends = torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, 0.0])
    teacher, student = ends[[0, 1, 2, 2]][None], ends[[2, 0, 1, 2]][None]
    for factor in (1e-20, 1e-38):
        expected = reference_adaptive_kl(
            student.double() * factor, teacher.double() * factor, weight=0.5
        )
        by_scale = LogitMap(scale=factor)
        for result in (
            torch_backend.forward(
                student,
                teacher,
                None,
                weight=0.5,
                student_map=by_scale,
                teacher_map=by_scale,
                **DEFAULTS._asdict(),
            ),
            torch_backend.forward(
                student,
                teacher,
                None,
                weight=0.5,
                **Options(temperature=1 / factor)._asdict(),
            ),
        ):
            torch.testing.assert_close(result.loss.double(), expected.loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize("top", [12.0, 1.0])
def test_a_sample_that_misleads_costs_few_sweeps(top: float) -> None:
    """The sampled tokens are the top of the row, and hold nearly all of its mass, or hardly any:
    a bound that moved away by the same step each time would take a hundred sweeps, or forty."""
    teacher = 1e-3 * torch.randn(1, 192 * 256, generator=generator(1))
    teacher[0, ::192] = top - 1e-3 * torch.arange(256)
    student = torch.randn(1, 192 * 256, generator=generator(0))
    sweeps = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal sweeps
            if func is torch.ops.aten.ge.Tensor_out:
                sweeps += args[0].numel() == teacher.numel()
            return func(*args, **(kwargs or {}))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other threads would not be counted
    try:
        with Counting():
            result = torch_backend.forward(
                student, teacher, None, weight=None, **DEFAULTS._asdict()
            )
    finally:
        torch.set_num_threads(threads)
    expected = reference_adaptive_kl(student, teacher)
    assert result.stats[0, STATISTICS.index("head_size")] == expected.head_size
    assert 0 < sweeps <= 12
