# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The results of compiled Triton kernels in ptxcpu, compared with those of PyTorch."""

import pytest
import torch
import triton
import triton.language as tl

from bench.lab import ptxcpu

BITS_16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)


def launch(kernel, grid, *args, arch=90, sched=0, **options):
    """Launch in ptxcpu, and return the counts of the kernel."""
    with ptxcpu.active(arch, sched) as counters:
        kernel[grid](*args, **options)
    return counters[kernel.__name__]


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


def convert(x: torch.Tensor, dtype: torch.dtype, arch: int = 90) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    launch(copy_kernel, (triton.cdiv(len(x), 1024),), x, y, len(x), BLOCK=1024, arch=arch)
    return y


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, but for the payload of a NaN, which is the hardware's own."""
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.dtype.itemsize]
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers].view(bits), expected[numbers].view(bits))


def hard_floats() -> torch.Tensor:
    """fp32 values at every tie of bf16 and of fp16, those one bit away, and random bits."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).to(torch.int32)
    upper = BITS_16.to(torch.int32) << 16
    ties_bf16 = [(upper | low).view(torch.float32) for low in (0, 0x7FFF, 0x8000, 0x8001)]
    halves = BITS_16.view(torch.float16).to(torch.float32).view(torch.int32)
    ties_fp16 = [(halves | low).view(torch.float32) for low in (0, 0x0FFF, 0x1000, 0x1001)]
    return torch.cat([any_bits.view(torch.float32), *ties_bf16, *ties_fp16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", [80, 90])
def test_rounding_to_16_bits_is_that_of_torch(dtype: torch.dtype, arch: int) -> None:
    x = hard_floats()
    assert_same_bits(convert(x, dtype, arch), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_widens_exactly(dtype: torch.dtype) -> None:
    x = BITS_16.view(dtype)
    assert_same_bits(convert(x, torch.float32), x.to(torch.float32))


def test_integers_round_once_to_bf16() -> None:
    # 2**30 + 2**22 is a tie of bf16; one more is above it, but fp32 cannot tell them apart.
    x = torch.tensor([2**30 + 2**22 + 1, 2**30 + 2**22, -(2**30) - 2**22 - 1], dtype=torch.int32)
    above = 2.0**30 + 2.0**23
    assert convert(x, torch.bfloat16).tolist() == [above, 2.0**30, -above]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_counts_of_an_aligned_copy_are_exact(arch: int) -> None:
    n, programs = 5008, 5
    x, y = torch.randn(n).bfloat16(), torch.zeros(n, dtype=torch.bfloat16)
    counts = launch(copy_kernel, (programs,), x, y, n, BLOCK=1024, arch=arch)
    assert torch.equal(x, y)
    assert counts["launches"] == 1
    assert counts["gld_bytes"] == counts["gst_bytes"] == 2 * n
    assert counts["gld_sectors"] == counts["gst_sectors"] == 2 * n // 32
    assert counts["footprint_read"] == counts["footprint_write"] == 2 * n
    # 16 bytes per lane: 626 live lanes are 19 whole warps and a part of the twentieth.
    assert counts["gld_requests"] == counts["gst_requests"] == 20
    # No loop: each of the 5 x 4 warps executes each instruction of the PTX once.
    assert counts["warp_by_class"]["ld.global"] == counts["warp_by_class"]["st.global"] == 20
    assert counts["warp_instr"] == sum(counts["warp_by_opcode"].values())
    assert counts["warp_instr"] == sum(counts["warp_by_class"].values())
    assert counts["warp_instr"] % 20 == 0
    assert counts["thread_instr"] == 32 * counts["warp_instr"]
    assert counts["barriers"] == counts["div_blocks"] == counts["gat_requests"] == 0


def test_counts_show_what_a_missing_alignment_costs() -> None:
    n = 5000  # not divisible by 16: the 8 values of a thread are loaded one by one
    x, y = torch.randn(n).bfloat16(), torch.zeros(n, dtype=torch.bfloat16)
    counts = launch(copy_kernel, (5,), x, y, n, BLOCK=1024)
    assert torch.equal(x, y)
    assert counts["gld_bytes"] == 2 * n
    assert counts["gld_requests"] == 8 * 20
    assert counts["gld_sectors"] == 8 * -(-2 * n // 32)
    assert counts["footprint_read"] == -(-2 * n // 32) * 32


def test_launches_add_up_per_kernel() -> None:
    x, y = torch.randn(1024), torch.empty(1024)
    with ptxcpu.active() as counters:
        for _ in range(3):
            copy_kernel[(1,)](x, y, 1024, BLOCK=1024)
        assert counters["copy_kernel"]["launches"] == 3
        assert counters["copy_kernel"]["gld_bytes"] == 3 * 4 * 1024
        counters.reset()
        copy_kernel[(0,)](x, y, 1024, BLOCK=1024)  # an empty grid makes no launch
        assert counters == {}


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, min_ptr, where_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=float("-inf"))
    tl.store(max_ptr + row, tl.max(x, axis=0))
    tl.store(where_ptr + row, tl.argmax(x, axis=0))
    tl.store(sum_ptr + row, tl.sum(tl.where(offs < n, x, 0.0), axis=0))
    tl.store(min_ptr + row, tl.min(tl.where(offs < n, x, float("inf")), axis=0))


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_reductions(sched: int) -> None:
    x = torch.randn(6, 900, generator=torch.Generator().manual_seed(1))
    x[2, 100:] = float("-inf")
    total, largest, least = torch.empty(3, 6)
    where = torch.empty(6, dtype=torch.int32)
    counts = launch(
        reduce_kernel, (6,), x, total, largest, least, where, 900, BLOCK=1024, sched=sched
    )
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(least, x.amin(1))
    assert torch.equal(where.long(), x.argmax(1))
    finite = [0, 1, 3, 4, 5]
    exact = x.double().sum(1)
    assert (total[finite] - exact[finite]).abs().max() < 1e-4
    assert total[2] == float("-inf")
    assert counts["barriers"] > 0
    assert counts["warp_by_class"]["shuffle"] > 0


@triton.jit
def masked_load_kernel(x_ptr, y_ptr, lower, upper, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=(offs >= lower) & (offs < upper), other=7.0)
    tl.store(y_ptr + offs, x)


def test_masked_off_lanes_read_nothing_and_get_other() -> None:
    x, y = torch.randn(100), torch.empty(256)
    # Lanes outside [lower, upper) would read in front of and behind x.
    counts = launch(masked_load_kernel, (1,), x, y, 3, 100, BLOCK=256)
    expected = torch.full((256,), 7.0)
    expected[3:100] = x[3:]
    assert torch.equal(y, expected)
    assert counts["gld_bytes"] == 4 * 97
    assert counts["gst_bytes"] == 4 * 256


@triton.jit
def mathematics_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + n + offs, x * y)
    tl.store(out_ptr + 2 * n + offs, tl.div_rn(x, y))
    tl.store(out_ptr + 3 * n + offs, tl.sqrt_rn(tl.abs(x)))
    tl.store(out_ptr + 4 * n + offs, tl.fma(x, y, x))
    tl.store(out_ptr + 5 * n + offs, tl.maximum(x, y))
    tl.store(out_ptr + 6 * n + offs, tl.exp2(x))
    tl.store(out_ptr + 7 * n + offs, tl.log2(tl.abs(x)))
    tl.store(out_ptr + 8 * n + offs, tl.exp(x))
    tl.store(out_ptr + 9 * n + offs, x / y)


def test_arithmetic() -> None:
    n = 1024
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, n, generator=generator) * 20
    x[:4] = torch.tensor([0.0, float("inf"), -200.0, 1e-40])
    out = torch.empty(10, n)
    launch(mathematics_kernel, (1,), x, y, out, n, BLOCK=n)
    assert_same_bits(out[0], x + y)
    assert_same_bits(out[1], x * y)
    assert_same_bits(out[2], x / y)
    assert_same_bits(out[3], x.abs().double().sqrt().float())  # torch's own sqrt is 1 ulp off
    fused = x.double() * y.double() + x.double()  # the product is exact in float64
    assert_same_bits(out[4], fused.float())
    assert_same_bits(out[5], torch.maximum(x, y))
    # exp multiplies by log2(e) in fp32 first: |x| is up to 70 here, and so is the error in ulp.
    for row, exact, tolerance in (
        (6, x.double().exp2(), 3e-7),
        (7, x.double().abs().log2(), 3e-7),
        (8, x.double().exp(), 1e-5),
        (9, x.double() / y.double(), 3e-7),
    ):
        torch.testing.assert_close(out[row].double(), exact, rtol=tolerance, atol=1e-37)


@triton.jit
def atomic_kernel(x_ptr, sum_ptr, count_ptr, largest_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    tl.atomic_add(sum_ptr + offs % 8, x.to(tl.float32), mask=offs < n)
    tl.atomic_max(largest_ptr, tl.max(x, axis=0))
    ticket = tl.atomic_add(count_ptr, 1)
    tl.store(count_ptr + 1 + ticket, tl.program_id(0))


def test_atomics_of_all_programs_arrive() -> None:
    n, programs = 4000, 8
    x = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    total, largest = torch.zeros(8), torch.zeros(1, dtype=torch.int32)
    count = torch.zeros(1 + programs, dtype=torch.int32)
    counts = launch(atomic_kernel, (programs,), x, total, count, largest, n, BLOCK=512)
    assert torch.equal(total, x.view(-1, 8).sum(0).float())  # integers: exact in any order
    assert largest.item() == x.max().item()
    assert count[0].item() == programs
    assert sorted(count[1:].tolist()) == list(range(programs))
    assert counts["gat_bytes"] == 4 * (n + 2 * programs)


@triton.jit
def collatz_kernel(start_ptr, steps_ptr):
    """The number of Collatz steps down to 1: a loop whose length the data decides."""
    program = tl.program_id(0)
    x = tl.load(start_ptr + program)
    steps = 0
    while x != 1:
        if x % 2 == 0:  # noqa: SIM108  (a conditional expression would not branch)
            x = x // 2
        else:
            x = 3 * x + 1
        steps += 1
    tl.store(steps_ptr + program, steps)


def test_while_loop_with_branches() -> None:
    start = torch.tensor([1, 2, 3, 7, 27, 97], dtype=torch.int64)
    steps = torch.zeros(6, dtype=torch.int32)
    launch(collatz_kernel, (6,), start, steps, num_warps=1)
    assert steps.tolist() == [0, 1, 7, 16, 111, 118]


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + rows * SIZE + columns)
    b = tl.load(b_ptr + rows * SIZE + columns)
    tl.store(c_ptr + rows * SIZE + columns, tl.dot(a, b))


def test_matrix_product() -> None:
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    c = torch.empty(32, 32)
    launch(dot_kernel, (1,), a, b, c, SIZE=32, arch=80)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def row_kernel(x_ptr, y_ptr, stride, V, BLOCK: tl.constexpr):
    """y[n] = x[n, V - 1]: the address of one element of a row far away."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(y_ptr + row, tl.load(x_ptr + row * stride + V - 1))


