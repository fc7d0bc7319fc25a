"""Gradient of the loss with respect to the student logits, w held constant.

    dL/ds_j = (w (kept_p q_j - p_j) + (1 - w) q_j (1 - u_j - reverse_kl - kept_q)) / T
    dL/ds_j = q_j (w kept_p - (1 - w) (reverse_kl + kept_q)) / T        where t_j or s_j is -inf

or of a divergence that is a sum of terms, with G = sum g,

    dL/ds_j = (g_j - q_j G) / T

all times the derivative of the student's logit: its scale, and the slope of its softcap. With
everything that is constant in a row folded into five coefficients this is

    ds_j = q_j (slope (log2 p_j - log2 q_j) + offset) - teacher p_j     or      q_j lost
"""

import triton
import triton.language as tl

from .arithmetic import LARGEST, LN2, LOWEST, held, rounded_sum, scaled, softcap_slope
from .blocks import UNROLL, block_offsets, edge_block, edge_count, load_edge, load_full, row_base
from .statistics import normalisers
from .terms import careful_terms, log_ratio

# The last time that a row is used: the L2 may drop it before rows that are swept again.
DONE = tl.constexpr("evict_first")
# Coefficients are held here, so that no sum of two terms is infinite where its factor q is 0; rows
# with larger ones than COEFFICIENT_LIMIT are written by the edge block's code, which holds the
# gradient, too. They come from a tiny T, or from rows whose sides share no token.
LARGEST_COEFFICIENT = tl.constexpr(2.0**125)
COEFFICIENT_LIMIT = tl.constexpr(2.0**64)


@triton.jit
def gradient_coefficients(
    reference_t, z_t, reference_s, z_s, forward_weight, reverse_kl, kept_p, kept_q, rate
):
    """(lse_t, lse_s, slope, offset, teacher, lost) of the formulas above."""
    lse_t, lse_s, factor_t, factor_s, shift = normalisers(reference_t, z_t, reference_s, z_s)
    rest = 1.0 - forward_weight
    common = forward_weight * kept_p - rest * (reverse_kl + kept_q)
    student = factor_s * rate
    slope = -rest * LN2 * student
    offset = (common + rest - rest * LN2 * shift) * student
    return (
        lse_t,
        lse_s,
        held(slope, LARGEST_COEFFICIENT),
        held(offset, LARGEST_COEFFICIENT),
        held(forward_weight * factor_t * rate, LARGEST_COEFFICIENT),
        held(common * student, LARGEST_COEFFICIENT),
    )


@triton.jit
def _lifted(lse_t, lse_s, slope, offset, teacher, lost):
    """The same gradient from 2^k p and 2^k q, with k so that no finite u makes slope u infinite,
    which q = 0 would turn into NaN; 0 where |slope| < 3/4."""
    bits = (slope * 1.3333334).to(tl.int32, bitcast=True)
    k = tl.maximum(((bits >> 23) & 0xFF) - 126, 0).to(tl.float32)
    lse_t, rest_t = rounded_sum(lse_t, -k)
    lse_s, rest_s = rounded_sum(lse_s, -k)
    teacher *= tl.exp2(-k) * tl.exp2(-rest_t)
    student = tl.exp2(-k) * tl.exp2(-rest_s)
    slope *= student
    offset = offset * student + slope * (rest_s - rest_t)
    return lse_t, lse_s, slope, offset, teacher, lost * student


