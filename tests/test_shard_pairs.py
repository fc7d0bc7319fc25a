"""Teachers that are pairs, of a student whose vocabulary is sharded: all ranks in this process,
compared with the oracle.

The rows are those of tests/support/pairs.py, and what is right is what tests/test_sparse.py says:
every rank has to have the loss and statistics of whole rows, and its own columns of the gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    SparseTeacher,
    distillation_loss,
    forward_kl,
    teacher_pairs,
)
from akl_triton.kernels.layout import STATISTICS
from akl_triton.losses import rule_of
from akl_triton.options import LOSS_OPTIONS, completed
from akl_triton.rows import damping
from akl_triton.verify import exact_of_pairs, faults, head_faults_of_pairs
from bench.inputs.lockstep import Ranks, run_ranks
from tests.support.cases import V_S, labels_of
from tests.support.pairs import SPARSE_DIVERGENCES, pairs_of_every_kind

INF = float("inf")
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
# Uneven, one of them empty.
WIDTHS = (V_S // 2 + 3, 0, V_S // 8, V_S - V_S // 2 - 3 - V_S // 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "labels": {"kd_ratio": 0.7},
    "temperature, labels, softcap": {
        "temperature": 2.0,
        "kd_ratio": 0.25,
        "student_softcap": 6.0,
        "student_logit_scale": 0.5,
    },
    "temperature": {"temperature": 2.0},
}
# What a member is of the entries is that of whole rows: one has a head, one a sum of terms.
COMPILED = AdaptiveKL(), JensenShannon()


def cases() -> list[Any]:
    found = []
    for divergence in SPARSE_DIVERGENCES:
        for name in ("torch", "triton"):
            for options in OPTIONS:
                some = options in ("", "temperature, labels, softcap")
                if name == "torch" and INTERPRETER:
                    continue
                if name == "triton" and not (some and divergence in COMPILED):
                    continue
                title = f"{divergence}-{name}-{options}"
                found.append(pytest.param(divergence, name, options, id=title))
    return found


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if name == "torch" or INTERPRETER or torch.cuda.is_available():
        yield name
        return
    pytest.importorskip("triton")
    from bench.lab import ptxcpu

    with ptxcpu.active(arch=90):
        yield name


# Interpreted kernels need no compilation.
NAMES = ("triton",) if INTERPRETER else ("torch", "triton")
both_backends = pytest.mark.parametrize("backend", NAMES, indirect=True)
uncompiled = pytest.mark.parametrize("backend", NAMES[:1], indirect=True)


def run(
    divergence: Divergence,
    backend: str,
    student: Tensor,
    teacher: SparseTeacher,
    labels: Tensor | None = None,
    widths: tuple[int, ...] = WIDTHS,
    valid: Tensor | None = None,
    upstream: Tensor | None = None,
    inplace: bool = False,
    with_stats: bool = True,
    damped: bool = False,
    **options: Any,
) -> tuple[Ranks, Tensor, dict[str, Tensor], Tensor]:
    """(ranks, loss, statistics, gradient), of which all ranks have the same, on the CPU."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    rule = rule_of(divergence, completed(LOSS_OPTIONS, options))
    if upstream is None:
        upstream = torch.ones(len(student))
    ranks = run_ranks(
        student.to(device),
        teacher.entries().to(device),
        widths,
        rule._replace(rest=teacher.outside != "renormalise"),
        backend=backend,
        upstream=upstream.to(device),
        valid=None if valid is None else valid.to(device),
        labels=None if labels is None else labels.to(device),
        ids=teacher.ids.to(device),
        inplace=inplace,
        with_stats=with_stats,
        damped=damped,
    )
    of_first = ranks.results[0]
    for result in ranks.results[1:]:  # to the bit
        assert torch.equal(result.loss.nan_to_num(-1.0), of_first.loss.nan_to_num(-1.0))
        assert torch.equal(result.stats.nan_to_num(-1.0), of_first.stats.nan_to_num(-1.0))
    assert ranks.rounds == 1
    stats = dict(zip(STATISTICS, of_first.stats.cpu().unbind(1), strict=True))
    return ranks, of_first.loss.cpu(), stats, torch.cat(ranks.gradients, dim=-1).cpu()


