"""Row statistics: both softmax denominators in one sweep, and what else that sweep can give.

    x = log2(e) logit / T - reference                    of the teacher and of the student
    Z = sum_i 2^x_i                                      lse = reference + log2 Z
    slots[j] = max of teacher[j], teacher[j + BLOCK], teacher[j + 2 BLOCK], ...
    hidden = max_j (mass of slot j - mass of slots[j])   no token that is no maximum is heavier

What is linear in p or in q needs no second sweep: with v = x_t - x_s, ln p - ln q is
ln 2 (v - log2(Z_t / Z_s)), and

    forward_kl = ln 2 (sum_i 2^x_t v / Z_t - log2(Z_t / Z_s))
    reverse_kl = ln 2 (log2(Z_t / Z_s) - sum_i 2^x_s v / Z_s)
    entropy = ln 2 (log2 Z - sum_i 2^x x / Z)            of either side
    agreement = 1 where max_i (t_i + s_i) is max t + max s: where a token is the top of both

A token may be left `apart`: all sums but those of STATS are then without it (see decoupled.py).

A token that is -inf on either side adds nothing to the KLs. Full blocks do not look for it: it
makes a sum infinite or NaN, and such a row is swept again with the edge block's code everywhere.

The reference is the first block's maximum, fixed before the sweep, so that no accumulator is ever
rescaled; a row whose sum outgrows it is summed again from its true maximum. Where that is so large
that its rounding would show, it is taken off the logits first (`row_base`), in edge blocks only:
such a row has no full ones, in this stage or the next.
"""

import triton
import triton.language as tl

from .arithmetic import LN2, LOWEST, rounded_sum, scaled
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
from .reductions import maxima, wanted_maxima, wanted_sums

