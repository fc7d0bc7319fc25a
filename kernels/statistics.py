"""Row statistics: both softmax denominators in one sweep, and the teacher's slot maxima.

    Z = sum_i 2^(log2(e) logit_i / T - reference)        lse = reference + log2 Z
    slots[j] = max of teacher[j], teacher[j + BLOCK], teacher[j + 2 BLOCK], ...
    hidden = max_j (mass of slot j - mass of slots[j])   no token that is no maximum is heavier

The reference is the first block's maximum, fixed before the sweep, so that no accumulator is ever
rescaled; a row whose sum outgrows it is summed again from its true maximum. Where that is so large
that its rounding would show, it is taken off the logits first (`row_base`), in edge blocks only:
such a row has no full ones, in this stage or the next.
"""

import triton
import triton.language as tl

from .arithmetic import rounded_sum, scaled
from .blocks import (
    UNROLL,
    edge_block,
    edge_count,
    full_blocks_end,
    load_edge,
    load_full,
    row_base,
    row_max,
)

# Rows whose sum of exponentials exceeds this are summed again from their true maximum: it keeps the
# arguments of exp2 below 20 + log2(V), where their rounding is harmless, and far from overflow.
SUM_LIMIT = tl.constexpr(2.0**20)
# Rows whose largest scaled logit exceeds this have it taken off before they are scaled, as
# `row_base`: the rounding of so large a reference would show, and then overflow.
REFERENCE_LIMIT = tl.constexpr(2.0**22)
# How much may have been lost in an fp32 sum of some hundred terms.
SUM_SLACK = tl.constexpr(1.0 + 2.0**-14)


@triton.jit
def row_statistics(
    t_row,  # teacher logits of the row, offset 0
    s_row,  # student logits of the row, offset 0
    lead,
    end_t,  # lead + V of the teacher
    end_s,  # lead + V of the student
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    SLOTS: tl.constexpr,  # whether the slot maxima are wanted; -inf otherwise
    S_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(reference_t, Z_t, reference_s, Z_s, slots [BLOCK], hidden, full_end)

    Z is NaN where a side has no softmax. Blocks 1 .. full_end-1 are full ones; full_end = 0 if the
    row has a base, on both sides."""
    columns = tl.arange(0, BLOCK)
    full_end = full_blocks_end(end_t, end_s, BLOCK)
    blocks = tl.cdiv(tl.maximum(end_t, end_s), BLOCK)

    first_t = tl.max(load_edge(t_row, columns, lead, end_t), axis=0)
    first_s = tl.max(load_edge(s_row, columns, lead, end_s), axis=0)
    reference_t = scaled(first_t, scale_t, gain_t, 0.0)
    reference_s = scaled(first_s, scale_s, gain_s, 0.0)
    z_t = 0.0
    z_s = 0.0
    hidden = 0.0
    slots = tl.full((BLOCK,), float("-inf"), tl.float32)
    sweeps = 2
    while sweeps > 0:
        sum_t = tl.zeros((BLOCK,), tl.float32)
        sum_s = tl.zeros((BLOCK,), tl.float32)
        for block in tl.range(1, full_end, loop_unroll_factor=UNROLL):
            t = load_full(t_row, block, True, BLOCK)
            s = load_full(s_row, block, S_ALIGNED, BLOCK)
            sum_t += tl.exp2(scaled(t, scale_t, gain_t, reference_t))
            sum_s += tl.exp2(scaled(s, scale_s, gain_s, reference_s))
            if SLOTS:
                slots = tl.maximum(slots, t)
        base_t = row_base(t_row, lead, end_t, gain_t, full_end, BLOCK)
        base_s = row_base(s_row, lead, end_s, gain_s, full_end, BLOCK)
        for edge in range(0, edge_count(full_end, blocks)):
            offsets = edge_block(edge, full_end) * BLOCK + columns
            t = load_edge(t_row, offsets, lead, end_t)
            s = load_edge(s_row, offsets, lead, end_s)
            sum_t += tl.exp2(scaled(t, scale_t, gain_t, reference_t, base_t))
            sum_s += tl.exp2(scaled(s, scale_s, gain_s, reference_s, base_s))
            if SLOTS:
                slots = tl.maximum(slots, t)
        z_t = tl.sum(sum_t, axis=0)
        z_s = tl.sum(sum_s, axis=0)
        if SLOTS:
            maxima = tl.exp2(scaled(slots, scale_t, gain_t, reference_t, base_t))
            hidden = tl.max(sum_t * SUM_SLACK - maxima, axis=0)
        sweeps -= 1
        fits = (z_t < SUM_LIMIT) & (z_s < SUM_LIMIT)  # false for NaN
        if fits & _moderate(reference_t, reference_s):
            sweeps = 0
        elif sweeps > 0:
            reference_t = scaled(row_max(t_row, lead, end_t, BLOCK), scale_t, gain_t, 0.0)
            reference_s = scaled(row_max(s_row, lead, end_s, BLOCK), scale_s, gain_s, 0.0)
            if _moderate(reference_t, reference_s) == 0:
                reference_t = 0.0
                reference_s = 0.0
                full_end = 0
    return reference_t, z_t, reference_s, z_s, slots, tl.maximum(hidden, 0.0), full_end


@triton.jit
def _moderate(reference_t, reference_s):
    """Whether the rounding of neither reference shows."""
    return (tl.abs(reference_t) < REFERENCE_LIMIT) & (tl.abs(reference_s) < REFERENCE_LIMIT)


@triton.jit
def normalisers(reference_t, z_t, reference_s, z_s):
    """(lse_t, lse_s, factor_t, factor_s, shift): p = factor_t 2^scaled(t, lse_t), q likewise of the
    student, and shift = log2(factor_t / factor_s)."""
    log2_t = tl.log2(z_t)
    log2_s = tl.log2(z_s)
    lse_t, correction_t = rounded_sum(reference_t, log2_t)
    lse_s, correction_s = rounded_sum(reference_s, log2_s)
    # Logarithms are rounded, too, which shows where p is close to q: their difference is not.
    shift = correction_s - correction_t + (tl.log2(z_s / z_t) - (log2_s - log2_t))
    factor_t = tl.exp2(-correction_t)
    return lse_t, lse_s, factor_t, factor_t * tl.exp2(-shift), shift