def check(
    divergence: Divergence,
    backend: str,
    student: Tensor,
    teacher: SparseTeacher,
    inplace: bool = False,
    **options: Any,
) -> None:
    labels = labels_of(student) if "kd_ratio" in options else None
    upstream = torch.linspace(-1.0, 2.0, len(student))
    _, loss, stats, gradient = run(
        divergence, backend, student, teacher, labels, upstream=upstream, inplace=inplace, **options
    )
    maps = {name: options[name] for name in options if name.startswith("student_")}
    of_head: dict[str, Any] = {}
    found = []
    if isinstance(divergence, AdaptiveKL):
        of_head = {name: stats[name] for name in ("head_size", "forward_weight", "gap")}
        claims = {**of_head, "head_mass": stats["head_mass"]}
        found += head_faults_of_pairs(divergence, student, teacher, **claims, **maps)
    of = exact_of_pairs(
        divergence,
        student,
        teacher,
        labels=labels,
        kd_ratio=options.get("kd_ratio", 1.0),
        **of_head,
        **maps,
    )
    roundings = 1.0 if INTERPRETER else 0.5  # where bf16 is truncated
    found += faults(loss, gradient, of, upstream=upstream, roundings=roundings)
    _, whole = distillation_loss(
        student,
        teacher,
        labels,
        divergence=divergence,
        reduction="none",
        return_stats=True,
        backend="torch",
        **options,
    )
    for name in ("forward_kl", "reverse_kl", "gap", "student_entropy", "teacher_entropy"):
        theirs = getattr(whole, name)
        if not torch.allclose(stats[name], theirs, rtol=3e-6, atol=3e-6, equal_nan=True):
            found.append(f"{name}: {stats[name].tolist()} for {theirs.tolist()}")
    assert torch.equal(stats["top1_agreement"], whole.top1_agreement)
    torch.testing.assert_close(stats["cross_entropy"], whole.cross_entropy, equal_nan=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("divergence, backend, options", cases(), indirect=["backend"])
def test_every_member(divergence: Divergence, backend: str, options: str) -> None:
    student, teacher = pairs_of_every_kind(temperature=OPTIONS[options].get("temperature", 1.0))
    check(divergence, backend, student, teacher, **OPTIONS[options])


@both_backends
def test_gradient_in_the_place_of_the_logits(backend: str) -> None:
    student, teacher = pairs_of_every_kind()
    check(JensenShannon(), backend, student.bfloat16(), teacher, True, kd_ratio=0.7)


@uncompiled
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_in_the_place_of_fp32_logits(options: dict[str, Any], backend: str) -> None:
    student, teacher = pairs_of_every_kind(temperature=options.get("temperature", 1.0))
    check(AdaptiveKL(), backend, student, teacher, True, **options)


@uncompiled
def test_gradient_in_fp16_is_divided_by_what_bounds_it(backend: str) -> None:
    student, teacher = pairs_of_every_kind()
    student, labels = student.half(), labels_of(student)
    _, loss, _, gradient = run(
        ForwardKL(), backend, student, teacher, labels, inplace=True, damped=True, kd_ratio=0.7
    )
    of = exact_of_pairs(ForwardKL(), student, teacher, labels=labels, kd_ratio=0.7)
    whole = gradient.double() * damping(loss).double()[:, None]
    torch.testing.assert_close(whole, of.oracle.grad, rtol=2e-3, atol=1e-6)


@uncompiled
@pytest.mark.parametrize("outside", ["zero", "renormalise"])
def test_outside(outside: Any, backend: str) -> None:
    student, teacher = pairs_of_every_kind()
    ids = teacher.ids.where(teacher.ids < V_S, -1)
    check(ForwardKL(), backend, student, SparseTeacher(ids, teacher.log_probs, outside=outside))


@uncompiled
def test_statistics_are_left_out(backend: str) -> None:
    student, teacher = pairs_of_every_kind()
    student[0] += 4e6  # this row has a base, and its largest logit is asked for all the same
    with_stats, without = (
        run(ForwardKL(), backend, student, teacher, with_stats=some) for some in (True, False)
    )
    assert torch.equal(with_stats[1], without[1]) and torch.equal(with_stats[3], without[3])


@pytest.mark.skipif(INTERPRETER, reason="without an FMA scale x is rounded before lse is taken off")
@both_backends
def test_logits_far_from_0_and_from_those_of_other_shards(backend: str) -> None:
    """The kernels' references are beyond what fp32 could add a sum to."""
    student, teacher = pairs_of_every_kind()
    starts = [sum(WIDTHS[:rank]) for rank in range(len(WIDTHS))]
    student[0] += 4e6
    student[1, : starts[1]] += 4e6
    student[2] += 5e3
    student[3, starts[3] :] -= 4e6
    student[4] -= 4e6
    student[6, starts[2] :] += 5e3
    check(JensenShannon(), backend, student, teacher)
    if backend == "torch":
        check(ForwardKL(), backend, student, teacher)


@both_backends
def test_columns_that_are_no_tokens(backend: str) -> None:
    student, teacher = pairs_of_every_kind()
    padded = torch.nn.functional.pad(student, (0, 2000), value=torch.nan)
    widths = (*WIDTHS[:3], WIDTHS[3] + 900, 1100)
    _, loss, _, gradient = run(
        AdaptiveKL(), backend, padded, teacher, widths=widths, vocab_size=V_S
    )
    _, expected, _, of_tokens = run(AdaptiveKL(), backend, student, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, :V_S], of_tokens, rtol=1e-5, atol=1e-6)
    assert not gradient[:, V_S:].any()


