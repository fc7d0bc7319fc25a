"""Gradient of the loss with respect to the student logits, the weights of the KLs held constant.

Of the two KLs, with w_f and w_r the weights of the forward and of the reverse one,

    dL/ds_j = (w_f (kept_p q_j - p_j) + w_r q_j (1 - u_j - reverse_kl - kept_q)) / T
    dL/ds_j = q_j (w_f kept_p - w_r (reverse_kl + kept_q)) / T          where t_j or s_j is -inf

or of a divergence that is a sum of terms, with G = sum g,

    dL/ds_j = (g_j - q_j G) / T

all times the derivative of the student's logit: its scale, and the slope of its softcap. With
everything that is constant in a row folded into coefficients this is

    ds_j = q_j (slope (log2 p_j - log2 q_j) + offset) - teacher p_j     or      q_j lost
    ds_j = rate g_j - q_j pull - teacher p_j      where teacher is of a forward KL that is mixed in

and for the variance of u with weights w, in place of the first two addends,

    ds_j = rate (w_j u_j - mean w_j)

The cross-entropy adds softmax(s)_j - [j = label], T = 1, times its weight. Where the divergence has
T = 1 as well the first of these is a part of offset, lost and pull; the second is one entry, which
is found before the sweep and written behind it, as is the label's where it is apart from all others
(decoupled.py).
"""

import triton
import triton.language as tl

from .arithmetic import LARGEST, LN2, LOWEST, held, rounded_sum, scaled, softcap_slope
from .blocks import UNROLL, block_pointers, edge_block, edge_count, load_edge, load_full, row_base
from .cross_entropy import is_token
from .terms import careful_terms, log_ratio

# The last time that a row is used: the L2 may drop it before rows that are swept again.
DONE = tl.constexpr("evict_first")
# Coefficients are held here, so that no sum of two terms is infinite where its factor q is 0; rows
# with larger ones than COEFFICIENT_LIMIT are written by the edge block's code, which holds the
# gradient, too. They come from a tiny T, or from rows whose sides share no token.
LARGEST_COEFFICIENT = tl.constexpr(2.0**125)
COEFFICIENT_LIMIT = tl.constexpr(2.0**64)


