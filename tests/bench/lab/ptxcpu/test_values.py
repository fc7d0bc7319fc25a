"""The results of single instructions, on values for which Python knows them.

Every thread has four inputs, of which the last two are small; an instruction reads them as %r1 to
%r4 (32 bits), %rd1 to %rd4 (64), %h1 to %h4 (16), %f1 to %f4 or %d1 to %d4 (the same bits as
floats), and leaves its result in the ninth register of any kind.
"""

from __future__ import annotations

import math
import operator
import random
import struct
from collections.abc import Callable, Sequence

import pytest
import torch

from bench.lab import ptxcpu

THREADS = 64
PROLOGUE = "".join(
    f"""
    ld.global.b64 %rd{k}, [%rd12+{8 * (k - 1)}];
    cvt.u32.u64 %r{k}, %rd{k};
    cvt.u16.u64 %h{k}, %rd{k};
    mov.b32 %f{k}, %r{k};
    mov.b64 %d{k}, %rd{k};
"""
    for k in range(1, 5)
)
# Register of the result: how it comes into %rd9.
EPILOGUES = {
    "%rd9": "",
    "%r9": "cvt.u64.u32 %rd9, %r9;",
    "%h9": "cvt.u64.u16 %rd9, %h9;",
    "%f9": "mov.b32 %r9, %f9; cvt.u64.u32 %rd9, %r9;",
    "%d9": "mov.b64 %rd9, %d9;",
    "%p9": "selp.b64 %rd9, 1, 0, %p9;",
}


Row = tuple[int, int, int, int]


def execute(texts: Sequence[str], inputs: Sequence[Row]) -> list[list[int]]:
    """The 64 bits that every thread stores, for each of the instructions."""
    parts = []
    for k, text in enumerate(texts):
        result = next(register for register in EPILOGUES if register in text)
        parts.append(f"{text} {EPILOGUES[result]} st.global.b64 [%rd13+{8 * THREADS * k}], %rd9;")
    newline = "\n    "
    ptx = f"""
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1) .reqntid {THREADS}
{{
    .reg .pred %p<10>;
    .reg .b16 %h<10>;
    .reg .b32 %r<12>;
    .reg .f32 %f<10>;
    .reg .b64 %rd<16>;
    .reg .f64 %d<10>;
    ld.param.u64 %rd10, [k_param_0];
    ld.param.u64 %rd11, [k_param_1];
    mov.u32 %r11, %tid.x;
    mad.wide.u32 %rd12, %r11, 32, %rd10;
    mad.wide.u32 %rd13, %r11, 8, %rd11;
    {PROLOGUE}
    {newline.join(parts)}
    ret;
}}
"""
    given = torch.tensor([[_signed(x, 64) for x in row] for row in inputs], dtype=torch.int64)
    out = torch.zeros(len(texts), THREADS, dtype=torch.int64)
    tensors = (given, out)
    ptxcpu.load(ptx).run(
        (1,),
        [tensor.data_ptr().to_bytes(8, "little") for tensor in tensors],
        ranges=[ptxcpu.Range(tensor.data_ptr(), tensor.nbytes) for tensor in tensors],
    )
    return [[x & (2**64 - 1) for x in of_text] for of_text in out.tolist()]


def _signed(x: int, bits: int) -> int:
    x &= 2**bits - 1
    return x - 2**bits if x >> (bits - 1) else x


# ---------------------------------------------------------------- integers