@uncompiled
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_that_count_and_rows_that_are_broken(temperature: float, backend: str) -> None:
    """What is broken for one rank is NaN on all, and in no other row; a shard of which nothing is
    finite is not broken."""
    sound, teacher = pairs_of_every_kind(temperature=temperature)
    options: dict[str, Any] = {"kd_ratio": 0.7, "temperature": temperature}
    starts = [sum(WIDTHS[:rank]) for rank in range(len(WIDTHS))]
    labels = labels_of(sound)
    for row in (0, 2, 4):
        sound[row, starts[2] : starts[3]] = -INF
    sound[4] -= 5e3
    labels[4] = starts[3]
    sound[7, starts[3]] = -INF  # not the label, but the first token of a shard
    student, targets = sound.clone(), labels.clone()
    pairs = SparseTeacher(
        teacher.ids.clone(), teacher.log_probs, teacher.log_tail, temperature=temperature
    )
    pairs.ids[0] = torch.arange(starts[2], starts[2] + pairs.ids.shape[1])
    pairs.ids[0, 1] = pairs.ids[0, 0]  # in the shard of which nothing is finite
    pairs.ids[1, -1] = V_S
    student[2, starts[2] + 5] = torch.nan
    student[3, starts[3]] = INF
    student[5, 3] = torch.nan
    targets[6] = V_S
    valid = torch.arange(len(student)) != 5
    broken = torch.tensor([0, 1, 2, 3, 6])
    ranks, loss, stats, gradient = run(
        ForwardKL(), backend, student, pairs, targets, valid=valid, **options
    )
    for of_rank in (*ranks.gradients, loss[:, None]):
        assert of_rank[broken].isnan().all() and not of_rank[5].any()
    leaf = sound.requires_grad_()
    expected, whole = forward_kl(
        leaf, teacher, labels, reduction="none", return_stats=True, backend="torch", **options
    )
    expected.sum().backward()
    assert leaf.grad is not None
    right = torch.tensor([4, 7])
    torch.testing.assert_close(loss[right], expected.detach()[right], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[right], leaf.grad[right], rtol=1e-5, atol=1e-6)
    for name in ("student_entropy", "cross_entropy", "top1_agreement"):
        torch.testing.assert_close(stats[name][right], getattr(whole, name)[right])


@uncompiled
def test_a_row_of_which_no_shard_has_anything_is_nan(backend: str) -> None:
    student, teacher = pairs_of_every_kind()
    student[1] = -INF
    _, loss, _, gradient = run(ForwardKL(), backend, student, teacher)
    rows = torch.arange(len(student)) == 1
    assert torch.equal(loss.isnan(), rows)
    assert torch.equal(gradient.isnan().all(1), rows) and not gradient[~rows].isnan().any()


def test_what_is_sent() -> None:
    """Once, and less than a 100th of the logits of a row."""
    student, _ = pairs_of_every_kind()
    ranks, *_ = run(AdaptiveKL(), "torch", student, teacher_pairs(student, 64))
    assert ranks.rounds == 1 and ranks.bytes_of_row <= 300


def test_one_shard_is_the_whole() -> None:
    student, teacher = pairs_of_every_kind()
    _, loss, _, gradient = run(JensenShannon(), "torch", student, teacher, widths=(V_S,))
    leaf = student.requires_grad_()
    expected = distillation_loss(
        leaf, teacher, divergence=JensenShannon(), reduction="none", backend="torch"
    )
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)
