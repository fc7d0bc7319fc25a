"""Divergence: the sums that are not linear in p and q, with both normalisers known.

    gap = sum |p_i - q_i|           g_head = the same over the head
    w = g_head / gap                the weight of the forward KL, whose sums the statistics gave

A token that is -inf on either side counts in the gap.

A divergence that is a sum of terms (see terms.py) has sums of its own, of x and g, and a gap only
where it is asked for as a statistic; `moments` has those of w, w u and w u^2. They run on
logarithms to base 2 that are off by a constant of the row, the rounding of its lse (`normalisers`).
Full blocks do not look for tokens that are -inf: these make a sum infinite or NaN, and the row is
swept again with the edge block's code everywhere, as is one with large sums.
"""

import triton
import triton.language as tl

from .arithmetic import next_above, scaled
from .blocks import UNROLL, edge_block, edge_count, load_edge, load_full, row_base
from .reductions import wanted_sums
from .statistics import normalisers
from .terms import careful_terms, log_ratio

ACCUMULATORS = tl.constexpr(8)  # of `_add_terms`
# Sums of terms beyond this, in bits, are made again with the edge block's code: sides so far apart
# have powers of large logarithms, of which it loses less.
LARGEST_SUM = tl.constexpr(64.0)


@triton.jit
def _add_terms(
    accumulators, t, p, q, ratio, crossing,
    least,  # logits from here on belong to the head in this block
    x, g, u,  # of the terms
    HAS_HEAD: tl.constexpr, STABLE: tl.constexpr,
    STATS: tl.constexpr, TERMS: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """Add a block to the sums of |p - q| over all tokens, over the head and over the ties, to the
    counts of both, and to the sums of a divergence's terms."""
    gap, head, ties, head_count, tie_count, sum_x, sum_g, sum_squares = accumulators
    if TERMS is not None:
        sum_x += x
        sum_g += g
    if MOMENTS:
        sum_squares += g * u
    if HAS_HEAD or STATS:
        distance = tl.abs(p - ratio * q)
        gap += distance
    if HAS_HEAD:
        head += tl.where(t >= least, distance, 0.0)
        if STATS:
            head_count += (t > crossing).to(tl.float32)
        if not STABLE:
            ties += tl.where(t == crossing, distance, 0.0)
            tie_count += (t == crossing).to(tl.float32)
    return gap, head, ties, head_count, tie_count, sum_x, sum_g, sum_squares


@triton.jit
def row_divergence(
    t_row, s_row, lead, end_t, end_s,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    reference_t, z_t, reference_s, z_s, full_end,  # of the statistics
    crossing, taken, cut,  # of the boundary
    end_of_head,  # the offset from which on tokens are in no head, or None
    forward_weight,  # w where there is no head
    a, b, keep_p, keep_q,  # of the terms: their numbers, and whether an entry of one side counts
    pivot,  # taken off u where MOMENTS: near its mean, so that no variance cancels
    HAS_HEAD: tl.constexpr, STABLE: tl.constexpr,
    STATS: tl.constexpr, TERMS: tl.constexpr,
    MOMENTS: tl.constexpr,  # whether the terms are those of `moments`
    ONE_SCALE: tl.constexpr,  # of `log_ratio`
    S_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(w, gap, head_size, total_x, total_g, variance, full_end)

    total_x and total_g are the sums of the terms, in bits, of which blocks 1 .. full_end-1 hold
    entries that are finite on both sides; or where MOMENTS the sum of w and the mean of u - pivot,
    whose variance is 0 elsewhere."""
    columns = tl.arange(0, BLOCK)
    lse_t, lse_s, factor_t, factor_s, shift = normalisers(reference_t, z_t, reference_s, z_s)
    ratio = tl.exp2(-shift)
    if MOMENTS:
        shift -= pivot
    above_crossing = next_above(crossing)

    blocks = tl.cdiv(tl.maximum(end_t, end_s), BLOCK)
    gap = 0.0
    g_head = 0.0
    g_ties = 0.0
    ties = 0.0
    size = 0.0
    total_x = 0.0
    total_g = 0.0
    total_squares = 0.0
    sweeps = 2
    while sweeps > 0:
        accumulators = ()
        for _ in tl.static_range(ACCUMULATORS):
            accumulators = accumulators + (tl.zeros((BLOCK,), tl.float32),)
        # From the end, which the statistics left in the L2. Ties belong to the head in the blocks
        # before the cut, and not from there on.
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
                x, g, u = p, q, p
                if TERMS is not None:
                    u = log_ratio(t, s, log_p, log_q, scale_t, lse_t, lse_s, shift, ONE_SCALE)
                    x, g = TERMS(log_p, log_q, u, factor_t, factor_s, a, b, False)
                accumulators = _add_terms(
                    accumulators, t, p, q, ratio, crossing, least, x, g, u,
                    HAS_HEAD, STABLE, STATS, TERMS, MOMENTS,
                )  # fmt: skip
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
            x, g, u = p, q, p
            if TERMS is not None:
                x, g, u = careful_terms(
                    t, s, log_p, log_q, shift, factor_t, factor_s, a, b, keep_p, keep_q, TERMS
                )
            least = tl.where((block + 1) * BLOCK <= cut, crossing, above_crossing)
            if end_of_head is not None:
                t = tl.where(offsets < end_of_head, t, float("-inf"))
            accumulators = _add_terms(
                accumulators, t, p, q, ratio, crossing, least, x, g, u,
                HAS_HEAD, STABLE, STATS, TERMS, MOMENTS,
            )  # fmt: skip
        gap, g_head, g_ties, size, ties, total_x, total_g, total_squares = wanted_sums(
            accumulators,
            (
                HAS_HEAD or STATS, HAS_HEAD, HAS_HEAD and not STABLE, HAS_HEAD and STATS,
                HAS_HEAD and not STABLE, TERMS is not None, TERMS is not None, MOMENTS,
            ),
        )  # fmt: skip
        sweeps -= 1
        size_of_sums = tl.abs(total_x) + tl.abs(total_g) + tl.abs(total_squares)
        if TERMS is None or size_of_sums < (float("inf") if MOMENTS else LARGEST_SUM):
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
            taken = tl.minimum(taken, ties)
            g_head += g_ties * (taken / tl.maximum(ties, 1.0))
        size += taken
        # Two sums of the same terms may differ: g_head may exceed the gap.
        forward_weight = tl.where(g_head > gap, 1.0, g_head / gap)
        forward_weight = tl.where(gap == 0.0, 0.5, forward_weight)
    else:
        size = float("nan")
    variance = 0.0
    if MOMENTS:
        weight = tl.where(total_x == 0.0, 1.0, total_x)  # where nothing is kept
        total_g /= weight
        variance = total_squares / weight - total_g * total_g
        variance = tl.where(variance < 0.0, 0.0, variance)
    else:
        total_x *= factor_t
        total_g *= factor_s
    return forward_weight, factor_t * gap, size, total_x, total_g, variance, full_end