@triton.jit
def kl_coefficients(
    factor_t, factor_s, shift,  # of `normalisers`
    forward_weight, reverse_weight, reverse_kl, kept_p, kept_q, rate,
    of_label,  # by which q is multiplied for the cross-entropy
):  # fmt: skip
    """(slope, offset, teacher, lost) of the formulas above."""
    common = forward_weight * kept_p - reverse_weight * (reverse_kl + kept_q)
    student = factor_s * rate
    slope = -reverse_weight * LN2 * student
    offset = (common + reverse_weight - reverse_weight * LN2 * shift) * student
    return (
        held(slope, LARGEST_COEFFICIENT),
        held(offset + of_label, LARGEST_COEFFICIENT),
        held(forward_weight * factor_t * rate, LARGEST_COEFFICIENT),
        held(common * student + of_label, LARGEST_COEFFICIENT),
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
def _moderate(coefficient):
    """Whether full blocks may use it."""
    return tl.abs(coefficient) < COEFFICIENT_LIMIT


@triton.jit
def _edge_gradient(
    t_row, s_row, offsets, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1,
    base_t, base_s, lse_t, lse_s, lse_1, coefficients, of_label, at_label, label_rate,
    a, b, keep_p, keep_q,
    TERMS: tl.constexpr, HYBRID: tl.constexpr, MOMENTS: tl.constexpr,
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr,
):  # fmt: skip
    """ds at any offsets, by the code that knows -inf, what is beyond fp32, and the label."""
    t = load_edge(t_row, offsets, lead, end_t)
    s = load_edge(s_row, offsets, lead, end_s)
    log_p = scaled(t, scale_t, gain_t, lse_t, base_t)
    log_q = scaled(s, scale_s, gain_s, lse_s, base_s)
    q = tl.exp2(log_q)
    kept = (t > float("-inf")) & (s > float("-inf"))
    if TERMS is not None:
        rate, total, shift, factor_s, of_p, of_q = coefficients
        factor_t = factor_s * tl.exp2(shift)
        x, g, _ = careful_terms(
            t, s, log_p, log_q, shift, factor_t, factor_s, a, b, keep_p, keep_q, TERMS
        )
        ds = rate * held(g - (x if MOMENTS else q) * total, LARGEST_COEFFICIENT)
        if HYBRID:
            ds += q * of_q - tl.where(kept, of_p * tl.exp2(log_p), 0.0)
        if HAS_LABELS and not UNTEMPERED:
            ds += q * of_label
    else:
        slope, offset, teacher, lost, _, _ = coefficients
        u = tl.maximum(log_p, LOWEST) - tl.maximum(log_q, LOWEST)
        both = q * (slope * u + offset) - teacher * tl.exp2(log_p)
        ds = tl.where(kept, both, q * lost)
    if UNTEMPERED:
        ds += tl.exp2(scaled(s, scale_1, gain_s, lse_1, base_s)) * of_label
    if HAS_LABELS:
        ds -= tl.where(offsets == at_label, label_rate, 0.0)
    ds = held(ds, LARGEST)
    if gain_s is not None:
        ds *= softcap_slope(s, gain_s)
    return ds


@triton.jit
def _full_gradient(
    t, s, scale_t, gain_t, scale_s, gain_s, scale_1, lse_t, lse_s, lse_1,
    coefficients, factor_t, pull,  # factor_t and pull are of the terms
    of_label, a, b,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    TERMS: tl.constexpr, HYBRID: tl.constexpr, MOMENTS: tl.constexpr,
    ONE_SCALE: tl.constexpr, UNTEMPERED: tl.constexpr,
):  # fmt: skip
    """ds of a full block."""
    log_p = scaled(t, scale_t, gain_t, lse_t)
    log_q = scaled(s, scale_s, gain_s, lse_s)
    if TERMS is not None:
        rate, total, shift, factor_s, of_p, _ = coefficients
        u = log_ratio(t, s, log_p, log_q, scale_t, lse_t, lse_s, shift, ONE_SCALE)
        x, g = TERMS(log_p, log_q, u, factor_t, factor_s, a, b, False)
        if MOMENTS:
            g -= total * x
        ds = rate * g - tl.exp2(log_q) * pull
        if HYBRID:
            ds -= of_p * tl.exp2(log_p)
    else:
        slope, offset, teacher, _, _, _ = coefficients
        factor = offset
        if REVERSE:
            factor = slope * (log_p - log_q) + offset
        ds = tl.exp2(log_q) * factor
        if FORWARD:
            ds -= teacher * tl.exp2(log_p)
    if UNTEMPERED:
        ds += tl.exp2(scaled(s, scale_1, gain_s, lse_1)) * of_label
    if gain_s is not None:
        ds *= softcap_slope(s, gain_s)
    return ds


@triton.jit
def row_gradient(
    ds_row,  # gradient of the row, offset 0; may be s_row
    t_row, s_row, lead, end_t, end_s,
    scale_t, gain_t, scale_s, gain_s, scale_1,  # of `scaled`
    full_end,  # of the divergence
    lse_t, lse_s, lse_1,
    # For the KLs: slope, offset, teacher, lost, ds at a label that is apart, 0. For terms: rate, G
    # or mean, shift, factor_s, and the factors of p and q for a forward KL that is mixed in.
    coefficients,
    of_label,  # by which softmax(s), T = 1, is multiplied, where it is not in offset and lost
    label, label_rate,  # by which 1 is, at the label
    a, b, keep_p, keep_q,  # of the terms
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,  # whether their weights may be other than 0
    TERMS: tl.constexpr, HYBRID: tl.constexpr, MOMENTS: tl.constexpr,  # as in forward_kernel
    ONE_SCALE: tl.constexpr,  # of `log_ratio`
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr,
    APART: tl.constexpr,  # whether the label is apart from all others
    S_ALIGNED: tl.constexpr, DS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ds of one row; blocks 1 .. full_end-1 are finite on both sides."""
    columns = tl.arange(0, BLOCK)
    if TERMS is not None:
        rate, total, shift, factor_s, of_p, of_q = coefficients
        rate = held(rate, LARGEST_COEFFICIENT)
        total = held(total, LARGEST_COEFFICIENT)
        factor_t = factor_s * tl.exp2(shift)
        pull = 0.0 if MOMENTS else rate * total
        if HYBRID:
            pull -= of_q
        if HAS_LABELS and not UNTEMPERED:
            pull -= of_label
        moderate = _moderate(rate) & _moderate(total) & _moderate(pull)
        coefficients = (rate, total, shift, factor_s, of_p, of_q)
    else:
        slope, offset, teacher, lost, at_apart, nothing = coefficients
        slope = held(slope, LARGEST_COEFFICIENT)
        offset = held(offset, LARGEST_COEFFICIENT)
        teacher = held(teacher, LARGEST_COEFFICIENT)
        lost = held(lost, LARGEST_COEFFICIENT)
        factor_t, pull = 0.0, 0.0
        moderate = _moderate(slope) & _moderate(offset)
        if REVERSE:
            lse_t, lse_s, slope, offset, teacher, lost = _lifted(
                lse_t, lse_s, slope, offset, teacher, lost
            )
        coefficients = (slope, offset, teacher, lost, at_apart, nothing)
    full_end = tl.where(moderate, full_end, tl.minimum(full_end, 1))
    at_label = lead + label + tl.arange(0, 1)
    ds_of_label = tl.zeros((1,), tl.float32)
    apart = None
    if APART:
        apart = lead + label
        ds_of_label += held(at_apart, LARGEST)
        if gain_s is not None:
            ds_of_label *= softcap_slope(load_edge(s_row, at_label, lead, end_s), gain_s)
        tl.debug_barrier()  # as below
    elif HAS_LABELS:
        ds_of_label = _edge_gradient(
            t_row, s_row, at_label, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1,
            row_base(t_row, lead, end_t, gain_t, full_end, BLOCK),
            row_base(s_row, lead, end_s, gain_s, full_end, BLOCK),
            lse_t, lse_s, lse_1, coefficients, of_label, at_label,
            label_rate, a, b, keep_p, keep_q, TERMS, HYBRID, MOMENTS, HAS_LABELS, UNTEMPERED,
        )  # fmt: skip
        tl.debug_barrier()  # ds may be s: nobody writes before this is read
    # No load passes a store, as ds may be s: all of a turn stand before the first of its stores. In
    # fp32 half as many blocks fill as many registers.
    WIDEST: tl.constexpr = max(
        t_row.dtype.element_ty.primitive_bitwidth, s_row.dtype.element_ty.primitive_bitwidth
    )
    TURN: tl.constexpr = UNROLL if WIDEST == 16 else UNROLL // 2
    turns = (full_end - 1) // TURN
    for turn in tl.range(0, turns):
        begin = 1 + turn * TURN
        logits = ()
        for i in tl.static_range(TURN):
            t = load_full(t_row, begin + i, True, BLOCK, DONE)
            s = load_full(s_row, begin + i, S_ALIGNED, BLOCK, DONE)
            logits = logits + ((t, s),)
        for i in tl.static_range(TURN):
            t, s = logits[i]
            ds = _full_gradient(
                t, s, scale_t, gain_t, scale_s, gain_s, scale_1, lse_t, lse_s, lse_1,
                coefficients, factor_t, pull, of_label, a, b,
                FORWARD, REVERSE, TERMS, HYBRID, MOMENTS, ONE_SCALE, UNTEMPERED,
            ).to(ds_row.dtype.element_ty)  # fmt: skip
            pointers = block_pointers(ds_row, begin + i, DS_ALIGNED, BLOCK)
            tl.store(pointers, ds, eviction_policy=DONE)
    for block in range(1 + turns * TURN, full_end):
        t = load_full(t_row, block, True, BLOCK, DONE)
        s = load_full(s_row, block, S_ALIGNED, BLOCK, DONE)
        ds = _full_gradient(
            t, s, scale_t, gain_t, scale_s, gain_s, scale_1, lse_t, lse_s, lse_1,
            coefficients, factor_t, pull, of_label, a, b,
            FORWARD, REVERSE, TERMS, HYBRID, MOMENTS, ONE_SCALE, UNTEMPERED,
        ).to(ds_row.dtype.element_ty)  # fmt: skip
        tl.store(block_pointers(ds_row, block, DS_ALIGNED, BLOCK), ds, eviction_policy=DONE)
    base_t = row_base(t_row, lead, end_t, gain_t, full_end, BLOCK, apart)
    base_s = row_base(s_row, lead, end_s, gain_s, full_end, BLOCK, apart)
    for edge in range(0, edge_count(full_end, tl.cdiv(end_s, BLOCK))):
        offsets = edge_block(edge, full_end) * BLOCK + columns
        ds = _edge_gradient(
            t_row, s_row, offsets, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1,
            base_t, base_s, lse_t, lse_s, lse_1, coefficients, of_label, at_label,
            label_rate, a, b, keep_p, keep_q, TERMS, HYBRID, MOMENTS, HAS_LABELS, UNTEMPERED,
        )  # fmt: skip
        inside = (offsets >= lead) & (offsets < end_s)
        tl.store(ds_row + offsets, ds.to(ds_row.dtype.element_ty), mask=inside)
    if HAS_LABELS:
        tl.debug_barrier()
        known = is_token(label, lead, end_s)
        tl.store(ds_row + at_label, ds_of_label.to(ds_row.dtype.element_ty), mask=known)
