"""The code of the kernels of a shard. What they compute is in tests/test_shards.py."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from akl_triton import AdaptiveKL, Divergence, JensenShannon, MixedKL
from akl_triton.backend import TritonShards
from akl_triton.divergences import Rule
from akl_triton.kernels.layout import SHARD_PIVOTS
from bench.lab import ptxcpu
from bench.lab.compile import TARGETS, RecordedLaunch, record_launches
from bench.lab.sass import analyse
from tests.kernels.conftest import INTERPRETER

compiled = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
KERNELS = ("shard_statistics_kernel", "shard_masses_kernel", "shard_sums_kernel")


def sweeps(divergence: Divergence, student: Tensor, teacher: Tensor) -> list[Tensor]:
    """All that a shard is asked for, of [N, V]; the softmax is that of its own."""
    n = len(student)
    rule, sides = Rule(divergence), (student[None], teacher[None])
    statistics, blocks = TritonShards.statistics(*sides, None, None, rule, False)
    reference_t, z_t, reference_s, z_s = statistics[:, :4].unbind(1)
    softmaxes = torch.stack((reference_t, z_t, reference_s, z_s, 0.0 * z_s), 1)
    boundary = None
    results = [statistics]
    if isinstance(divergence, AdaptiveKL):
        boundary = torch.tensor([[1.0, 2.0, 3.0]]).repeat(n, 1)
        pivots = torch.linspace(-2.0, 2.0, SHARD_PIVOTS).repeat(n, 1)
        asked = torch.cat((pivots, reference_t[:, None], pivots[:, [0, -1]]), 1)
        results.append(TritonShards.masses(sides[1], torch.arange(n), asked, rule))
    results.append(TritonShards.sums(*sides, None, rule, softmaxes, boundary, blocks, False))
    return results


def launched(
    target: str,
    divergence: Divergence,
    shape: tuple[int, int] = (2, 37_984),
    dtype: torch.dtype = torch.bfloat16,
) -> list[RecordedLaunch]:
    student, teacher = torch.zeros(2, *shape, dtype=dtype)
    with record_launches(target) as launches:
        sweeps(divergence, student, teacher)
    return launches


@compiled
@pytest.mark.parametrize("target", TARGETS)
def test_loops_over_full_blocks(target: str) -> None:
    """They read 16 bytes at a time of two rows, or of one, and leave the registers to nobody."""
    for launch in launched(target, AdaptiveKL()):
        assert launch.name in KERNELS
        code = analyse(launch.compiled)
        loops = [
            loop.body
            for loop in code.innermost_loops
            if loop.body.special.get("ex2", 0) and loop.body.bytes_loaded
        ]
        widest = max(loops, key=lambda body: max(body.global_loads))
        assert max(widest.global_loads) == (8 if launch.name == "shard_masses_kernel" else 16)
        assert widest.barriers == widest.shuffles == widest.local_accesses == 0


@compiled
@pytest.mark.parametrize("divergence", [AdaptiveKL(), MixedKL(), JensenShannon()], ids=str)
def test_one_compilation_serves_all_sizes(divergence: Divergence) -> None:
    """Of rows, columns, and numbers, for launches of the same block."""
    seen: dict[str, set[str]] = {}
    for shape in ((2, 37_984), (3, 32_000), (7, 49_152)):
        for launch in launched("sm_90", divergence, shape):
            seen.setdefault(launch.name, set()).add(launch.compiled.hash)
    assert all(len(hashes) == 1 for hashes in seen.values()), seen


@compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="ptxcpu needs the C++ compiler g++")
def test_no_schedule_of_the_warps_changes_a_bit() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 5003, generator=g).bfloat16() * 2
    results = []
    for schedule in range(9):
        with ptxcpu.active(arch=90, sched=schedule):
            results.append(sweeps(AdaptiveKL(), student, teacher))
        for ours, first in zip(results[-1], results[0], strict=True):
            assert torch.equal(ours.view(torch.int32), first.view(torch.int32)), schedule