@triton.jit
def damping(loss):
    """The power of two at or below 2 + |loss|, where |ds| <= rate (2 + |loss|)."""
    bits = (tl.abs(loss) + 2.0).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def row_gradient(
    ds_row,  # gradient of the row, offset 0; may be s_row
    t_row, s_row, lead, end_t, end_s,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    full_end,  # of the divergence
    lse_t, lse_s, slope, offset, teacher, lost,
    REVERSE: tl.constexpr,
    S_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ds of one row; blocks 1 .. full_end-1 are finite on both sides."""
    columns = tl.arange(0, BLOCK)
    slope = held(slope, LARGEST_COEFFICIENT)
    offset = held(offset, LARGEST_COEFFICIENT)
    teacher = held(teacher, LARGEST_COEFFICIENT)
    lost = held(lost, LARGEST_COEFFICIENT)
    moderate = (tl.abs(slope) < COEFFICIENT_LIMIT) & (tl.abs(offset) < COEFFICIENT_LIMIT)
    full_end = tl.where(moderate, full_end, tl.minimum(full_end, 1))
    if REVERSE:
        lse_t, lse_s, slope, offset, teacher, lost = _lifted(
            lse_t, lse_s, slope, offset, teacher, lost
        )
    # Loads stay behind the stores before them (ds may be s): a longer turn takes no registers.
    for block in tl.range(1, full_end, loop_unroll_factor=2 * UNROLL):
        t = load_full(t_row, block, True, BLOCK, DONE)
        s = load_full(s_row, block, S_ALIGNED, BLOCK, DONE)
        log_p = scaled(t, scale_t, gain_t, lse_t)
        log_q = scaled(s, scale_s, gain_s, lse_s)
        factor = offset
        if REVERSE:
            factor = slope * (log_p - log_q) + offset
        ds = tl.exp2(log_q) * factor - teacher * tl.exp2(log_p)
        if gain_s is not None:
            ds *= softcap_slope(s, gain_s)
        ds = ds.to(ds_row.dtype.element_ty)
        tl.store(ds_row + block_offsets(block, BLOCK), ds, eviction_policy=DONE)
    base_t = row_base(t_row, lead, end_t, gain_t, full_end, BLOCK)
    base_s = row_base(s_row, lead, end_s, gain_s, full_end, BLOCK)
    for edge in range(0, edge_count(full_end, tl.cdiv(end_s, BLOCK))):
        offsets = edge_block(edge, full_end) * BLOCK + columns
        t = load_edge(t_row, offsets, lead, end_t)
        s = load_edge(s_row, offsets, lead, end_s)
        log_p = scaled(t, scale_t, gain_t, lse_t, base_t)
        log_q = scaled(s, scale_s, gain_s, lse_s, base_s)
        q = tl.exp2(log_q)
        kept = (t > float("-inf")) & (s > float("-inf"))
        u = tl.maximum(log_p, LOWEST) - tl.maximum(log_q, LOWEST)
        both = q * (slope * u + offset) - teacher * tl.exp2(log_p)
        ds = held(tl.where(kept, both, q * lost), LARGEST)
        if gain_s is not None:
            ds *= softcap_slope(s, gain_s)
        inside = (offsets >= lead) & (offsets < end_s)
        tl.store(ds_row + offsets, ds.to(ds_row.dtype.element_ty), mask=inside)


@triton.jit
def row_gradient_of_terms(
    ds_row,  # gradient of the row, offset 0; may be s_row
    t_row, s_row, lead, end_t, end_s,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    full_end,  # of the divergence
    lse_t, lse_s, shift, factor_s,  # of `normalisers`
    rate,  # by which g_j - q_j G is multiplied
    total,  # G
    a, b, keep_p, keep_q,  # of the terms
    TERMS: tl.constexpr, ONE_SCALE: tl.constexpr,  # of `log_ratio`
    S_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ds = rate (g - q G) of one row; blocks 1 .. full_end-1 are finite on both sides."""
    columns = tl.arange(0, BLOCK)
    rate = held(rate, LARGEST_COEFFICIENT)
    total = held(total, LARGEST_COEFFICIENT)
    factor_t = factor_s * tl.exp2(shift)
    moderate = (tl.abs(rate) < COEFFICIENT_LIMIT) & (tl.abs(total) < COEFFICIENT_LIMIT)
    full_end = tl.where(moderate, full_end, tl.minimum(full_end, 1))
    for block in tl.range(1, full_end, loop_unroll_factor=2 * UNROLL):
        t = load_full(t_row, block, True, BLOCK, DONE)
        s = load_full(s_row, block, S_ALIGNED, BLOCK, DONE)
        log_p = scaled(t, scale_t, gain_t, lse_t)
        log_q = scaled(s, scale_s, gain_s, lse_s)
        u = log_ratio(t, s, log_p, log_q, scale_t, lse_t, lse_s, shift, ONE_SCALE)
        _, g = TERMS(log_p, log_q, u, factor_t, factor_s, a, b, False)
        ds = rate * (g - tl.exp2(log_q) * total)
        if gain_s is not None:
            ds *= softcap_slope(s, gain_s)
        ds = ds.to(ds_row.dtype.element_ty)
        tl.store(ds_row + block_offsets(block, BLOCK), ds, eviction_policy=DONE)
    base_t = row_base(t_row, lead, end_t, gain_t, full_end, BLOCK)
    base_s = row_base(s_row, lead, end_s, gain_s, full_end, BLOCK)
    for edge in range(0, edge_count(full_end, tl.cdiv(end_s, BLOCK))):
        offsets = edge_block(edge, full_end) * BLOCK + columns
        t = load_edge(t_row, offsets, lead, end_t)
        s = load_edge(s_row, offsets, lead, end_s)
        log_p = scaled(t, scale_t, gain_t, lse_t, base_t)
        log_q = scaled(s, scale_s, gain_s, lse_s, base_s)
        _, g = careful_terms(
            t, s, log_p, log_q, shift, factor_t, factor_s, a, b, keep_p, keep_q, TERMS
        )
        ds = held(rate * held(g - tl.exp2(log_q) * total, LARGEST_COEFFICIENT), LARGEST)
        if gain_s is not None:
            ds *= softcap_slope(s, gain_s)
        inside = (offsets >= lead) & (offsets < end_s)
        tl.store(ds_row + offsets, ds.to(ds_row.dtype.element_ty), mask=inside)