HARD = (0, 1, 2, 3, 31, 32, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def integers() -> list[tuple[int, int, int, int]]:
    """Hard values in pairs, and random bits; the last two are up to 70."""
    draw = random.Random(0)
    pairs = [(draw.choice(HARD), draw.choice(HARD)) for _ in range(THREADS // 2)]
    pairs += [(draw.getrandbits(64), draw.getrandbits(64)) for _ in range(THREADS // 2)]
    return [(*pair, draw.randrange(71), draw.randrange(71)) for pair in pairs]


Integers = Callable[[int, int, int, int], int]


def s32(x: int) -> int:
    return _signed(x, 32)


def u32(x: int) -> int:
    return x & (2**32 - 1)


def quotient(a: int, b: int) -> int:
    """The quotient, rounded towards zero; division by 0 gives all ones."""
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return -1 if b == 0 else a - b * quotient(a, b)


def bit_field(a: int, start: int, length: int, bits: int, is_signed: bool) -> int:
    sign = (a >> min(start + length - 1, bits - 1)) & 1 if is_signed and length else 0
    return sum(
        ((a >> (start + i)) & 1 if i < length and start + i < bits else sign) << i
        for i in range(bits)
    )


def bit_field_inserted(a: int, b: int, start: int, length: int) -> int:
    for i in range(min(length, max(32 - start, 0))):
        b = b & ~(1 << (start + i)) | ((a >> i) & 1) << (start + i)
    return b


def permuted(a: int, b: int, selector: int) -> int:
    both, result = u32(b) << 32 | u32(a), 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = (both >> (8 * (nibble & 7))) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << (8 * i)
    return result


def looked_up(a: int, b: int, c: int, table: int) -> int:
    return sum(
        ((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1))) & 1) << i
        for i in range(32)
    )


def highest_bit(x: int) -> int:
    return x.bit_length() - 1


INTEGERS: tuple[tuple[str, Integers], ...] = (
    ("add.s32 %r9, %r1, %r2;", lambda a, b, c, d: u32(a + b)),
    ("add.u64 %rd9, %rd1, %rd2;", lambda a, b, c, d: a + b),
    ("add.u16 %h9, %h1, %h2;", lambda a, b, c, d: (a + b) & 0xFFFF),
    (
        "add.cc.u32 %r5, %r1, %r2; addc.u32 %r9, %r3, %r4;",
        lambda a, b, c, d: c + d + (u32(a) + u32(b) >> 32),
    ),
    ("sub.s64 %rd9, %rd1, %rd2;", lambda a, b, c, d: a - b),
    ("mul.lo.s32 %r9, %r1, %r2;", lambda a, b, c, d: u32(a * b)),
    ("mul.hi.u32 %r9, %r1, %r2;", lambda a, b, c, d: u32(a) * u32(b) >> 32),
    ("mul.hi.s32 %r9, %r1, %r2;", lambda a, b, c, d: u32(s32(a) * s32(b) >> 32)),
    ("mul.wide.s32 %rd9, %r1, %r2;", lambda a, b, c, d: s32(a) * s32(b)),
    ("mul.hi.u64 %rd9, %rd1, %rd2;", lambda a, b, c, d: a * b >> 64),
    ("mul.lo.u16 %h9, %h1, %h2;", lambda a, b, c, d: a * b & 0xFFFF),
    ("mad.lo.u32 %r9, %r1, %r2, %r3;", lambda a, b, c, d: u32(a * b + c)),
    ("mad.wide.u32 %rd9, %r1, %r2, %rd2;", lambda a, b, c, d: u32(a) * u32(b) + b),
    (
        "mad.lo.cc.u32 %r5, %r1, %r2, %r1; madc.hi.u32 %r9, %r1, %r2, %r3;",
        lambda a, b, c, d: u32((u32(a) * u32(b) >> 32) + c + (u32(u32(a) * u32(b)) + u32(a) >> 32)),
    ),
    ("div.u32 %r9, %r1, %r2;", lambda a, b, c, d: u32(quotient(u32(a), u32(b)))),
    ("div.s32 %r9, %r1, %r2;", lambda a, b, c, d: u32(quotient(s32(a), s32(b)))),
    ("rem.s32 %r9, %r1, %r2;", lambda a, b, c, d: u32(remainder(s32(a), s32(b)))),
    ("rem.u64 %rd9, %rd1, %rd3;", lambda a, b, c, d: remainder(a, c)),
    ("min.s32 %r9, %r1, %r2;", lambda a, b, c, d: u32(min(s32(a), s32(b)))),
    ("min.u64 %rd9, %rd1, %rd2;", lambda a, b, c, d: min(a, b)),
    ("max.u32 %r9, %r1, %r2;", lambda a, b, c, d: max(u32(a), u32(b))),
    ("neg.s32 %r9, %r1;", lambda a, b, c, d: u32(-a)),
    ("abs.s64 %rd9, %rd1;", lambda a, b, c, d: abs(_signed(a, 64))),
    ("and.b64 %rd9, %rd1, %rd2;", lambda a, b, c, d: a & b),
    ("or.b32 %r9, %r1, %r2;", lambda a, b, c, d: u32(a | b)),
    ("xor.b16 %h9, %h1, %h2;", lambda a, b, c, d: (a ^ b) & 0xFFFF),
    ("not.b32 %r9, %r1;", lambda a, b, c, d: u32(~a)),
    ("setp.lt.u32 %p1, %r3, %r4; not.pred %p9, %p1;", lambda a, b, c, d: int(c >= d)),
    ("shl.b32 %r9, %r1, %r3;", lambda a, b, c, d: u32(u32(a) << c)),
    ("shl.b64 %rd9, %rd1, %r3;", lambda a, b, c, d: a << c),
    ("shr.u32 %r9, %r1, %r3;", lambda a, b, c, d: u32(a) >> c),
    ("shr.s32 %r9, %r1, %r3;", lambda a, b, c, d: u32(s32(a) >> c)),
    (
        "shf.l.wrap.b32 %r9, %r1, %r2, %r3;",
        lambda a, b, c, d: u32((u32(b) << 32 | u32(a)) << (c & 31) >> 32),
    ),
    (
        "shf.r.clamp.b32 %r9, %r1, %r2, %r3;",
        lambda a, b, c, d: u32((u32(b) << 32 | u32(a)) >> min(c, 32)),
    ),
    ("bfe.u32 %r9, %r1, %r3, %r4;", lambda a, b, c, d: bit_field(u32(a), c, d, 32, False)),
    ("bfe.s64 %rd9, %rd1, %r3, %r4;", lambda a, b, c, d: bit_field(a, c, d, 64, True)),
    (
        "bfi.b32 %r9, %r1, %r2, %r3, %r4;",
        lambda a, b, c, d: bit_field_inserted(u32(a), u32(b), c, d),
    ),
    ("brev.b32 %r9, %r1;", lambda a, b, c, d: int(f"{u32(a):032b}"[::-1], 2)),
    ("prmt.b32 %r9, %r1, %r2, %r1;", lambda a, b, c, d: permuted(a, b, u32(a))),
    (
        "lop3.b32 %r9, %r1, %r2, %r3, 0xd8;",
        lambda a, b, c, d: looked_up(u32(a), u32(b), u32(c), 0xD8),
    ),
    ("popc.b64 %r9, %rd1;", lambda a, b, c, d: a.bit_count()),
    ("clz.b32 %r9, %r1;", lambda a, b, c, d: 32 - u32(a).bit_length()),
    ("bfind.u32 %r9, %r1;", lambda a, b, c, d: u32(highest_bit(u32(a)))),
    (
        "bfind.shiftamt.u32 %r9, %r1;",
        lambda a, b, c, d: u32(31 - highest_bit(u32(a)) if u32(a) else -1),
    ),
    (
        "setp.lt.u32 %p1, %r3, %r4; selp.b64 %rd9, %rd1, %rd2, %p1;",
        lambda a, b, c, d: a if c < d else b,
    ),
    ("setp.lt.s32 %p9, %r1, %r2;", lambda a, b, c, d: int(s32(a) < s32(b))),
    ("setp.hs.u64 %p9, %rd1, %rd2;", lambda a, b, c, d: int(a >= b)),
    (
        "setp.ne.u32 %p1, %r3, 7; setp.eq.xor.s32 %p9, %r1, %r2, %p1;",
        lambda a, b, c, d: int(u32(a) == u32(b)) ^ int(c != 7),
    ),
    ("mov.b64 {%r5, %r9}, %rd1;", lambda a, b, c, d: a >> 32),
    ("mov.b64 %rd9, {%r2, %r1};", lambda a, b, c, d: u32(a) << 32 | u32(b)),
    ("mov.u32 %r9, %laneid;", lambda a, b, c, d: -1),
    (
        "cvta.to.global.u64 %rd5, %rd12; ld.global.b64 %rd9, [%rd5+8];",
        lambda a, b, c, d: b,
    ),
    ("cvt.s64.s32 %rd9, %r1;", lambda a, b, c, d: s32(a)),
    ("cvt.u32.u8 %r9, %h1;", lambda a, b, c, d: a & 255),
    ("cvt.s32.s16 %r9, %h1;", lambda a, b, c, d: u32(_signed(a, 16))),
)


def test_integers() -> None:
    inputs = integers()
    results = execute([text for text, _ in INTEGERS], inputs)
    for (text, expected), of_text in zip(INTEGERS, results, strict=True):
        for thread, (row, result) in enumerate(zip(inputs, of_text, strict=True)):
            right = thread % 32 if "%laneid" in text else expected(*row) & (2**64 - 1)
            assert result == right, f"{text} of {[hex(x) for x in row]}"


# ---------------------------------------------------------------- floats

FLOATS = (0.0, -0.0, 1.0, -1.5, 0.1, 3.0, 7e-20, 1e30, -math.inf, math.inf, math.nan, 1e-40, 88.7)


def bits(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


def number(x: int) -> float:
    return float(struct.unpack("<f", (x & (2**32 - 1)).to_bytes(4, "little"))[0])


def floats() -> list[tuple[float, float, float, float]]:
    draw = random.Random(1)
    hard = [[draw.choice(FLOATS) for _ in range(4)] for _ in range(THREADS // 2)]
    soft = [[draw.gauss(0.0, 4.0) for _ in range(4)] for _ in range(THREADS // 2)]
    return [
        (number(bits(a)), number(bits(b)), number(bits(c)), number(bits(d)))
        for a, b, c, d in hard + soft
    ]


def rounded(function: Callable[..., torch.Tensor]) -> Callable[..., float]:
    """A function of fp64 tensors, whose result is rounded once to fp32."""

    def apply(*inputs: float) -> float:
        tensors = (torch.tensor(x, dtype=torch.float64) for x in inputs)
        return float(function(*tensors).float())

    return apply


def plain(function: Callable[..., torch.Tensor]) -> Callable[..., float]:
    return lambda *inputs: float(function(*(torch.tensor(x) for x in inputs)))


# Comparisons of floats: those that are false, and those that are true, where an operand is NaN.
COMPARISONS = {
    **{"eq": operator.eq, "ne": operator.ne, "lt": operator.lt},
    **{"le": operator.le, "gt": operator.gt, "ge": operator.ge},
}


def compared(name: str) -> Callable[[float, float, float, float], float]:
    is_unordered = name.endswith("u")
    compare = COMPARISONS[name.removesuffix("u")]
    return lambda a, b, c, d: (
        is_unordered if math.isnan(a) or math.isnan(b) else bool(compare(a, b))
    )


def low(x: float, dtype: torch.dtype) -> float:
    """The 16-bit float in the lower half of an fp32's bits."""
    half = torch.tensor([_signed(bits(x), 16)], dtype=torch.int16)
    return half.view(dtype).float().item()


# The instruction, what it computes, and by how much it may be off, relatively.
Floats = tuple[str, Callable[[float, float, float, float], float], float]
ARITHMETIC: tuple[Floats, ...] = (
    *(
        (f"setp.{name}.f32 %p9, %f1, %f2;", compared(name), 0.0)
        for ordered in COMPARISONS
        for name in (ordered, f"{ordered}u")
    ),
    ("setp.nan.f32 %p9, %f1, %f2;", lambda a, b, c, d: math.isnan(a) or math.isnan(b), 0.0),
    ("setp.num.f32 %p9, %f1, %f2;", lambda a, b, c, d: not (math.isnan(a) or math.isnan(b)), 0.0),
    ("add.rn.f32 %f9, %f1, %f2;", lambda a, b, c, d: rounded(torch.add)(a, b), 0.0),
    (
        "add.sat.f32 %f9, %f1, %f2;",
        lambda a, b, c, d: 0.0 if math.isnan(a + b) else min(max(a + b, 0.0), 1.0),
        1e-7,
    ),
    ("sub.f32 %f9, %f1, %f2;", lambda a, b, c, d: rounded(torch.sub)(a, b), 0.0),
    ("mul.rn.f32 %f9, %f1, %f2;", lambda a, b, c, d: rounded(torch.mul)(a, b), 0.0),
    (
        "fma.rn.f32 %f9, %f1, %f2, %f3;",
        lambda a, b, c, d: rounded(lambda x, y, z: x * y + z)(a, b, c),
        1e-7,
    ),
    (
        "mad.rn.f32 %f9, %f1, %f2, %f3;",
        lambda a, b, c, d: rounded(lambda x, y, z: x * y + z)(a, b, c),
        1e-7,
    ),
    (
        "add.rn.f32.bf16 %f9, %h1, %f2;",
        lambda a, b, c, d: rounded(torch.add)(low(a, torch.bfloat16), b),
        0.0,
    ),
    (
        "sub.rn.f32.f16 %f9, %h1, %f2;",
        lambda a, b, c, d: rounded(torch.sub)(low(a, torch.float16), b),
        0.0,
    ),
    (
        "fma.rn.f32.bf16 %f9, %h1, %h2, %f3;",
        lambda a, b, c, d: rounded(lambda x, y, z: x * y + z)(
            low(a, torch.bfloat16), low(b, torch.bfloat16), c
        ),
        1e-7,
    ),
    ("div.rn.f32 %f9, %f1, %f2;", lambda a, b, c, d: rounded(torch.div)(a, b), 0.0),
    ("div.full.f32 %f9, %f1, %f2;", lambda a, b, c, d: rounded(torch.div)(a, b), 3e-7),
    ("min.f32 %f9, %f1, %f2;", lambda a, b, c, d: plain(torch.fmin)(a, b), 0.0),
    ("min.NaN.f32 %f9, %f1, %f2;", lambda a, b, c, d: plain(torch.minimum)(a, b), 0.0),
    ("max.f32 %f9, %f1, %f2;", lambda a, b, c, d: plain(torch.fmax)(a, b), 0.0),
    ("max.NaN.f32 %f9, %f1, %f2;", lambda a, b, c, d: plain(torch.maximum)(a, b), 0.0),
    ("neg.f32 %f9, %f1;", lambda a, b, c, d: -a, 0.0),
    ("abs.f32 %f9, %f1;", lambda a, b, c, d: abs(a), 0.0),
    ("copysign.f32 %f9, %f1, %f2;", lambda a, b, c, d: math.copysign(b, a), 0.0),
    ("ex2.approx.f32 %f9, %f1;", lambda a, b, c, d: rounded(torch.exp2)(a), 3e-7),
    (
        "ex2.approx.ftz.f32 %f9, %f1;",
        lambda a, b, c, d: rounded(torch.exp2)(a) if not a < -126 else 0.0,
        3e-7,
    ),
    ("lg2.approx.f32 %f9, %f1;", lambda a, b, c, d: rounded(torch.log2)(a), 3e-7),
    ("sin.approx.f32 %f9, %f4;", lambda a, b, c, d: rounded(torch.sin)(d), 3e-7),
    ("cos.approx.f32 %f9, %f4;", lambda a, b, c, d: rounded(torch.cos)(d), 3e-7),
    ("tanh.approx.f32 %f9, %f1;", lambda a, b, c, d: rounded(torch.tanh)(a), 3e-7),
    ("sqrt.rn.f32 %f9, %f1;", lambda a, b, c, d: rounded(torch.sqrt)(a), 0.0),
    ("rsqrt.approx.f32 %f9, %f1;", lambda a, b, c, d: rounded(torch.rsqrt)(a), 3e-7),
    ("rcp.rn.f32 %f9, %f1;", lambda a, b, c, d: rounded(torch.reciprocal)(a), 0.0),
    (
        "setp.le.f32 %p1, %f3, %f4; selp.f32 %f9, %f1, %f2, %p1;",
        lambda a, b, c, d: a if c <= d else b,
        0.0,
    ),
    ("cvt.rni.f32.f32 %f9, %f1;", lambda a, b, c, d: plain(torch.round)(a), 0.0),
    ("cvt.rmi.f32.f32 %f9, %f1;", lambda a, b, c, d: plain(torch.floor)(a), 0.0),
    (
        "cvt.f64.f32 %d5, %f1; cvt.rn.f32.f64 %f9, %d5;",
        lambda a, b, c, d: a,
        0.0,
    ),
)


def test_floats() -> None:
    inputs = floats()
    given = [(bits(a), bits(b), bits(c), bits(d)) for a, b, c, d in inputs]
    results = execute([text for text, *_ in ARITHMETIC], given)
    for (text, expected, tolerance), of_text in zip(ARITHMETIC, results, strict=True):
        is_predicate = "%p9" in text
        for row, result in zip(inputs, of_text, strict=True):
            value = float(result) if is_predicate else number(result)
            assert_close(value, float(expected(*row)), tolerance, f"{text} of {row}")


def assert_close(value: float, right: float, tolerance: float, where: str) -> None:
    """Without a tolerance the values must be exactly equal, including the sign of a zero."""
    if math.isnan(right):
        assert math.isnan(value), where
    elif tolerance:
        assert value == pytest.approx(right, rel=tolerance, abs=1e-37), where
    else:
        assert value == right, where
        assert math.copysign(1.0, value) == math.copysign(1.0, right), where


def halves(registers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """[..., 2]: the 16-bit floats in 32-bit registers, the lower first."""
    return torch.tensor(registers).to(torch.int32).view(torch.int16).view(dtype).view(-1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16x2", "bf16x2"])
def test_packed_halves(dtype: torch.dtype) -> None:
    type_ = "f16x2" if dtype == torch.float16 else "bf16x2"
    draw = torch.Generator().manual_seed(0)
    values = (3 * torch.randn(THREADS, 3, 2, generator=draw)).to(dtype)
    registers = values.view(torch.int16).to(torch.int64) & 0xFFFF
    inputs = [
        (int(a), int(b), int(c), 0) for a, b, c in registers[..., 0] | registers[..., 1] << 16
    ]
    a, b, c = (values[:, k].double() for k in range(3))
    cases = (
        (f"add.{type_} %r9, %r1, %r2;", a + b),
        (f"sub.{type_} %r9, %r1, %r2;", a - b),
        (f"mul.{type_} %r9, %r1, %r2;", a * b),
        (f"fma.rn.{type_} %r9, %r1, %r2, %r3;", a * b + c),
        (f"min.{type_} %r9, %r1, %r2;", torch.minimum(a, b)),
        (f"max.{type_} %r9, %r1, %r2;", torch.maximum(a, b)),
        (f"neg.{type_} %r9, %r1;", -a),
        (f"abs.{type_} %r9, %r1;", a.abs()),
        (f"set.lt.{type_}.{type_} %r9, %r1, %r2;", (a < b).double()),
    )
    results = execute([text for text, _ in cases], inputs)
    for (text, expected), of_text in zip(cases, results, strict=True):
        assert torch.equal(halves(of_text, dtype), expected.to(dtype)), text
