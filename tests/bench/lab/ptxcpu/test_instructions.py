"""Instructions of PTX, written by hand where Triton seldom emits them."""

import importlib
from typing import Any

import pytest
import torch

from bench.lab import ptxcpu
from bench.lab.ptxcpu.parse import parse
from bench.lab.ptxcpu.translate import translate


def ptx_of(body: str) -> str:
    """A kernel of 64 threads: %rd1 is the output, %r1 the thread, and %rd2 the thread's word of the
    output."""
    return f"""
.visible .entry k(.param .u64 k_param_0) .reqntid 64
{{
    .reg .pred %p<4>;
    .reg .b32 %r<9>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    .shared .align 16 .b8 matrices[512];
    ld.param.u64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    {body}
    ret;
}}
"""


def run(ptx: str, out: torch.Tensor) -> dict[str, Any]:
    address, size = out.data_ptr(), out.nbytes
    argument = address.to_bytes(8, "little")
    return ptxcpu.load(ptx).run((1,), [argument], ranges=[ptxcpu.Range(address, size)])


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rz.f32 %f1, %f2, %f3;",
        "mul.f32.bf16 %f1, %h2, %f3;",
        "add.sat.s32 %r1, %r2, %r3;",
        "fma.rn.relu.f16x2 %r1, %r2, %r3, %r4;",
        "max.xorsign.abs.f32 %f1, %f2, %f3;",
        "cvt.rz.f32.f64 %f1, %rd1;",
        "cvt.rz.f16x2.f32 %r1, %f1, %f2;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "bar.sync 1, 32;",
        "@%p1 bar.sync 0;",
        "call helper;",
        "ld.shared::cluster.b32 %r1, [%r2];",
        "mbarrier.init.shared.b64 [%r1], 1;",
        "mul24.lo.u32 %r1, %r2, %r3;",
        "wgmma.fence.sync.aligned;",
    ],
)
def test_what_is_not_implemented_is_refused(instruction: str) -> None:
    translate(parse(ptx_of("add.rn.ftz.f32 %f1, %f2, %f3; bar.sync 0, 64;")))
    with pytest.raises(ptxcpu.PtxError, match="unsupported PTX instruction"):
        translate(parse(ptx_of(instruction)))


@pytest.mark.parametrize("long", [False, True])
def test_divergent_threads_meet_again(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread t adds up 0..t-1 in a loop of its own length, then the warp shuffles.

    The same holds for the code of long kernels, which have one version of each block."""
    monkeypatch.setattr(
        importlib.import_module(translate.__module__), "LONG_KERNEL", 0 if long else 99
    )
    ptx = f"// {long}\n" + ptx_of("""
    mov.u32 %r2, 0;
    mov.u32 %r3, 0;
$loop:
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 bra $done;
    add.u32 %r3, %r3, %r2;
    add.u32 %r2, %r2, 1;
    bra $loop;
$done:
    shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
    st.global.b32 [%rd2], %r4;
""")
    out = torch.zeros(64, dtype=torch.int32)
    counts = run(ptx, out)
    assert out.tolist() == [(t ^ 1) * ((t ^ 1) - 1) // 2 for t in range(64)]
    # Warp w runs the loop's body as often as its slowest thread, each thread as often as its id.
    assert counts["warp_by_opcode"]["add.u32"] == 2 * (31 + 63)
    assert counts["div_blocks"] > 0
    assert counts["gst_requests"] == 2


def test_packed_comparison_and_bit_fields_of_64_bits() -> None:
    ptx = ptx_of("""
    mov.b32 %r2, 0x3c003c00;
    mov.b32 %r3, 0x3c004000;
    setp.ne.f16x2 %p1|%p2, %r2, %r3;
    selp.b32 %r4, 1, 0, %p1;
    selp.b32 %r5, 2, 0, %p2;
    setp.lt.s32 %p1|%p3, %r1, 5;
    selp.b32 %r6, 4, 0, %p1;
    selp.b32 %r7, 8, 0, %p3;
    add.u32 %r4, %r4, %r5;
    add.u32 %r4, %r4, %r6;
    add.u32 %r4, %r4, %r7;
    mov.b64 %rd3, 0x0000800000000000;
    bfe.s64 %rd4, %rd3, 47, 1;
    bfe.u64 %rd5, %rd3, 44, 8;
    sub.u64 %rd5, %rd5, %rd4;
    cvt.u32.u64 %r5, %rd5;
    shl.b32 %r5, %r5, 8;
    or.b32 %r4, %r4, %r5;
    st.global.b32 [%rd2], %r4;
""")
    out = torch.zeros(64, dtype=torch.int32)
    run(ptx, out)
    # Halves: low 1 != 2, high 1 == 1. Bit 47 alone: -1 as a signed bit, 8 as 4 bits from 44.
    fields = (8 - -1) << 8
    assert out.tolist() == [fields + 1 + (4 if t < 5 else 8) for t in range(64)]


@pytest.mark.parametrize("trans", [False, True])
def test_stored_matrices(trans: bool) -> None:
    """A warp stores two 8 x 8 matrices of 16 bits, then every thread reads eight bytes of them."""
    modifier = ".trans" if trans else ""
    ptx = ptx_of(f"""
    and.b32 %r2, %r1, 31;
    shr.u32 %r3, %r1, 5;
    shl.b32 %r3, %r3, 8;
    mov.b32 %r4, matrices;
    add.u32 %r4, %r4, %r3;
    shl.b32 %r5, %r2, 4;
    add.u32 %r5, %r4, %r5;
    shl.b32 %r6, %r1, 17;
    shl.b32 %r7, %r1, 1;
    or.b32 %r6, %r6, %r7;
    or.b32 %r6, %r6, 0x00010000;
    xor.b32 %r7, %r6, 0x80008000;
    stmatrix.sync.aligned.m8n8.x2{modifier}.shared.b16 [%r5], {{%r6, %r7}};
    bar.sync 0;
    shl.b32 %r5, %r2, 3;
    add.u32 %r5, %r4, %r5;
    ld.shared.v2.b32 {{%r6, %r7}}, [%r5];
    mad.wide.u32 %rd2, %r1, 8, %rd1;
    st.global.v2.b32 [%rd2], {{%r6, %r7}};
""")
    out = torch.zeros(2, 2, 8, 8, dtype=torch.int16)  # warp, matrix, row, column
    run(ptx, out)
    # Thread l of a warp holds (row l / 4, columns 2 (l % 4) and the next): values count up.
    first = torch.arange(128, dtype=torch.int16).view(2, 1, 8, 8)
    expected = torch.cat([first, first ^ -(2**15)], dim=1)
    assert torch.equal(out, expected.mT if trans else expected)
