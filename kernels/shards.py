"""A shard of the vocabulary: the columns that one rank of a group has of every row.

A row is then known to no rank. What one has to say of it are a few numbers: of the shard's own
softmax (`row_statistics`) before the softmax of all is known, and its part of the sums that need
it (`row_divergence`) after. Between them stands the head: the shard names its heaviest tokens, and
if these are not enough, its mass above the keys that it is asked for.

    shard_statistics_kernel    layout.SHARD_STATISTICS, and what finds a head
    shard_masses_kernel        the mass at or above each of layout.SHARD_PIVOTS logits
    shard_sums_kernel          layout.SHARD_SUMS

The gradient is that of a whole row, `backward_kernel`. How the numbers of all ranks become a loss
is in akl_triton/shards.py.

A shard may hold nothing: no column, or no finite logit on a side. It then has no mass, which is no
error. A reference so large that its rounding would show is that of the shard's maximum, and Z is
1 and more; no block of such a shard is full.
"""

import triton
import triton.language as tl

from . import layout
from .arithmetic import held, scaled
from .blocks import full_end_of, load_edge, load_full, row_max, row_offset, row_pointer
from .cross_entropy import is_token
from .divergence import row_divergence
from .head import cut_behind, key_of, lowest_key, mass_of, steepness_of
from .reductions import maxima, sums
from .statistics import row_statistics

