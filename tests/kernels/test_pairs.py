"""Kernels of a teacher that is pairs, compared with the float64 oracle."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import (
    AdaptiveKL,
    DecoupledKL,
    Divergence,
    ForwardKL,
    LKHybrid,
    MixedKL,
    SparseTeacher,
    checks,
    distillation_loss,
    forward_kl,
    teacher_pairs,
)
from akl_triton.verify import exact_of_pairs, faults, head_faults_of_pairs
from bench.lab import ptxcpu
from bench.lab.compile import TARGETS, RecordedLaunch, record_launches
from bench.lab.sass import analyse
from tests.kernels.conftest import INTERPRETER
from tests.support.cases import V_S, labels_of
from tests.support.pairs import SPARSE_DIVERGENCES, pairs_of_every_kind

INF = float("inf")
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "labels": {"kd_ratio": 0.7},
    "temperature, labels, softcap": {
        "temperature": 2.0,
        "kd_ratio": 0.25,
        "student_softcap": 6.0,
        "student_logit_scale": 0.5,
    },
}


def gradient_of(
    student: Tensor, teacher: SparseTeacher, upstream: Tensor, inplace: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    leaf = student.clone().requires_grad_()
    logits = leaf * 1 if inplace else leaf
    loss, stats = distillation_loss(
        logits,
        teacher,
        reduction="none",
        return_stats=True,
        backend="triton",
        inplace=inplace,
        **options,
    )
    (loss * upstream).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, stats


def check(
    divergence: Divergence,
    student: Tensor,
    teacher: SparseTeacher,
    device: torch.device,
    inplace: bool = False,
    **options: Any,
) -> None:
    upstream = torch.rand(len(student), generator=torch.Generator().manual_seed(2)) + 0.5
    if inplace:  # it is rounded before it is multiplied
        upstream = torch.ones_like(upstream)
    labels = labels_of(student) if "kd_ratio" in options else None
    loss, gradient, stats = gradient_of(
        student.to(device),
        teacher.to(device),
        upstream.to(device),
        inplace,
        divergence=divergence,
        labels=None if labels is None else labels.to(device),
        **options,
    )
    stats = type(stats)(*(column.cpu() for column in stats))
    maps = {name: options[name] for name in options if name.startswith("student_")}
    of_head = {}
    if isinstance(divergence, AdaptiveKL):
        of_head = {name: getattr(stats, name) for name in ("head_size", "forward_weight", "gap")}
        claims = {**of_head, "head_mass": stats.head_mass}
        assert head_faults_of_pairs(divergence, student, teacher, **claims, **maps) == []
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
    assert faults(loss.cpu(), gradient.cpu(), of, upstream=upstream, roundings=roundings) == []


# What a member is of the entries is that of dense teachers, which tests/test_family.py has for all:
# here are the kinds that have code of their own.
MEMBERS = tuple(
    x for x in SPARSE_DIVERGENCES if isinstance(x, (AdaptiveKL, MixedKL, LKHybrid, DecoupledKL))
)


@pytest.mark.parametrize("divergence", MEMBERS, ids=str)
def test_every_kind_of_member(divergence: Divergence, device: torch.device) -> None:
    student, teacher = pairs_of_every_kind()
    check(divergence, student, teacher, device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_options_and_dtypes(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    student, teacher = pairs_of_every_kind(temperature=options.get("temperature", 1.0))
    for inplace in (False, True):
        check(AdaptiveKL(), student.to(dtype), teacher, device, inplace, **options)


@pytest.mark.parametrize("outside", ["zero", "renormalise"])
def test_outside(outside: Any, device: torch.device) -> None:
    student, teacher = pairs_of_every_kind()
    check(
        ForwardKL(),
        student,
        SparseTeacher(teacher.ids.where(teacher.ids < V_S, -1), teacher.log_probs, outside=outside),
        device,
    )


@pytest.mark.parametrize("k", [1, 255, 1024])
def test_numbers_of_pairs(k: int, device: torch.device) -> None:
    """One; as many as fill a block with the rest, which does not begin where they do; the most."""
    student, teacher = pairs_of_every_kind(k)
    check(AdaptiveKL(mu=0.9), student, teacher, device)


@pytest.mark.parametrize("offset", [0, 3])
def test_rows_that_count_and_rows_that_are_broken(
    offset: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a wider tensor, some of which do not count, hold NaN, or have pairs that are broken:
    these are 0, NaN and NaN, and no other row is."""
    monkeypatch.setattr(checks, "check_ids", lambda *_: None)  # which reads values on a CPU
    student, sound = pairs_of_every_kind(finite=False)
    n, v = student.shape
    wide = torch.full((n, v + 19), torch.nan, device=device)
    rows = wide[:, offset : offset + v]
    rows.copy_(student)
    teacher = sound.to(device)
    teacher.ids[0, -1] = teacher.ids[0, -2]
    teacher.ids[2, -1] = v
    mask = torch.arange(n, device=device) % 3 != 1
    leaf = rows.detach().requires_grad_()
    loss = forward_kl(leaf, teacher, mask=mask, reduction="none", backend="triton")
    loss.sum().backward()
    assert leaf.grad is not None
    gradient, loss, counts = leaf.grad.cpu(), loss.detach().cpu(), mask.cpu()
    assert not loss[~counts].any() and not gradient[~counts].any()
    broken = student.isnan().any(-1)
    broken[0] = broken[2] = True
    # All -inf on the teacher's side: no pair has any mass, and neither has the rest.
    broken |= teacher.entries().isnan().any(-1).cpu()
    assert loss[counts & broken].isnan().all() and gradient[counts & broken].isnan().all()
    assert loss[counts & ~broken].isfinite().all() and gradient[counts & ~broken].isfinite().all()
    right = counts & ~broken
    expected = forward_kl(student, sound, reduction="none", mask=right)
    torch.testing.assert_close(loss[right], expected[right], rtol=1e-5, atol=2e-6)


