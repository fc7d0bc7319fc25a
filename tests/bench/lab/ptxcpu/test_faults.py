# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Faults that ptxcpu must find: each kernel here is wrong, or is made wrong, on purpose."""

import re

import pytest
import torch
import triton
import triton.language as tl

from bench.lab import ptxcpu
from bench.lab.ptxcpu import execute


@triton.jit
def careless_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + shift + offs, mask=offs < n)
    tl.store(y_ptr + offs, x, mask=offs < n)


def test_load_behind_the_tensor() -> None:
    x, y = torch.zeros(1000), torch.zeros(1024)
    with ptxcpu.active():
        careless_kernel[(1,)](x, y, 1000, 0, BLOCK=1024)
        with pytest.raises(ptxcpu.PtxError, match="global load out of bounds") as error:
            careless_kernel[(1,)](x, y, 1001, 0, BLOCK=1024)
    # The message names the kernel, the first address behind x, and the line of the source.
    assert "careless_kernel" in str(error.value)
    assert f"{x.data_ptr() + 4000:x}" in str(error.value)
    # Triton's cache serves all folders, and keeps the path that it saw first.
    assert re.search(r"faults\.py:\d+", str(error.value))


def test_store_behind_the_tensor() -> None:
    x, y = torch.zeros(1024), torch.zeros(1000)
    with (
        ptxcpu.active(),
        pytest.raises(ptxcpu.PtxError, match="global store out of bounds"),
    ):
        careless_kernel[(1,)](x, y, 1001, 0, BLOCK=1024)


@triton.jit
def misaligned_kernel(x_ptr, y_ptr, shift, BLOCK: tl.constexpr):
    offs = tl.multiple_of(shift + tl.arange(0, BLOCK), 8)  # untrue unless shift is
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + offs))


def test_misaligned_load() -> None:
    x, y = torch.zeros(2048, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.bfloat16)
    with ptxcpu.active():
        misaligned_kernel[(1,)](x, y, 8, BLOCK=1024)
        with pytest.raises(ptxcpu.PtxError, match="misaligned global access"):
            misaligned_kernel[(1,)](x, y, 6, BLOCK=1024)


@triton.jit
def reverse_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Totals that every thread needs: they pass from warp to warp through shared memory."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.cumsum(x, axis=0) - tl.sum(x, axis=0))


def test_missing_barriers_are_found_by_random_schedules() -> None:
    x = torch.randint(0, 9, (512,), generator=torch.Generator().manual_seed(0)).float()
    expected = x.cumsum(0) - x.sum()

    def run(sched: int, edit) -> torch.Tensor:
        y = torch.empty(512)
        with ptxcpu.active(sched=sched, edit_ptx=edit):
            reverse_kernel[(1,)](x, y, BLOCK=512, num_warps=4)
        return y

    def without_barriers(ptx: str) -> str:
        return re.sub(r"bar\.sync[^;]*;", "", ptx)

    seeds = range(5)
    assert all(torch.equal(run(seed, None), expected) for seed in seeds)
    assert torch.equal(run(0, without_barriers), expected)  # lockstep cannot see the difference
    assert not any(torch.equal(run(seed, without_barriers), expected) for seed in seeds[1:])


@triton.jit
def assert_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.device_assert(x >= 0, "x is negative")


def test_device_assert() -> None:
    x = torch.ones(128)
    with ptxcpu.active():
        assert_kernel[(1,)](x, BLOCK=128, debug=True)
        x[77] = -1
        with pytest.raises(ptxcpu.PtxError, match="device assert"):
            assert_kernel[(1,)](x, BLOCK=128, debug=True)


@triton.jit
def endless_kernel(x_ptr):
    while tl.load(x_ptr, volatile=True) == 0:
        pass


def test_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "BLOCK_BUDGET", 1000)
    with ptxcpu.active():
        endless_kernel[(1,)](torch.ones(1), num_warps=1)
        with pytest.raises(ptxcpu.PtxError, match="block budget"):
            endless_kernel[(1,)](torch.zeros(1), num_warps=1)


@triton.jit
def indirect_kernel(addresses_ptr, y_ptr):
    pointer = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr, tl.load(pointer))


def test_memory_is_legal_only_while_it_is_an_argument() -> None:
    x, y = torch.tensor([5.0]), torch.zeros(1)
    addresses = torch.tensor([x.data_ptr()])
    with ptxcpu.active(extra_tensors=[x]):
        indirect_kernel[(1,)](addresses, y)
    assert y.item() == 5.0
    with ptxcpu.active():
        careless_kernel[(1,)](x, y, 1, 0, BLOCK=16)  # x is an argument of this launch alone
        with pytest.raises(ptxcpu.PtxError, match="global load out of bounds"):
            indirect_kernel[(1,)](addresses, y)


def test_tensors_may_be_freed_between_launches() -> None:
    with ptxcpu.active() as counters:
        for n in (1000, 10, 100_000, 300):
            x, y = torch.randn(n), torch.empty(n)
            careless_kernel[(1,)](x, y, min(n, 1024), 0, BLOCK=1024)
            assert torch.equal(y[:1024], x[:1024])
            del x, y
    assert counters["careless_kernel"]["launches"] == 4


def test_gpp_is_asked_for_when_missing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PTXCPU_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        ptxcpu.active(edit_ptx=lambda ptx: ptx + "\n"),
        pytest.raises(ptxcpu.PtxError, match="g\\+\\+"),
    ):
        careless_kernel[(1,)](torch.zeros(9), torch.zeros(9), 9, 0, BLOCK=16)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ptxcpu.PtxError, match="TRITON_INTERPRET"):
        ptxcpu.install()
