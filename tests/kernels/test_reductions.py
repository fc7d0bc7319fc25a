"""Several reductions at once give what each gives alone, bit for bit, with fewer barriers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from akl_triton.kernels.reductions import maxima, sums, wanted_sums
from bench.lab import ptxcpu
from tests.kernels.conftest import MODE

BLOCK = 256
COUNT = 9  # more than are reduced at once, and not a power of two


@triton.jit
def reductions_kernel(
    x_ptr, out_ptr, AT_ONCE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(x_ptr + i * BLOCK + columns),)  # type: ignore[assignment]  # noqa: RUF005
    if AT_ONCE:
        totals, largest = sums(values), maxima(values)
    else:
        totals, largest = (), ()
        for i in tl.static_range(COUNT):
            totals = totals + (tl.sum(values[i], axis=0),)  # noqa: RUF005
            largest = largest + (tl.max(values[i], axis=0),)  # noqa: RUF005
    for i in tl.static_range(COUNT):
        tl.store(out_ptr + 2 * i, totals[i])
        tl.store(out_ptr + 2 * i + 1, largest[i])


@triton.jit
def some_kernel(x_ptr, out_ptr, SECOND: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    first, second, third = wanted_sums((x, x, 2.0 * x), (True, SECOND, True))
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, second)
    tl.store(out_ptr + 2, third)


def launched(kernel: Any, x: torch.Tensor, size: int, *options: Any) -> tuple[torch.Tensor, int]:
    """(what the kernel wrote, its barriers, of which only ptxcpu knows)"""
    out = torch.full((size,), torch.nan, device=x.device)
    if MODE != "ptx":
        kernel[(1,)](x, out, *options, BLOCK=BLOCK, num_warps=4)
        return out, 0
    with ptxcpu.active(arch=90) as counters:
        kernel[(1,)](x, out, *options, BLOCK=BLOCK, num_warps=4)
        return out, int(counters[kernel.__name__]["barriers"])


def test_at_once_as_alone(device: torch.device) -> None:
    x = torch.randn(COUNT, BLOCK, generator=torch.Generator().manual_seed(0)).to(device)
    x[3] *= 1e30
    at_once, few = launched(reductions_kernel, x, 2 * COUNT, True, COUNT)
    alone, many = launched(reductions_kernel, x, 2 * COUNT, False, COUNT)
    assert torch.equal(at_once, alone)
    if MODE == "ptx":
        assert few < many / 4


@pytest.mark.parametrize("second", [True, False])
def test_what_is_not_there_is_0(second: bool, device: torch.device) -> None:
    x = torch.ones(BLOCK, device=device)
    out, _ = launched(some_kernel, x, 3, second)
    assert out.tolist() == [BLOCK, BLOCK if second else 0, 2 * BLOCK]
