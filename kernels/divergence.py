"""Stage B, divergence: both KL sums, the gap and its head share, with both normalisers known.

    u_i = ln p_i - ln q_i
    forward_kl = sum p_i u_i        reverse_kl = -sum q_i u_i
    gap = sum |p_i - q_i|           g_head = the same over the head
    w = g_head / gap                loss = w forward_kl + (1 - w) reverse_kl

The sums run on logarithms to base 2 that are off by a constant of the row, the rounding of its lse
(`normalisers`); the constant is put back at the end. A token that is -inf on either side
counts in the gap and adds nothing to the KL sums. Full blocks do not look for it: it makes a sum
infinite or NaN, and such a row is swept again with the edge block's code everywhere.
"""

import triton
import triton.language as tl

from .rows import (
    LOWEST,
    UNROLL,
    edge_block,
    edge_count,
    load_edge,
    load_full,
    rounded_sum,
    row_base,
    scaled,
)

LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def next_above(x):
    """The smallest fp32 above x."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 1
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def row_divergence(
    t_row, s_row, lead, end_t, end_s,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    reference_t, z_t, reference_s, z_s, full_end,  # of stage A
    crossing, k, cut,  # of stage R
    weight,  # w where there is no head
    HAS_HEAD: tl.constexpr, STABLE: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, STATS: tl.constexpr,
    S_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(forward_kl, reverse_kl, w, gap, head_size, kept_p, kept_q, full_end)

    kept_p and kept_q are the masses of the tokens that are finite on both sides, and blocks
    1 .. full_end-1 hold no others."""
    GAP: tl.constexpr = HAS_HEAD or STATS
    columns = tl.arange(0, BLOCK)
    lse_t, lse_s, factor_t, factor_s, shift = normalisers(reference_t, z_t, reference_s, z_s)
    ratio = tl.exp2(-shift)
    above_crossing = next_above(crossing)

    blocks = tl.cdiv(tl.maximum(end_t, end_s), BLOCK)
    fkl = 0.0
    rkl = 0.0
    gap = 0.0
    g_head = 0.0
    g_ties = 0.0
    ties = 0.0
    size = 0.0
    dropped_p = 0.0
    dropped_q = 0.0
    sweeps = 2
    while sweeps > 0:
        sum_f = tl.zeros((BLOCK,), tl.float32)
        sum_r = tl.zeros((BLOCK,), tl.float32)
        sum_gap = tl.zeros((BLOCK,), tl.float32)
        sum_head = tl.zeros((BLOCK,), tl.float32)
        sum_ties = tl.zeros((BLOCK,), tl.float32)
        count_head = tl.zeros((BLOCK,), tl.float32)
        count_ties = tl.zeros((BLOCK,), tl.float32)
        lost_p = tl.zeros((BLOCK,), tl.float32)
        lost_q = tl.zeros((BLOCK,), tl.float32)
        # From the end, which A left in the L2. Ties belong to the head in the blocks before the
        # cut, and not from there on.
        turn = tl.minimum(tl.maximum(cut // BLOCK, 1), full_end)
        for part in range(2):
            begin = tl.where(part == 0, turn, 1)
            end = tl.where(part == 0, full_end, turn)
            least = tl.where(part == 0, above_crossing, crossing)
            for step in tl.range(0, end - begin, loop_unroll_factor=UNROLL):
                block = (end - 1).to(tl.int64) - step
                t = load_full(t_row, block, True, BLOCK)
                s = load_full(s_row, block, S_ALIGNED, BLOCK)
                log_p = scaled(t, scale_t, gain_t, lse_t)
                log_q = scaled(s, scale_s, gain_s, lse_s)
                p = tl.exp2(log_p)
                q = tl.exp2(log_q)
                u = log_p - log_q
                if FORWARD:
                    sum_f += p * u
                if REVERSE:
                    sum_r += q * u
                if GAP:
                    distance = tl.abs(p - ratio * q)
                    sum_gap += distance
                if HAS_HEAD:
                    sum_head += tl.where(t >= least, distance, 0.0)
                    if STATS:
                        count_head += (t > crossing).to(tl.float32)
                    if not STABLE:
                        sum_ties += tl.where(t == crossing, distance, 0.0)
                        count_ties += (t == crossing).to(tl.float32)
        base_t = row_base(t_row, lead, end_t, gain_t, full_end, BLOCK)
        base_s = row_base(s_row, lead, end_s, gain_s, full_end, BLOCK)
        for edge in range(0, edge_count(full_end, blocks)):
            block = edge_block(edge, full_end)
            offsets = block * BLOCK + columns
            t = load_edge(t_row, offsets, lead, end_t)
            s = load_edge(s_row, offsets, lead, end_s)
            log_p = scaled(t, scale_t, gain_t, lse_t, base_t)
            log_q = scaled(s, scale_s, gain_s, lse_s, base_s)
            p = tl.exp2(log_p)
            q = tl.exp2(log_q)
            kept = (t > float("-inf")) & (s > float("-inf"))
            u = tl.where(kept, tl.maximum(log_p, LOWEST) - tl.maximum(log_q, LOWEST), 0.0)
            lost_p += tl.where(kept, 0.0, p)
            lost_q += tl.where(kept, 0.0, q)
            if FORWARD:
                sum_f += p * u
            if REVERSE:
                sum_r += q * u
            if GAP:
                distance = tl.abs(p - ratio * q)
                sum_gap += distance
            if HAS_HEAD:
                least = tl.where((block + 1) * BLOCK <= cut, crossing, above_crossing)
                sum_head += tl.where(t >= least, distance, 0.0)
                if STATS:
                    count_head += (t > crossing).to(tl.float32)
                if not STABLE:
                    sum_ties += tl.where(t == crossing, distance, 0.0)
                    count_ties += (t == crossing).to(tl.float32)
        fkl = tl.sum(sum_f, axis=0)
        rkl = tl.sum(sum_r, axis=0)
        gap = tl.sum(sum_gap, axis=0)
        g_head = tl.sum(sum_head, axis=0)
        g_ties = tl.sum(sum_ties, axis=0)
        ties = tl.sum(count_ties, axis=0)
        size = tl.sum(count_head, axis=0)
        dropped_p = tl.sum(lost_p, axis=0)
        dropped_q = tl.sum(lost_q, axis=0)
        sweeps -= 1
        if tl.abs(fkl) + tl.abs(rkl) < float("inf"):
            sweeps = 0
        elif sweeps > 0:
            full_end = tl.minimum(full_end, 1)

    if HAS_HEAD:
        if STABLE:
            # The block in which the cut lies was swept without its ties.
            offsets = cut // BLOCK * BLOCK + columns
            t = load_edge(t_row, offsets, lead, end_t)
            s = load_edge(s_row, offsets, lead, end_s)
            base_t = row_base(t_row, lead, end_t, gain_t, full_end, BLOCK)
            base_s = row_base(s_row, lead, end_s, gain_s, full_end, BLOCK)
            distance = tl.abs(
                tl.exp2(scaled(t, scale_t, gain_t, lse_t, base_t))
                - ratio * tl.exp2(scaled(s, scale_s, gain_s, lse_s, base_s))
            )
            g_head += tl.sum(tl.where((t == crossing) & (offsets < cut), distance, 0.0), axis=0)
        else:
            k = tl.minimum(k, ties)
            g_head += g_ties * (k / tl.maximum(ties, 1.0))
        size += k
        weight = tl.where(g_head > gap, 1.0, g_head / gap)  # two sums of the same terms may differ
        weight = tl.where(gap == 0.0, 0.5, weight)
    else:
        size = float("nan")
    kept_p = 1.0 - factor_t * dropped_p
    kept_q = 1.0 - factor_s * dropped_q
    # The sweep's u lacks the shift. LN2 first: a sum next to the largest number stays finite.
    fkl = LN2 * factor_t * fkl + LN2 * shift * kept_p
    rkl = -(LN2 * factor_s * rkl + LN2 * shift * kept_q)
    return fkl, rkl, weight, factor_t * gap, size, kept_p, kept_q, full_end