# ---------------------------------------------------------------- compiled code

compiled = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")


def launched(target: str, sizes: tuple[int, int, int] = (2, 151_936, 64)) -> list[RecordedLaunch]:
    """What a step launches, of N, V and k."""
    n, v, k = sizes
    student = torch.zeros(n, v, dtype=torch.bfloat16, requires_grad=True)
    teacher = SparseTeacher(torch.arange(k).expand(n, -1), torch.full((n, k), 0.5 / k).log())
    with record_launches(target) as launches:
        distillation_loss(student, teacher, backend="triton").backward()
    return launches


@compiled
@pytest.mark.parametrize("target", TARGETS)
def test_loops_over_full_blocks_move_16_bytes(target: str) -> None:
    for launch in launched(target):
        if not launch.name.startswith("pairs"):
            continue
        code = analyse(launch.compiled)
        loops = [
            loop.body
            for loop in code.innermost_loops
            if loop.body.special.get("ex2", 0) and loop.body.bytes_loaded
        ]
        unrolled = max(loops, key=lambda body: body.bytes_loaded)
        assert set(unrolled.global_loads) == {16}
        assert unrolled.barriers == unrolled.shuffles == unrolled.local_accesses == 0
        if launch.name == "pairs_gradient_kernel":
            assert unrolled.global_stores == unrolled.global_loads


@compiled
def test_one_compilation_serves_all_sizes() -> None:
    """N, V and k are run-time values but for the class of k; the entries, which are k + 1, have an
    alignment as other rows do."""
    seen: dict[str, set[str]] = {}
    for sizes in ((2, 151_936, 64), (3, 32_000, 50), (7, 49_152, 33)):
        for launch in launched("sm_90", sizes):
            seen.setdefault(launch.name, set()).add(launch.compiled.hash)
    assert len(seen["pairs_kernel"]) == len(seen["pairs_gradient_kernel"]) == 1
    assert len(seen["forward_kernel"]) <= 2 and len(seen["backward_kernel"]) <= 2


@compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="ptxcpu needs the C++ compiler g++")
def test_pairs_and_labels_are_read_before_and_written_after_the_others() -> None:
    """In place, another warp may be ahead."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5003, generator=g).bfloat16()
    pairs = teacher_pairs(teacher, 24)
    labels = pairs.ids[:, 3].long()
    labels[::2] = torch.linspace(0, 5002, 3).long()
    results: list[Tensor] = []
    for schedule in range(9):
        leaf = student.clone().requires_grad_()
        with ptxcpu.active(arch=90, sched=schedule):
            loss = forward_kl(
                1.0 * leaf, pairs, labels, kd_ratio=0.5, inplace=True, backend="triton"
            )
            loss.backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
        assert torch.equal(leaf.grad, results[0]), f"schedule {schedule}"
