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


# Two tensors without a byte between them: what lies beyond the one is memory of the other.
NEIGHBOURS = torch.zeros(2000).split(1000)


@triton.jit
def reach_kernel(x_ptr, y_ptr, of_x, of_y):
    tl.store(y_ptr + of_y, tl.load(x_ptr + of_x))


@pytest.mark.parametrize(
    "of_x, of_y, message",
    [
        (1000, 0, r"load out of bounds, .* 0 bytes after the end of x_ptr"),
        (1999, 0, r"load out of bounds, .* 3996 bytes after the end of x_ptr"),
        (0, -1, r"store out of bounds, .* 4 bytes before y_ptr"),
        (0, -1000, r"store out of bounds, .* 4000 bytes before y_ptr"),
    ],
)
def test_the_neighbour_of_a_tensor_is_none_of_it(of_x: int, of_y: int, message: str) -> None:
    x, y = NEIGHBOURS
    assert x.data_ptr() + x.nbytes == y.data_ptr()
    with ptxcpu.active():
        reach_kernel[(1,)](x, y, 999, 0)
        with pytest.raises(ptxcpu.PtxError, match=message):
            reach_kernel[(1,)](x, y, of_x, of_y)


@triton.jit
def add_to_kernel(x_ptr, of_x):
    tl.atomic_add(x_ptr + of_x, 1.0)


def test_an_atomic_on_the_rest_of_a_storage() -> None:
    x = NEIGHBOURS[0]
    with ptxcpu.active():
        add_to_kernel[(1,)](x, 999)
        with pytest.raises(ptxcpu.PtxError, match=r"atomic .* after the end of x_ptr"):
            add_to_kernel[(1,)](x, 1000)


def test_tensors_on_top_of_each_other() -> None:
    """As a gradient over its logits: each is checked by itself, and what both touch counts once."""
    x = torch.arange(1000.0)
    with ptxcpu.active() as counters:
        careless_kernel[(1,)](x, x, 999, 1, BLOCK=1024)
        careless_kernel[(1,)](x, x[1:], 999, 0, BLOCK=1024)
        with pytest.raises(ptxcpu.PtxError, match=r"store .* 0 bytes after the end of y_ptr"):
            careless_kernel[(1,)](x, x[:998], 999, 0, BLOCK=1024)
    counted = counters["careless_kernel"]
    assert counted["footprint_read"] == counted["footprint_write"] == 2 * 4000


@triton.jit
def element_kernel(x_ptr, y_ptr, offset):
    tl.store(y_ptr, tl.load(x_ptr + offset))


WIDE = torch.arange(4.0 * 5 * 10).view(4, 5, 10)
SLICES = {
    "all": WIDE,
    "columns": WIDE[..., :7],
    "a column": WIDE[..., 3],
    "sequences": WIDE[:, 1:4],
    "sequences and columns": WIDE[1:, 1:4, 2:5],
    "every other row": WIDE.view(20, 10)[::2],
    "transposed": WIDE.transpose(0, 2)[2:6],
    "rows in turn": WIDE.as_strided((2, 2, 3), (23, 20, 1)),
    "expanded": WIDE[:, :1, :6].expand(4, 9, 6),
    "one": WIDE[2, 3, 4],
    "nothing": WIDE[:, :, :0],
}


@pytest.mark.parametrize("name", SLICES)
def test_every_element_of_a_slice_and_no_other(name: str) -> None:
    """Also not those between its rows."""
    x, y = SLICES[name], torch.empty(1)
    start = x.storage_offset()
    elements = set(x.flatten().tolist())  # each is its own place in WIDE
    with ptxcpu.active():
        for place in range(WIDE.numel()):
            if place in elements:
                element_kernel[(1,)](x, y, place - start, num_warps=1)
                assert y.item() == place
            else:
                with pytest.raises(ptxcpu.PtxError, match=r"bytes (before|after|into).* x_ptr"):
                    element_kernel[(1,)](x, y, place - start, num_warps=1)


@pytest.mark.parametrize(
    "x",
    [torch.arange(20.0).unfold(0, 6, 3), torch.arange(50.0).as_strided((2, 3, 3), (7, 5, 1))],
    ids=["windows", "windows of rows"],
)
def test_overlapping_windows_have_no_gaps(x: torch.Tensor) -> None:
    y = torch.empty(1)
    elements = x.unique().tolist()
    with ptxcpu.active():
        for place in elements:
            element_kernel[(1,)](x, y, int(place), num_warps=1)
            assert y.item() == place
        with pytest.raises(ptxcpu.PtxError, match="0 bytes after the end of x_ptr"):
            element_kernel[(1,)](x, y, int(elements[-1]) + 1, num_warps=1)


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
