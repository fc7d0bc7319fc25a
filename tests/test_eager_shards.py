"""A shard of the vocabulary in the PyTorch backend: what finds a head is what sorting finds, and
rows that are broken or do not count are so alone. What shards add up to is in test_shards.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from akl_triton import (
    DKD,
    AdaptiveKL,
    Divergence,
    eager_shards,
)
from akl_triton.divergences import Rule
from akl_triton.kernels.layout import (
    LARGEST_REFERENCE,
    SHARD_BINS,
    SHARD_CANDIDATES,
    SHARD_PIVOTS,
    SHARD_STATISTICS,
    SHARD_STRIDE,
)
from akl_triton.rows import LogitMap
from akl_triton.shard_keys import key_of, lowest_key, value_of
from akl_triton.shard_maps import in_bits
from tests.support.cases import DIVERGENCES
from tests.support.logits import generator, rows_of_vocabulary

INF, NAN = float("inf"), float("nan")
LN2 = math.log(2.0)
V_S, V_T = 597, 601
ids = repr


def rows_of_every_kind() -> tuple[Tensor, Tensor]:
    """(student [N, V_s], teacher [N, V_t]) fp32, some of them -inf in places, and the last so far
    from 0 that the rounding of its normalisers shows."""
    student, teacher = rows_of_vocabulary(V_T)
    column = torch.arange(V_T)
    for on_s, on_t in (
        (column % 5 == 1, column % 3 == 1),
        (column < 200, column < 0),
        (column < 0, (column >= 200) & (column < 417)),
        (column >= 417, column >= 417),
    ):
        s, t = (torch.randn(1, V_T, generator=generator(len(student))) * 2.0 for _ in range(2))
        student = torch.cat((student, s.masked_fill(on_s, -INF)))
        teacher = torch.cat((teacher, t.flip(-1).masked_fill(on_t, -INF)))
    student = torch.cat((student, student[:1] + 40_000.0))
    teacher = torch.cat((teacher, teacher[:1] - 30_000.0))
    return student[:, :V_S].contiguous(), teacher


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=4e-6, atol=1e-6)


def labels_of(student: Tensor) -> Tensor:
    """[N] tokens in all shards, none of them forbidden."""
    labels = torch.arange(len(student)) * 131 % V_S
    forbidden = student.gather(-1, labels[:, None]).squeeze(-1).isinf()
    return torch.where(forbidden, student.argmax(-1), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_what_finds_a_head_is_what_sorting_finds(dtype: torch.dtype, softcap: float | None) -> None:
    _, teacher = rows_of_every_kind()
    few = torch.where(torch.arange(V_T) % 100 == 3, teacher[:1], -INF)
    rule = Rule(AdaptiveKL(), 2.0, teacher_map=LogitMap(softcap, 1.5))
    logits = torch.cat((teacher, few, torch.full_like(few, -INF))).to(dtype)
    for t in (logits, logits[:, :5], logits[:, :0]):
        out, _ = eager_shards.statistics(t[None], t[None], None, None, rule, False)
        found = dict(zip(SHARD_STATISTICS, out.unbind(-1), strict=False))
        key, candidates, above = out[:, len(SHARD_STATISTICS) :].split(
            (1, SHARD_CANDIDATES, SHARD_BINS), dim=-1
        )
        key = key.contiguous().view(torch.int32).long()
        padded = F.pad(t.float(), (0, V_T - t.shape[-1]), value=-INF)
        ranked = padded.sort(dim=-1, descending=True).values
        assert (candidates == ranked[:, :SHARD_CANDIDATES]).all()
        named = key_of(ranked, dtype) >= key
        assert not named[:, SHARD_CANDIDATES:].any()
        # One key less, and a token that is no candidate would be named, unless there is none.
        next_one = key_of(ranked[:, SHARD_CANDIDATES : SHARD_CANDIDATES + 1], dtype)
        none = ranked[:, SHARD_CANDIDATES : SHARD_CANDIDATES + 1] == -INF
        assert torch.equal(key, torch.where(none, lowest_key(dtype), next_one + 1))

        mass = (
            in_bits(padded, rule.teacher_map, 2.0) - found["reference_t"].double()[:, None]
        ).exp2()
        stride = SHARD_STRIDE / (1.5 / (2.0 * LN2))
        for j in range(SHARD_BINS):
            inside = padded.double() > ranked[:, :1].double() - (j + 1) * stride
            of_shard = found["z_t"].double().clamp(min=1e-30)
            assert_same(above[:, j], (mass * inside).sum(-1) / of_shard)


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_masses_at_pivots(softcap: float | None) -> None:
    _, teacher = rows_of_every_kind()
    rule = Rule(AdaptiveKL(), 2.0, teacher_map=LogitMap(softcap, 1.5))
    by_shape = torch.stack((teacher, teacher.flip(-1)))  # [2, N, V], not what merges
    rows = torch.tensor([3, 1, len(teacher) + 2, 8])
    t = by_shape.flatten(0, 1)[rows]
    pivots = t.gather(-1, torch.randint(V_T, (4, SHARD_PIVOTS), generator=generator(1)))
    ranked = t.sort(dim=-1).values
    ends = torch.stack((ranked[:, 100], ranked[:, 300]), dim=-1)
    asked = torch.cat((pivots, torch.full((4, 1), 3.5), ends), dim=-1)
    out = eager_shards.masses(by_shape, rows, asked, rule)
    mass = (in_bits(t, rule.teacher_map, 2.0) - 3.5).exp2()
    at_or_above = t[:, None, :] >= pivots[:, :, None]
    assert_same(out[:, :SHARD_PIVOTS], (mass[:, None, :] * at_or_above).sum(-1))
    assert torch.equal(out[:, -2], t.masked_fill(t >= ends[:, 1:], -INF).amax(-1))
    assert torch.equal(out[:, -1], t.masked_fill(t < ends[:, :1], INF).amin(-1))
    nothing = eager_shards.masses(by_shape[..., :0], rows, asked, rule)
    assert (nothing[:, :-2] == 0.0).all()
    assert (nothing[:, -2] == -INF).all() and (nothing[:, -1] == INF).all()


def test_no_kl_is_negative_where_no_token_is_dropped() -> None:
    logits = rows_of_vocabulary(V_T)[0]
    out, _ = eager_shards.statistics(
        (logits + 0.3)[None], logits[None], None, None, Rule(AdaptiveKL()), True
    )
    found = dict(zip(SHARD_STATISTICS, out.unbind(-1), strict=False))
    for name in ("forward_kl", "reverse_kl"):
        assert (found[name] >= 0.0).all() and (found[name] < 1e-9).all()


def test_what_a_shard_has_no_mass_or_no_softmax_of() -> None:
    lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    kinds = ([-INF] * 3, [lowest] * 3, [highest, 0.0, 1.0], [NAN, 0.0, 0.0], [INF, 0.0, 0.0])
    student = torch.tensor([*kinds, [0.0, 1.0, 2.0], [lowest, 2.0**27, 1.0]])
    teacher = torch.zeros_like(student)
    rule = Rule(AdaptiveKL())
    for one, other, side in ((student, teacher, "s"), (teacher, student, "t")):
        out, _ = eager_shards.statistics(one[None], other[None], None, None, rule, True)
        found = dict(zip(SHARD_STATISTICS, out.unbind(-1), strict=False))
        z, reference = found[f"z_{side}"], found[f"reference_{side}"]
        assert z[:2].tolist() == [0.0, 0.0] and not z[2:5].isfinite().any() and z[3:5].isnan().all()
        assert reference[:3].tolist() == [-LARGEST_REFERENCE] * 2 + [LARGEST_REFERENCE]
        assert reference.isfinite().all() and z[5:].isfinite().all() and (z[5:] > 0.0).all()
        for name in ("forward_kl", "reverse_kl", "kept_p", "kept_q", "entropy_t", "entropy_s"):
            assert found[name][[0, 1, 2, 5, 6]].isfinite().all(), name


@pytest.mark.parametrize(
    "divergence", [AdaptiveKL(), AdaptiveKL(ties="average"), *DIVERGENCES[7:]], ids=ids
)
def test_a_broken_row_is_nan_and_alone(divergence: Divergence) -> None:
    student, teacher = (x[:-1] for x in rows_of_every_kind())
    n, rule = len(student), Rule(divergence)
    softmaxes = torch.tensor([[20.0, 1.0, 20.0, 1.0, 0.0]]).repeat(n, 1)
    softmaxes[1, 1], softmaxes[2, 3] = NAN, NAN
    boundary = torch.tensor([[1.0, 0.0, 0.0]]).repeat(n, 1)
    blocks = torch.zeros(n, 2)
    has_head = isinstance(divergence, AdaptiveKL)
    columns = list(range(6)) if has_head else [0, 1, 3, 4, 5]
    for columns_s in (V_S, 0):
        out = eager_shards.sums(
            student[None, :, :columns_s], teacher[None, :, :columns_s], None, rule, softmaxes,
            boundary if has_head else None, blocks, True,
        )[:, columns]  # fmt: skip
        assert out[1:3].isnan().all() and out[3:].isfinite().all() and out[0].isfinite().all()
    state = torch.ones(n, 12)
    state[1] = NAN
    ds = torch.zeros_like(student)
    eager_shards.gradient(
        torch.ones(n), student[None], teacher[None], None, None, state, rule, ds[None]
    )
    assert ds[1].isnan().all() and ds[2:].isfinite().all() and ds[0].isfinite().all()


@pytest.mark.parametrize("divergence", [AdaptiveKL(), DKD(), DIVERGENCES[7]], ids=ids)
def test_rows_that_are_not_valid_are_0_and_the_student_may_be_overwritten(
    divergence: Divergence,
) -> None:
    student, teacher = (x[:12].bfloat16() for x in rows_of_every_kind())
    valid = torch.arange(12) % 3 != 1
    labels = labels_of(student)
    rule = Rule(divergence, 2.0, label_weight=0.5)
    state = torch.rand(12, 12, generator=generator(2))
    state[:, :3] = 12.0
    upstream = torch.tensor(0.5).expand(12)
    expected = torch.empty_like(student)
    eager_shards.gradient(
        upstream, student[None], teacher[None], None, labels, state, rule, expected[None]
    )
    expected[~valid] = 0.0
    student[~valid], teacher[1], state[~valid] = NAN, INF, NAN
    padded = torch.zeros(3, 5, V_S + 3, dtype=student.dtype)  # rows that do not merge into [N, V]
    in_place = padded[:, :4, :V_S].copy_(student.view(3, 4, V_S))
    sides = in_place, teacher.view(3, 4, V_T)
    of_shard, _ = eager_shards.statistics(*sides, valid, labels, rule, True)
    assert (of_shard[~valid] == 0.0).all() and (of_shard[valid][:, 1] > 0.0).all()
    softmaxes = torch.tensor([[9.0, 1.0, 9.0, 1.0, 0.0]]).repeat(12, 1)
    boundary = softmaxes[:, :3] if isinstance(divergence, AdaptiveKL) else None
    of_sums = eager_shards.sums(*sides, valid, rule, softmaxes, boundary, torch.zeros(12, 2), True)
    assert (of_sums[~valid] == 0.0).all() and (of_sums[valid][:, 0] > 0.0).all()
    eager_shards.gradient(upstream, *sides, valid, labels, state, rule, in_place)
    assert torch.equal(in_place.reshape(12, V_S), expected)
    assert (padded[:, 4:] == 0.0).all() and (padded[..., V_S:] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keys_are_ordered_as_their_values(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (10_000,), generator=generator(0)).to(torch.int32)
    else:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype).float()
    x = torch.cat((x[~x.isnan()], torch.tensor([0.0, -0.0, INF, -INF, 1.0])))
    key = key_of(x, dtype)
    assert torch.equal(value_of(key, dtype), x)
    assert not value_of(key_of(torch.tensor(-0.0), dtype), dtype).signbit()
    order = x.argsort()
    assert torch.equal(key[order].diff() > 0, x[order].diff() > 0.0)
    lowest = torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).min
    assert lowest_key(dtype) == key_of(torch.tensor(lowest), dtype)
    if dtype != torch.float32:
        assert key_of(torch.tensor(-INF), dtype) == lowest_key(dtype) - 1
        assert key.abs().max() < 2**15