STATISTICS_WIDTH = tl.constexpr(len(layout.SHARD_STATISTICS))
HEAD_WIDTH = tl.constexpr(layout.SHARD_HEAD_WIDTH)
CANDIDATES = tl.constexpr(layout.SHARD_CANDIDATES)
HALF = tl.constexpr(layout.SHARD_BINS // 2)  # as many sums as registers are left for
STRIDE = tl.constexpr(layout.SHARD_STRIDE)
PIVOTS = tl.constexpr(layout.SHARD_PIVOTS)
SUMS_WIDTH = tl.constexpr(len(layout.SHARD_SUMS))
LARGEST_REFERENCE = tl.constexpr(layout.LARGEST_REFERENCE)


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_t"])
def shard_statistics_kernel(
    s_ptr,  # [outer, inner, V_s] the shard of the student logits, N = outer * inner rows
    t_ptr,  # [outer, inner, V_t] that of the teacher logits
    valid_ptr,  # [N] bool, rows that count (HAS_MASK)
    labels_ptr,  # [N] token of the shard, or -1 (HAS_LABELS)
    out_ptr,  # [N, STATISTICS_WIDTH, and with a head HEAD_WIDTH more] fp32
    blocks_ptr,  # [N, 2] fp32, the end of the full blocks, and the size of a block
    outer_s, outer_t, inner_s, inner_t,  # strides
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s, scale_1,  # of `scaled`
    mu,
    HAS_HEAD: tl.constexpr, STATS: tl.constexpr, ENTROPY: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr, APART: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_LEAD: tl.constexpr, S_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the shard says of a row: its own softmax of both sides, and what is linear in it."""
    WIDTH: tl.constexpr = STATISTICS_WIDTH + (HEAD_WIDTH if HAS_HEAD else 0)
    row = tl.program_id(0).to(tl.int64)
    out = out_ptr + row * WIDTH
    offset_t = row_offset(row, inner, outer_t, inner_t)
    lead = 0
    if HAS_LEAD:
        lead = ((base_lead + offset_t) % 8).to(tl.int32)
    valid = True
    if HAS_MASK:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        t_row = row_pointer(t_ptr, offset_t, lead, True)
        s_row = row_pointer(s_ptr, row_offset(row, inner, outer_s, inner_s), lead, S_ALIGNED)
        end_t = lead + V_t
        end_s = lead + V_s
        label = 0
        if HAS_LABELS:
            label = tl.load(labels_ptr + row).to(tl.int64)
        apart = None
        if APART:
            apart = lead + label
        (
            reference_t, z_t, reference_s, z_s, reference_1, z_1, slots, top, top_s, hidden,
            forward_kl, reverse_kl, kept_p, kept_q, entropy_t, entropy_s, agreement, full_end,
        ) = row_statistics(
            t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1, apart,
            HAS_HEAD or STATS, STATS, ENTROPY, FORWARD, REVERSE, UNTEMPERED, S_ALIGNED, BLOCK,
        )  # fmt: skip
        reference_t, z_t = _of_shard(
            t_row, lead, end_t, scale_t, gain_t, reference_t, z_t, full_end, apart, BLOCK
        )
        reference_s, z_s = _of_shard(
            s_row, lead, end_s, scale_s, gain_s, reference_s, z_s, full_end, apart, BLOCK
        )
        if UNTEMPERED:
            reference_1, z_1 = _of_shard(
                s_row, lead, end_s, scale_1, gain_s, reference_1, z_1, full_end, apart, BLOCK
            )
        label_t, label_s = 0.0, 0.0
        if HAS_LABELS:
            label_t = _logit_of(t_row, label, lead, end_t)
            label_s = _logit_of(s_row, label, lead, end_s)
        values = (
            reference_t, z_t, reference_s, z_s, reference_1, z_1,
            forward_kl, reverse_kl, kept_p, kept_q, entropy_t, entropy_s,
            agreement, top, top_s, label_t, label_s,
        )  # fmt: skip
        for i in tl.static_range(STATISTICS_WIDTH):
            tl.store(out + i, values[i])
        if HAS_HEAD:
            _store_head(
                out + STATISTICS_WIDTH, t_row, lead, end_t, slots, hidden, top, scale_t, gain_t,
                reference_t, z_t, full_end, mu, BLOCK,
            )  # fmt: skip
        tl.store(blocks_ptr + row * 2, full_end.to(tl.float32))
    else:  # nobody reads them, but what is sent must not depend on what was there
        for i in tl.static_range(WIDTH):
            tl.store(out + i, 0.0)
        tl.store(blocks_ptr + row * 2, 0.0)
    tl.store(blocks_ptr + row * 2 + 1, BLOCK)


@triton.jit
def _logit_of(row, label, lead, end):
    """The logit of a label, -inf where it is no token of this shard."""
    logit = tl.load(row + (lead + label), mask=is_token(label, lead, end), other=float("-inf"))
    return logit.to(tl.float32)


@triton.jit
def _of_shard(
    row, lead, end, scale, gain, reference, z, full_end, apart, BLOCK: tl.constexpr
):  # fmt: skip
    """(reference, Z) of a side, of which nothing is infinite that is no fault of the logits."""
    if full_end == 0:  # it has a base, in place of a reference
        top = row_max(row, lead, end, BLOCK, apart)
        reference = held(scaled(top, scale, gain, 0.0), LARGEST_REFERENCE)
        z *= tl.exp2(scaled(top, scale, gain, reference))
    if (z > 0.0) == 0:
        columns = tl.arange(0, BLOCK)
        some = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, end, BLOCK):
            logits = load_edge(row, start + columns, lead, end, apart)
            some = some | (logits != float("-inf")).to(tl.int32)  # also where it is NaN
        if tl.max(some, axis=0) == 0:
            reference = -LARGEST_REFERENCE + 0.0 * lead
            z = 0.0 * lead
    return reference, z


@triton.jit
def _store_head(
    out, t_row, lead, end, slots, hidden, top, scale, gain, reference, z, full_end, mu,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The key from which on all tokens are candidates, the candidates, and the masses above.

    These masses are summed where the candidates that are proven have less than mu of the shard, so
    that more is likely to be asked for. Elsewhere the slot maxima have to do, which then hide
    little."""
    dtype: tl.constexpr = t_row.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    # What has a base has no mass in units of Z here.
    hidden = tl.where(full_end == 0, float("inf"), hidden)
    hidden = tl.where(z == 0.0, 0.0, hidden)
    rest = slots
    least = top
    proven = 0
    known_mass = 0.0
    for i in tl.static_range(CANDIDATES):
        best = tl.max(rest, axis=0)
        tl.store(out + 1 + i, best)
        mass = mass_of(best, scale, gain, reference)
        known = (mass > hidden) & (best > float("-inf"))
        known_mass += tl.where(known, mass, 0.0)
        least = tl.where(known, best, least)
        proven += known.to(tl.int32)
        first = tl.min(tl.where(rest == best, columns, BLOCK), axis=0)
        rest = tl.where(columns == first, float("-inf"), rest)
    key = key_of(least, dtype) + tl.where((proven == CANDIDATES) | (proven == 0), 1, 0)
    all_are = (hidden == 0.0) & (tl.max(rest, axis=0) == float("-inf"))
    key = tl.where(all_are, lowest_key(dtype), key)
    tl.store(out, key.to(tl.float32, bitcast=True))
    stride = STRIDE / steepness_of(scale, gain)
    masses = out + 1 + CANDIDATES
    is_enough = known_mass > mu * z
    slot_mass = mass_of(slots, scale, gain, reference)
    for half in tl.static_range(2):
        above = ()
        for j in tl.static_range(HALF):
            is_above = slots > top - (half * HALF + j + 1) * stride
            above = above + (tl.where(is_above, slot_mass, 0.0),)
        above = sums(above)
        if is_enough == 0:
            above = _masses_above(
                t_row, lead, end, scale, gain, reference, top, half * HALF, stride, BLOCK
            )
        for j in tl.static_range(HALF):
            tl.store(masses + half * HALF + j, above[j] / z)


@triton.jit
def _masses_above(
    t_row, lead, end, scale, gain, reference, top, begin, stride, BLOCK: tl.constexpr
):  # fmt: skip
    """The masses above top - (begin + 1) stride, top - (begin + 2) stride, ..., of HALF ends."""
    columns = tl.arange(0, BLOCK)
    masses = ()
    for _ in tl.static_range(HALF):
        masses = masses + (tl.zeros((BLOCK,), tl.float32),)
    last = end // BLOCK
    for block in range(1, last):
        t = load_full(t_row, block, True, BLOCK)
        p = mass_of(t, scale, gain, reference)
        new = ()
        for j in tl.static_range(HALF):
            new = new + (masses[j] + tl.where(t > top - (begin + j + 1) * stride, p, 0.0),)
        masses = new
    for start in range(0, end, tl.maximum(last, 1) * BLOCK):
        t = load_edge(t_row, start + columns, lead, end)
        p = mass_of(t, scale, gain, reference)
        new = ()
        for j in tl.static_range(HALF):
            new = new + (masses[j] + tl.where(t > top - (begin + j + 1) * stride, p, 0.0),)
        masses = new
    return sums(masses)


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_t"])
def shard_masses_kernel(
    t_ptr,  # [outer, inner, V_t] the shard of the teacher logits
    rows_ptr,  # [M] int64, the rows that are asked for
    asked_ptr,  # [M, PIVOTS + 3] fp32: pivots, the reference, and the bracket
    out_ptr,  # [M, PIVOTS + 2] fp32: masses, and the logits nearest to the bracket's ends, inside
    outer_t, inner_t, inner, V_t, base_lead,
    scale_t, gain_t,  # of `scaled`
    HAS_LEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """mass(x) = sum of 2^(x_i - reference) over t_i >= x, for PIVOTS values of x."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + program)
    offset = row_offset(row, inner, outer_t, inner_t)
    lead = 0
    if HAS_LEAD:
        lead = ((base_lead + offset) % 8).to(tl.int32)
    t_row = row_pointer(t_ptr, offset, lead, True)
    end = lead + V_t
    asked = asked_ptr + program * (PIVOTS + 3)
    out = out_ptr + program * (PIVOTS + 2)
    columns = tl.arange(0, BLOCK)
    reference = tl.load(asked + PIVOTS)
    low = tl.load(asked + PIVOTS + 1)
    high = tl.load(asked + PIVOTS + 2)
    pivots = ()
    masses = ()
    for i in tl.static_range(PIVOTS):
        pivots = pivots + (tl.load(asked + i),)
        masses = masses + (tl.zeros((BLOCK,), tl.float32),)
    below = tl.full((BLOCK,), float("-inf"), tl.float32)
    above = tl.full((BLOCK,), float("inf"), tl.float32)
    last = end // BLOCK
    for block in range(1, last):
        t = load_full(t_row, block, True, BLOCK)
        masses, below, above = _add_masses(
            t, masses, pivots, below, above, low, high, scale_t, gain_t, reference
        )
    for start in range(0, end, tl.maximum(last, 1) * BLOCK):
        t = load_edge(t_row, start + columns, lead, end)
        masses, below, above = _add_masses(
            t, masses, pivots, below, above, low, high, scale_t, gain_t, reference
        )
    totals = sums(masses)
    for i in tl.static_range(PIVOTS):
        tl.store(out + i, totals[i])
    nearest_below, nearest_above = maxima((below, -above))
    tl.store(out + PIVOTS, nearest_below)
    tl.store(out + PIVOTS + 1, -nearest_above)


@triton.jit
def _add_masses(t, masses, pivots, below, above, low, high, scale, gain, reference):
    """Add a block of logits to the masses, and to the logits nearest to the bracket's ends."""
    p = mass_of(t, scale, gain, reference)
    new = ()
    for i in tl.static_range(PIVOTS):
        new = new + (masses[i] + tl.where(t >= pivots[i], p, 0.0),)
    below = tl.maximum(below, tl.where(t < high, t, float("-inf")))
    above = tl.minimum(above, tl.where(t >= low, t, float("inf")))
    return new, below, above


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_t"])
def shard_sums_kernel(
    s_ptr,  # [outer, inner, V_s] the shard of the student logits, N = outer * inner rows
    t_ptr,  # [outer, inner, V_t] that of the teacher logits
    valid_ptr,  # [N] bool (HAS_MASK)
    softmax_ptr,  # [N, 5] fp32: reference and Z of the whole teacher and student, and the pivot
    boundary_ptr,  # [N, 3] fp32: crossing, taken of this shard's ties, these (HAS_HEAD)
    blocks_ptr,  # [N, 2] fp32 of shard_statistics_kernel, brought up to date
    out_ptr,  # [N, SUMS_WIDTH] fp32
    outer_s, outer_t, inner_s, inner_t,  # strides
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    a, b, keep_p, keep_q,  # of the terms
    HAS_HEAD: tl.constexpr, STABLE: tl.constexpr, STATS: tl.constexpr,
    TERMS: tl.constexpr, MOMENTS: tl.constexpr, ONE_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_LEAD: tl.constexpr, S_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The shard's part of the sums of `row_divergence`."""
    row = tl.program_id(0).to(tl.int64)
    out = out_ptr + row * SUMS_WIDTH
    offset_t = row_offset(row, inner, outer_t, inner_t)
    lead = 0
    if HAS_LEAD:
        lead = ((base_lead + offset_t) % 8).to(tl.int32)
    valid = True
    if HAS_MASK:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        t_row = row_pointer(t_ptr, offset_t, lead, True)
        s_row = row_pointer(s_ptr, row_offset(row, inner, outer_s, inner_s), lead, S_ALIGNED)
        end_t = lead + V_t
        softmax = softmax_ptr + row * 5
        blocks = blocks_ptr + row * 2
        full_end = full_end_of(tl.load(blocks), tl.load(blocks + 1), BLOCK)
        full_end = tl.maximum(full_end, 1)  # no row has a base here
        crossing, taken, cut = 0.0, 0.0, 0
        if HAS_HEAD:
            boundary = boundary_ptr + row * 3
            crossing = tl.load(boundary)
            taken = tl.load(boundary + 1)
            ties = tl.load(boundary + 2)
            if STABLE:
                if taken > ties - 0.5:
                    cut = end_t
                elif taken > 0.5:
                    cut = cut_behind(t_row, lead, end_t, crossing, taken, ties, BLOCK)
        w, gap, size, total_x, total_g, variance, full_end = row_divergence(
            t_row, s_row, lead, end_t, lead + V_s, scale_t, gain_t, scale_s, gain_s,
            tl.load(softmax), tl.load(softmax + 1), tl.load(softmax + 2), tl.load(softmax + 3),
            full_end, crossing, taken, cut, None, 0.0, a, b, keep_p, keep_q, tl.load(softmax + 4),
            HAS_HEAD, STABLE, STATS, TERMS, MOMENTS, ONE_SCALE, S_ALIGNED, BLOCK,
        )  # fmt: skip
        values = gap, w * gap, size, total_x, total_g, variance
        for i in tl.static_range(SUMS_WIDTH):
            tl.store(out + i, values[i])
        tl.store(blocks, full_end.to(tl.float32))
        tl.store(blocks + 1, BLOCK)
    else:
        for i in tl.static_range(SUMS_WIDTH):
            tl.store(out + i, 0.0)