# Rows whose sum of exponentials exceeds this are summed again from their true maximum: it keeps the
# arguments of exp2 below 20 + log2(V), where their rounding is harmless, and far from overflow.
SUM_LIMIT = tl.constexpr(2.0**20)
# Rows whose largest scaled logit exceeds this have it taken off before they are scaled, as
# `row_base`: the rounding of so large a reference would show, and then overflow.
REFERENCE_LIMIT = tl.constexpr(2.0**22)
# A scaled logit of no weight: 2^this is 0.
NOTHING = tl.constexpr(-(2.0**20))
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
    scale_1,  # of the student at T = 1
    apart,  # the offset of a token that is left out, or None
    SLOTS: tl.constexpr,  # whether the slot maxima are wanted; -inf otherwise
    STATS: tl.constexpr,  # whether entropies and agreement are; 0 otherwise
    ENTROPY: tl.constexpr,  # whether that of the teacher is
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,  # whether the sums of the KLs are; 0 otherwise
    UNTEMPERED: tl.constexpr,  # whether Z of the student at T = 1 is; 0 otherwise
    S_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(reference_t, Z_t, reference_s, Z_s, reference_1, Z_1, slots [BLOCK], top, top_s, hidden,
    forward_kl, reverse_kl, kept_p, kept_q, entropy_t, entropy_s, agreement, full_end)

    Z is NaN where a side has no softmax, and 0 where it has nothing but the token apart. kept_p and
    kept_q are the masses of the tokens that are finite on both sides. Blocks 1 .. full_end-1 are
    full ones, with no other tokens where a KL or the entropies are wanted; full_end = 0 if the row
    has a base, on both sides."""
    columns = tl.arange(0, BLOCK)
    full_end = full_blocks_end(end_t, end_s, BLOCK)
    blocks = tl.cdiv(tl.maximum(end_t, end_s), BLOCK)

    first_t, first_s = maxima(
        (
            load_edge(t_row, columns, lead, end_t, apart),
            load_edge(s_row, columns, lead, end_s, apart),
        )
    )
    reference_t = scaled(first_t, scale_t, gain_t, 0.0)
    reference_s = scaled(first_s, scale_s, gain_s, 0.0)
    reference_1 = 0.0
    if UNTEMPERED:
        reference_1 = scaled(first_s, scale_1, gain_s, 0.0)
    z_t = 0.0
    z_s = 0.0
    z_1 = 0.0
    top = 0.0
    hidden = 0.0
    top_s = 0.0
    top_both = 0.0
    forward = 0.0
    reverse = 0.0
    lost_t = 0.0
    lost_s = 0.0
    log_t = 0.0
    log_s = 0.0
    slots = tl.full((BLOCK,), float("-inf"), tl.float32)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    both = tl.full((BLOCK,), float("-inf"), tl.float32)
    sweeps = 3
    while sweeps > 0:
        sum_t = tl.zeros((BLOCK,), tl.float32)
        sum_s = tl.zeros((BLOCK,), tl.float32)
        sum_1 = tl.zeros((BLOCK,), tl.float32)
        sum_forward = tl.zeros((BLOCK,), tl.float32)
        sum_reverse = tl.zeros((BLOCK,), tl.float32)
        sum_log_t = tl.zeros((BLOCK,), tl.float32)
        sum_log_s = tl.zeros((BLOCK,), tl.float32)
        for block in tl.range(1, full_end, loop_unroll_factor=UNROLL):
            t = load_full(t_row, block, True, BLOCK)
            s = load_full(s_row, block, S_ALIGNED, BLOCK)
            x_t = scaled(t, scale_t, gain_t, reference_t)
            x_s = scaled(s, scale_s, gain_s, reference_s)
            if apart is not None:
                here = columns == apart - block * BLOCK
                x_t = tl.where(here, NOTHING, x_t)
                x_s = tl.where(here, NOTHING, x_s)
            e_t = tl.exp2(x_t)
            e_s = tl.exp2(x_s)
            sum_t += e_t
            sum_s += e_s
            if FORWARD:
                sum_forward += e_t * (x_t - x_s)
            if REVERSE:
                sum_reverse += e_s * (x_t - x_s)
            if UNTEMPERED:
                x_1 = scaled(s, scale_1, gain_s, reference_1)
                if apart is not None:
                    x_1 = tl.where(here, NOTHING, x_1)
                sum_1 += tl.exp2(x_1)
            if SLOTS:
                slots = tl.maximum(slots, t)
            if ENTROPY or STATS:
                sum_log_t += e_t * x_t
            if STATS:
                sum_log_s += e_s * x_s
                tops = tl.maximum(tops, s)
                both = tl.maximum(both, t + s)
        sum_lost_t = tl.zeros((BLOCK,), tl.float32)
        sum_lost_s = tl.zeros((BLOCK,), tl.float32)
        base_t = row_base(t_row, lead, end_t, gain_t, full_end, BLOCK, apart)
        base_s = row_base(s_row, lead, end_s, gain_s, full_end, BLOCK, apart)
        for edge in range(0, edge_count(full_end, blocks)):
            offsets = edge_block(edge, full_end) * BLOCK + columns
            t = load_edge(t_row, offsets, lead, end_t, apart)
            s = load_edge(s_row, offsets, lead, end_s, apart)
            x_t = scaled(t, scale_t, gain_t, reference_t, base_t)
            x_s = scaled(s, scale_s, gain_s, reference_s, base_s)
            e_t = tl.exp2(x_t)
            e_s = tl.exp2(x_s)
            sum_t += e_t
            sum_s += e_s
            if FORWARD or REVERSE:
                kept = (t > float("-inf")) & (s > float("-inf"))
                v = tl.where(kept, tl.maximum(x_t, LOWEST) - tl.maximum(x_s, LOWEST), 0.0)
                sum_lost_t += tl.where(kept, 0.0, e_t)
                sum_lost_s += tl.where(kept, 0.0, e_s)
                if FORWARD:
                    sum_forward += e_t * v
                if REVERSE:
                    sum_reverse += e_s * v
            if UNTEMPERED:
                sum_1 += tl.exp2(scaled(s, scale_1, gain_s, reference_1, base_s))
            if SLOTS:
                slots = tl.maximum(slots, t)
            if ENTROPY or STATS:
                sum_log_t += e_t * tl.maximum(x_t, LOWEST)
            if STATS:
                sum_log_s += e_s * tl.maximum(x_s, LOWEST)
                tops = tl.maximum(tops, s)
                both = tl.maximum(both, t + s)
        z_t, z_s, lost_t, lost_s, forward, reverse, log_t, log_s, z_1 = wanted_sums(
            (
                sum_t, sum_s, sum_lost_t, sum_lost_s, sum_forward, sum_reverse,
                sum_log_t, sum_log_s, sum_1,
            ),
            (
                True, True, FORWARD or REVERSE, FORWARD or REVERSE, FORWARD, REVERSE,
                ENTROPY or STATS, STATS, UNTEMPERED,
            ),
        )  # fmt: skip
        if SLOTS:
            masses = tl.exp2(scaled(slots, scale_t, gain_t, reference_t, base_t))
            top, hidden, top_s, top_both = wanted_maxima(
                (slots, sum_t * SUM_SLACK - masses, tops, both), (True, True, STATS, STATS)
            )
        fits = (z_t < SUM_LIMIT) & (z_s < SUM_LIMIT) & (z_1 < SUM_LIMIT)  # false for NaN
        known = tl.abs(forward) + tl.abs(reverse) < float("inf")
        known = known & (tl.abs(log_t) + tl.abs(log_s) < float("inf"))
        sweeps -= 1
        moderate = _moderate(reference_t) & _moderate(reference_s) & _moderate(reference_1)
        if fits & moderate & known:
            sweeps = 0
        elif sweeps > 0:
            if fits & moderate:
                full_end = tl.minimum(full_end, 1)
                # The sums of the next sweep are means, which are finite where v is.
                reference_t += tl.log2(z_t)
                reference_s += tl.log2(z_s)
            else:
                max_t = row_max(t_row, lead, end_t, BLOCK, apart)
                max_s = row_max(s_row, lead, end_s, BLOCK, apart)
                reference_t = scaled(max_t, scale_t, gain_t, 0.0)
                reference_s = scaled(max_s, scale_s, gain_s, 0.0)
                if UNTEMPERED:
                    reference_1 = scaled(max_s, scale_1, gain_s, 0.0)
                if (_moderate(reference_t) & _moderate(reference_s) & _moderate(reference_1)) == 0:
                    reference_t = 0.0
                    reference_s = 0.0
                    reference_1 = 0.0
                    full_end = 0
    kept_p = 1.0 - lost_t / z_t
    kept_q = 1.0 - lost_s / z_s
    shift = tl.log2(z_t / z_s)  # from the quotient: accurate where p is close to q
    # LN2 first: a mean next to the largest number stays finite.
    forward_kl = LN2 * (forward / z_t) - LN2 * shift * kept_p
    reverse_kl = LN2 * shift * kept_q - LN2 * (reverse / z_s)
    # Only where a token is dropped can they be less than 0, but for rounding.
    forward_kl = tl.where((lost_t == 0.0) & (forward_kl < 0.0), 0.0, forward_kl)
    reverse_kl = tl.where((lost_s == 0.0) & (reverse_kl < 0.0), 0.0, reverse_kl)
    entropy_t = LN2 * (tl.log2(z_t) - log_t / z_t)
    entropy_s = LN2 * (tl.log2(z_s) - log_s / z_s)
    agreement = 0.0
    if STATS:
        agreement = tl.where(top_both == top + top_s, 1.0, 0.0)
    return (
        reference_t, z_t, reference_s, z_s, reference_1, z_1, slots, top, top_s,
        tl.maximum(hidden, 0.0), forward_kl, reverse_kl, kept_p, kept_q, entropy_t, entropy_s,
        agreement, full_end,
    )  # fmt: skip


@triton.jit
def _moderate(reference):
    """Whether the rounding of a reference does not show."""
    return tl.abs(reference) < REFERENCE_LIMIT


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
