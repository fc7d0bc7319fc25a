"""Loss, statistics, head and gradient of the kernels, compared with the float64 oracle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from akl_triton.kernels.launch_table import launch_for
from akl_triton.reference import Head, Ties, reference_adaptive_kl
from tests.kernels.rows import KINDS, assert_right, make_rows, run

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MU = (0.01, 0.5, 0.9, 0.999)
TEMPERATURE = (0.5, 1.0, 2.0, 4.0)
DTYPES = list(itertools.product((FP32, BF16, FP16), repeat=2))


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture
def small(mode: str) -> bool:
    """Fewer rows for the interpreter if they are long: it takes a second for 0.4 M logits."""
    return mode == "interpreter"


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16)], ids=name_of)
@pytest.mark.parametrize(
    "v", [1, 2, 31, 127, 1024, 32000, 49152, 50257, 128256, 151936, 152064], ids=str
)
def test_vocabularies(
    v: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, small: bool
) -> None:
    """Every size and every kind of row, with mu and T in pairs that contain each value of both."""
    student, teacher = (x.to(device) for x in make_rows(v, v, *dtypes))
    if small and v > 1024:
        rows = [KINDS.index(kind) for kind in ("zipf", "ties")]
        student, teacher = student[rows], teacher[rows]
    for mu, temperature in list(zip(MU, TEMPERATURE, strict=True))[1 if small else 0 :]:
        output = run(student, teacher, mu=mu, temperature=temperature)
        assert_right(output, student, teacher, mu=mu, temperature=temperature)
        if small and v > 1024:
            return


@pytest.mark.parametrize("dtypes", DTYPES, ids=name_of)
@pytest.mark.parametrize("v", [127, 5003], ids=str)
def test_mixed_dtypes(
    v: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    student, teacher = (x.to(device) for x in make_rows(v, v, *dtypes, seed=1))
    upstream = torch.randn(len(KINDS), generator=torch.Generator().manual_seed(2)).to(device)
    output = run(student, teacher, upstream=upstream)
    assert_right(output, student, teacher, upstream=upstream)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@pytest.mark.parametrize("ties", ["stable", "average"])
@pytest.mark.parametrize("head", ["exclusive", "inclusive"])
def test_rules(
    head: Head, ties: Ties, dtype: torch.dtype, device: torch.device, small: bool
) -> None:
    """Both head rules and both tie rules over all mu and T."""
    v = 3000
    student, teacher = (x.to(device) for x in make_rows(v, v, dtype, dtype, seed=3))
    pairs = list(itertools.product(MU, TEMPERATURE))
    for mu, temperature in pairs[::5] if small else pairs:
        options: dict[str, Any] = {"mu": mu, "temperature": temperature, "head": head, "ties": ties}
        assert_right(run(student, teacher, **options), student, teacher, **options)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_fixed_weight(weight: float | None, device: torch.device) -> None:
    student, teacher = (x.to(device) for x in make_rows(3000, 3000, BF16, BF16, seed=4))
    options: dict[str, Any] = {"weight": weight, "temperature": 2.0}
    output = run(student, teacher, **options)
    assert_right(output, student, teacher, **options)
    assert output.stats[:, 3:5].isnan().all()  # there is no head


MAPS: dict[str, dict[str, float]] = {
    "Gemma": {"student_softcap": 30.0, "teacher_softcap": 30.0},
    "saturated": {"student_softcap": 2.0, "teacher_softcap": 3.0, "teacher_logit_scale": 4.0},
    "scales": {"student_logit_scale": 0.75, "teacher_logit_scale": 1.5},
    "softcap of one side": {"teacher_softcap": 5.0, "student_logit_scale": 0.5},
}


# Kernels with a softcap take half a minute to compile, so that only the interpreter tries the other
# dtypes.
COMPILED_MAPS = ("Gemma", "saturated", "scales")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
@pytest.mark.parametrize("maps", MAPS)
def test_softcap_and_scale(
    maps: str, dtype: torch.dtype, device: torch.device, small: bool
) -> None:
    """The head is ordered by the logits that are passed, also where the softcap makes them equal;
    infinities stay."""
    if not small and (dtype != BF16 or maps not in COMPILED_MAPS):
        pytest.skip("interpreted only")
    if small and (maps, dtype) == ("saturated", FP32):
        pytest.skip("the interpreter has no FMA, and fp32 no rounding that would hide it")
    student, teacher = (x.to(device) for x in make_rows(3000, 3000, dtype, dtype, seed=7))
    student[0, 7] = teacher[1, 2500:2600] = teacher[2, 4] = -torch.inf
    pairs = list(zip(MU, TEMPERATURE, strict=True))
    for mu, temperature in pairs[1:2] if small else pairs:
        options: dict[str, Any] = {"mu": mu, "temperature": temperature, **MAPS[maps]}
        assert_right(run(student, teacher, **options), student, teacher, **options)
    student[3, 2000] = teacher[4, 1] = torch.inf
    broken = run(student, teacher, **options)
    for output in broken:
        assert output[3:5].isnan().all()
    assert broken.loss[:3].isfinite().all() and broken.loss[5:].isfinite().all()


@pytest.mark.parametrize("v_s, v_t", [(151936, 152064), (152064, 151936), (5003, 4000), (40, 300)])
def test_two_vocabularies(v_s: int, v_t: int, device: torch.device, small: bool) -> None:
    student, teacher = (x.to(device) for x in make_rows(v_s, v_t, BF16, BF16, seed=5))
    if small:
        student, teacher = student[:3], teacher[:3]
    assert_right(run(student, teacher), student, teacher)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_minus_infinity(dtype: torch.dtype, device: torch.device) -> None:
    """-inf on one side, the other, or both; in full blocks, in edge blocks, and in whole
    stretches."""
    v = 5003
    student, teacher = (x.to(device) for x in make_rows(v, v, dtype, dtype, seed=6))
    lowest = torch.finfo(dtype).min
    teacher[0, 7] = teacher[1, 2500:2600] = teacher[2, 4999:] = -torch.inf
    student[1, 9] = student[3, 2500:2600] = student[4, :2100] = -torch.inf
    teacher[5, ::3] = student[5, ::2] = -torch.inf
    teacher[6, 100:4900] = student[6, 100:4900] = -torch.inf
    teacher[7, 50:60] = student[7, 50:60] = lowest  # a mask that is no infinity
    teacher[3, :2200] = -torch.inf
    assert_right(run(student, teacher), student, teacher)


def test_heavy_tokens_behind_a_slot_maximum(device: torch.device) -> None:
    """Columns a block apart share a slot, whose maximum is only the heavier of two."""
    v, block = 5003, launch_for("head or statistics", 5003).BLOCK
    student, teacher = (x.to(device) for x in make_rows(v, v, BF16, BF16, seed=11))
    student, teacher = student[:4], torch.zeros_like(teacher[:4])
    for row, logits in enumerate(((12.0, 11.5), (11.5, 12.0), (12.0, 12.0), (9.0, 12.0))):
        teacher[row, 7], teacher[row, 7 + block] = logits
        teacher[row, 900:903] = 11.0
    for mu in (0.1, 0.5, 0.7, 0.9):
        assert_right(run(student, teacher, mu=mu), student, teacher, mu=mu)


@pytest.mark.parametrize(
    "temperature, logit",
    [(1e-3, 29.28602409362793), (1e-2, 56.85852813720703), (1.0, 29258.802734375)],
)
def test_ties_of_large_fp32_logits(
    temperature: float, logit: float, device: torch.device, small: bool
) -> None:
    """When equal logits share a slot, the second is as heavy as the maximum that hides it."""
    if small:
        pytest.skip("the interpreter has no FMA: large arguments are for compiled kernels")
    v, block = 5003, launch_for("head or statistics", 5003).BLOCK
    student, teacher = (x.to(device) for x in make_rows(v, v, FP32, FP32, seed=12))
    student, teacher = student[:2].clone(), teacher[:2].clone()
    teacher[0, 100] = teacher[0, 100 + block] = logit
    student[0, 100], student[0, 100 + block] = 4 * temperature, 3 * temperature
    teacher[1] = logit
    student[1] *= temperature
    options: dict[str, Any] = {"mu": 0.3, "temperature": temperature}
    assert_right(run(student, teacher, **options), student, teacher, **options)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
def test_head_of_all_the_mass(dtype: torch.dtype, device: torch.device) -> None:
    """A mu next to 1, which in fp32 is equal to it; also in rows so flat that fp16 cannot hold
    their probabilities."""
    student, teacher = (x.to(device) for x in make_rows(3000, 3000, dtype, dtype, seed=13))
    student, teacher = student[:4], teacher[:4]
    for temperature in (1.0, 3000.0):
        options: dict[str, Any] = {"mu": 1 - 1e-9, "temperature": temperature}
        assert_right(run(student, teacher, **options), student, teacher, **options)


@pytest.mark.parametrize("v", [3000, 151936])
def test_distributions_that_hardly_differ(v: int, device: torch.device, small: bool) -> None:
    """The rounding of both normalisers, 5e-7 here, does not enter the loss."""
    if small and v > 3000:
        pytest.skip("too long to interpret")
    g = torch.Generator().manual_seed(14)
    teacher = 2 * torch.randn(4, v, generator=g)
    student = teacher + torch.randn(4, v, generator=g)
    options: dict[str, Any] = {"weight": 1.0, "temperature": 1000.0}
    loss = run(student.to(device), teacher.to(device), **options).loss.cpu()
    exact = reference_adaptive_kl(student, teacher, **options).loss
    assert (loss - exact).abs().max() < 2e-7


def test_rows_that_are_not_valid_are_nan_alone(device: torch.device) -> None:
    student, teacher = (x.to(device) for x in make_rows(3000, 3000, BF16, BF16, seed=7))
    good = run(student, teacher)
    teacher[1, 2999] = student[2, 0] = torch.nan
    teacher[3, 1500] = student[4, 2500] = torch.inf
    teacher[5] = student[6] = -torch.inf
    bad = run(student, teacher)
    for i in range(len(KINDS)):
        if 1 <= i <= 6:
            assert bad.loss[i].isnan() and bad.stats[i].isnan().all()
            assert bad.gradient[i].isnan().all()
        else:
            assert torch.equal(bad.loss[i], good.loss[i])
            assert torch.equal(bad.gradient[i], good.gradient[i])


def test_ignored_rows_are_exactly_zero(device: torch.device) -> None:
    student, teacher = (x.to(device) for x in make_rows(3000, 3000, BF16, BF16, seed=8))
    good = run(student, teacher)
    valid = torch.tensor([i % 3 != 1 for i in range(len(KINDS))], device=device)
    student[~valid] = teacher[~valid] = torch.nan
    output = run(student, teacher, valid=valid)
    for ours, all_rows in zip(output, good, strict=True):
        assert torch.equal(ours[valid], all_rows[valid])
        assert (ours[~valid] == 0).all()
    nothing = run(student, teacher, valid=torch.zeros_like(valid))
    assert all((x == 0).all() for x in nothing)


@pytest.mark.parametrize("v", [3000, 5003])
def test_one_launch_writes_the_same_gradient(v: int, device: torch.device) -> None:
    student, teacher = (x.to(device) for x in make_rows(v, v, BF16, BF16, seed=9))
    upstream = torch.linspace(-1, 2, len(KINDS), device=device)
    two = run(student, teacher, upstream=upstream)
    one = run(student, teacher, upstream=upstream, in_one_launch=True)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_the_same_run_twice_is_bitwise_equal(device: torch.device) -> None:
    student, teacher = (x.to(device) for x in make_rows(5003, 5003, BF16, FP32, seed=10))
    first, second = run(student, teacher), run(student, teacher)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_forbidden_tokens_are_noticed_by_either_sum(
    side: str, weight: float, device: torch.device
) -> None:
    """A -inf in a full block, in a kernel that has only one of the KL sums."""
    v = 5000
    student, teacher = torch.randn(2, 1, v, generator=torch.Generator().manual_seed(0))
    (student if side == "student" else teacher)[0, 2500] = -torch.inf
    output = run(student.to(device), teacher.to(device), weight=weight, statistics=False)
    exact = reference_adaptive_kl(student, teacher, weight=weight)
    torch.testing.assert_close(output.loss.cpu().double(), exact.loss, rtol=3e-6, atol=0)
    torch.testing.assert_close(output.gradient.cpu().double(), exact.grad, rtol=0, atol=1e-7)


def test_the_rounding_of_a_large_normaliser_is_put_back(device: torch.device) -> None:
    """An lse of 2e4 is exact to 2^-10 in fp32, which alone would put p off by 7e-4."""
    noise = torch.randn(2, 2, 3000, generator=torch.Generator().manual_seed(0))
    teacher = 2 * noise[0] + 2e4
    student = teacher + noise[1]
    options: dict[str, Any] = {"temperature": 1.4426950408889634}  # log2 e: products are exact
    output = run(student.to(device), teacher.to(device), **options)
    exact = reference_adaptive_kl(student, teacher, **options)
    for column, expected in ((0, exact.forward_kl), (1, exact.reverse_kl), (5, exact.gap)):
        ours = output.stats[:, column].cpu().double()
        torch.testing.assert_close(ours, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("ties", ["stable", "average"])
def test_an_inclusive_head_is_never_empty(ties: Ties, device: torch.device) -> None:
    """A mu that is 0 in fp32 is reached by the first token, and not by none."""
    student, teacher = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(0))
    output = run(student.to(device), teacher.to(device), mu=1e-50, head="inclusive", ties=ties)
    assert output.stats[:, 4].tolist() == [1.0, 1.0]