def test_addresses_beyond_two_to_the_31_elements() -> None:
    rows, V = 40_000, 128_256  # 5.1e9 elements, 10 GB, of which three pages are real
    x = ptxcpu.virtual_tensor((rows, V), torch.bfloat16)
    marked = {0: 1.0, 20_000: 2.0, rows - 1: 3.0}
    for row, value in marked.items():
        x[row, V - 1] = value
    y = torch.empty(rows, dtype=torch.bfloat16)
    counts = launch(row_kernel, (rows,), x, y, x.stride(0), V, BLOCK=1, num_warps=1)
    assert {row: y[row].item() for row in marked} == marked
    assert y.count_nonzero() == len(marked)
    assert counts["footprint_read"] == 32 * rows


@triton.jit
def row_kernel_int32(x_ptr, y_ptr, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tl.store(y_ptr + row, tl.load(x_ptr + row * stride + V - 1))


def test_int32_addresses_are_caught() -> None:
    rows, V = 20_000, 128_256
    x = ptxcpu.virtual_tensor((rows, V), torch.bfloat16)
    y = torch.empty(rows, dtype=torch.bfloat16)
    with pytest.raises(ptxcpu.PtxError, match="global load out of bounds"):
        launch(row_kernel_int32, (rows,), x, y, x.stride(0), V, BLOCK=1, num_warps=1)
