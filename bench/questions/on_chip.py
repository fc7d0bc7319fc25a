# Device code cannot be annotated.
# mypy: ignore-errors
"""`python -m bench on_chip`: a trial of a row that stays in registers, compiled and never run.

Packed words of two bf16 logits are read once and held through statistics, divergence and gradient;
the question is only how many registers they take, and what the arithmetic costs. The head's
boundary, the edges of a row and ties are left out. NOTES.md says why the kernels do not do this.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bench.lab.compile import record_launches
from bench.lab.sass import analyse
from bench.report.tables import table

# (V, warps, parts of a row, registers)
CASES = (
    (16_384, 16, 8, 128),
    (32_768, 16, 8, 128),
    (32_768, 16, 16, 128),
    (32_768, 32, 8, 64),
    (32_768, 32, 16, 64),
)


@triton.jit
def hold(words):
    """The words, opaque to LLVM: it would keep them unpacked from one stage to the next."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def unpack(words):
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def slope_of(t, s, scale, lse_t, lse_s, slope, offset, teacher):
    """ds of one logit, as in kernels/gradient.py."""
    log_p = tl.fma(t, scale, -lse_t)
    log_q = tl.fma(s, scale, -lse_s)
    return tl.exp2(log_q) * (slope * (log_p - log_q) + offset) - teacher * tl.exp2(log_p)


@triton.jit
def on_chip_kernel(
    s_ptr, t_ptr, ds_ptr,  # [N, V] bf16 as int32 words [N, V / 2]
    loss_ptr,  # [N] fp32
    V, scale, below_top, g,
    WORDS: tl.constexpr,  # of a part
    PARTS: tl.constexpr,
):  # fmt: skip
    """Statistics, divergence and gradient of one row of 2 WORDS PARTS logits."""
    row = tl.program_id(0).to(tl.int64)
    start = row * (V // 2) + tl.arange(0, WORDS)
    ts = ()
    ss = ()
    for part in tl.static_range(PARTS):
        ts = ts + (tl.load(t_ptr + start + part * WORDS),)
        ss = ss + (tl.load(s_ptr + start + part * WORDS),)

    reference_t = tl.max(unpack(ts[0])[0], axis=0) * scale
    reference_s = tl.max(unpack(ss[0])[0], axis=0) * scale
    z_t = tl.zeros((WORDS,), tl.float32)
    z_s = tl.zeros((WORDS,), tl.float32)
    slots = tl.full((WORDS,), float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        for half in tl.static_range(2):
            t = unpack(ts[part])[half]
            z_t += tl.exp2(tl.fma(t, scale, -reference_t))
            z_s += tl.exp2(tl.fma(unpack(ss[part])[half], scale, -reference_s))
            slots = tl.maximum(slots, t)
    lse_t = reference_t + tl.log2(tl.sum(z_t, axis=0))
    lse_s = reference_s + tl.log2(tl.sum(z_s, axis=0))
    crossing = tl.max(slots, axis=0) - below_top  # in place of the boundary

    forward_kl = tl.zeros((WORDS,), tl.float32)
    reverse_kl = tl.zeros((WORDS,), tl.float32)
    gap = tl.zeros((WORDS,), tl.float32)
    g_head = tl.zeros((WORDS,), tl.float32)
    for part in tl.static_range(PARTS):
        held_t = unpack(hold(ts[part]))
        held_s = unpack(hold(ss[part]))
        for half in tl.static_range(2):
            log_p = tl.fma(held_t[half], scale, -lse_t)
            log_q = tl.fma(held_s[half], scale, -lse_s)
            p = tl.exp2(log_p)
            q = tl.exp2(log_q)
            forward_kl += p * (log_p - log_q)
            reverse_kl += q * (log_q - log_p)
            distance = tl.abs(p - q)
            gap += distance
            g_head += tl.where(held_t[half] >= crossing, distance, 0.0)
    fkl = tl.sum(forward_kl, axis=0)
    rkl = tl.sum(reverse_kl, axis=0)
    w = tl.sum(g_head, axis=0) / tl.sum(gap, axis=0)
    tl.store(loss_ptr + row, w * fkl + (1 - w) * rkl)

    slope = -(1 - w) * g
    offset = (w + (1 - w) * (1 - rkl)) * g
    for part in tl.static_range(PARTS):
        t_low, t_high = unpack(hold(ts[part]))
        s_low, s_high = unpack(hold(ss[part]))
        low = slope_of(t_low, s_low, scale, lse_t, lse_s, slope, offset, w * g)
        high = slope_of(t_high, s_high, scale, lse_t, lse_s, slope, offset, w * g)
        words = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        tl.store(ds_ptr + start + part * WORDS, words)


def collect() -> dict[str, Any]:
    """The registers, stack and instructions of each case, compiled for sm_90."""
    found = []
    for v, warps, parts, registers in CASES:
        words = torch.zeros(2, v // 2, dtype=torch.int32)
        with record_launches("sm_90") as launches:
            on_chip_kernel[(2,)](
                *(words, words, words, torch.zeros(2), v, 1.4, 3.0, 1.0),
                WORDS=v // 2 // parts,
                PARTS=parts,
                num_warps=warps,
                maxnreg=registers,
            )
        code = analyse(launches[0].compiled)
        found.append(
            {
                **{"vocabulary": v, "warps": warps, "parts": parts},
                "registers": code.registers,
                "stack_bytes": code.stack_bytes,
                "instructions": code.whole.instructions * warps * code.warp_size / v,
                "resident_blocks": code.resident_blocks,
            }
        )
    return {"cases": found}


def markdown(data: dict[str, Any]) -> str:
    """A line for each case."""
    columns = ("V", "warps", "parts", "registers", "stack", "instructions", "blocks an SM")
    rows = [
        (
            *(f"{case['vocabulary']:,}", str(case["warps"]), str(case["parts"])),
            *(str(case["registers"]), str(case["stack_bytes"])),
            *(f"{case['instructions']:.1f}", str(case["resident_blocks"])),
        )
        for case in data["cases"]
    ]
    return (
        "Compiled for sm_90. Instructions are per position of the whole kernel, which has no "
        "boundary.\n\n" + table(columns, rows)
    )
