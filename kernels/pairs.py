"""The student on the entries of a teacher that is k pairs: k tokens, and all others as one.

    lse = reference + log2 Z                Z of all tokens, in one sweep
    ln q_i = ln 2 (x_i - lse)               of a pair: one logit, where its id says
    q_rest = Z_rest / Z                     Z_rest = Z - the pairs' exponentials

The k + 1 entries are a distribution, as are the teacher's: the kernels of row_kernels.py compare
the two, and give the gradient g of each entry. A token that is no pair has its share of that of the
rest:

    ds_i = g_i                              of a pair
    ds_j = g_rest 2^x_j / Z_rest            of any other token, e^s_j being its share of the rest

times logit_scale / T, and the slope of the softcap. The cross-entropy of the labels, which may be
any tokens, adds softmax(s)_j - [j = label], T = 1.

Z_rest cancels where the pairs hold nearly all of the student's mass. That shows where the teacher's
rest is much larger: such rows, which are few, are summed again without their pairs. Ids ascend, so
that a block knows the pairs that it holds.
"""

import triton
import triton.language as tl

from . import layout
from .arithmetic import LARGEST, LN2, LOG2E, LOWEST, held, rounded_sum, scaled, softcap_slope
from .blocks import (
    UNROLL,
    block_pointers,
    edge_block,
    edge_count,
    load_edge,
    load_full,
    row_base,
    row_max,
    row_offset,
    row_pointer,
    zero_row,
)
from .cross_entropy import is_token, row_cross_entropy
from .gradient import DONE
from .reductions import wanted_sums
from .statistics import REFERENCE_LIMIT, SUM_LIMIT

ABSENT = tl.constexpr(layout.ABSENT)
PAIRS_STATE_WIDTH = tl.constexpr(layout.PAIRS_STATE_WIDTH)
OF_STUDENT_WIDTH = tl.constexpr(layout.OF_STUDENT_WIDTH)
LARGEST_LOGIT = tl.constexpr(layout.LARGEST_LOGIT)
# Z_rest is summed without the pairs where its share of Z is below this share of the teacher's rest,
# or below 2^-18: ln q_rest is then off by less than 2^-20 / tau elsewhere.
OF_TEACHERS_REST = tl.constexpr(2.0**-3)
LEAST_REST = tl.constexpr(2.0**-18)


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "k"])
def pairs_kernel(
    s_ptr,  # [outer, inner, V] student logits, N = outer * inner rows
    ids_ptr,  # [N, k] int32, ascending, ABSENT last
    t_ptr,  # [N, k + 1] fp32, ln p of the pairs and of the rest
    valid_ptr,  # [N] bool, rows that count (HAS_MASK)
    labels_ptr,  # [N] token of the cross-entropy (HAS_LABELS)
    log_q_ptr,  # [N, k + 1] fp32, ln q of the same
    state_ptr,  # [N, 8] fp32, what the backward needs
    of_student_ptr,  # [N, 4] fp32: layout.OF_STUDENT, and the largest logit
    outer_s, inner_s, inner, V, k, base_lead,
    scale_s, gain_s, scale_1,  # of `scaled`
    REST: tl.constexpr,  # whether the rest is an entry, or has no mass on either side
    STATS: tl.constexpr,  # whether entropy and agreement are wanted; 0 otherwise
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr,  # a label, and its softmax where T is not 1
    HAS_MASK: tl.constexpr, HAS_LEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,  # a power of two >= k
):  # fmt: skip
    """ln q_i = ln 2 (x_i - lse) of the pairs, and ln q_rest = ln(Z_rest / Z) of one row."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    log_q_row = log_q_ptr + row * (k + 1)
    state = state_ptr + row * PAIRS_STATE_WIDTH
    of_student = of_student_ptr + row * OF_STUDENT_WIDTH
    valid = True
    if HAS_MASK:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        offset = row_offset(row, inner, outer_s, inner_s)
        lead = 0
        if HAS_LEAD:
            lead = ((base_lead + offset) % 8).to(tl.int32)
        s_row = row_pointer(s_ptr, offset, lead, True)
        end = lead + V
        reference, z, reference_1, z_1, log_z, top, full_end = _statistics(
            s_row, lead, end, scale_s, gain_s, scale_1, STATS, UNTEMPERED, BLOCK
        )
        base = row_base(s_row, lead, end, gain_s, full_end, BLOCK)

        ids_row = ids_ptr + row * k
        ids = tl.load(ids_row + pair, mask=pair < k, other=ABSENT)
        following = tl.load(ids_row + pair + 1, mask=pair + 1 < k, other=ABSENT)
        named = ids != ABSENT
        unknown = named & ((ids >= V) | (ids == following))
        known = named & (ids < V)
        s = tl.load(s_row + lead + ids, mask=known, other=float("-inf")).to(tl.float32)
        x = scaled(s, scale_s, gain_s, reference, base)
        z_pairs, faults = wanted_sums(
            (tl.where(known, tl.exp2(x), 0.0), unknown.to(tl.float32)), (True, True)
        )
        z = tl.where(faults > 0.0, float("nan"), z)
        z_rest = 0.0
        if REST:
            z_rest = z - z_pairs
            tau = tl.exp2(tl.load(t_ptr + row * (k + 1) + k) * LOG2E)
            if z_rest < z * tl.maximum(tau * OF_TEACHERS_REST, LEAST_REST):
                z_rest = _sum_of_rest(
                    s_row, lead, end, scale_s, gain_s, reference, base, ids_row, k, BLOCK
                )
        log2_z = tl.log2(z)
        log_q = tl.where(named, (x - log2_z) * LN2, z * 0.0 + float("-inf"))
        tl.store(log_q_row + pair, log_q, mask=pair < k)
        tl.store(log_q_row + k, (tl.log2(z_rest) - log2_z) * LN2)

        entropy, agreement, cross_entropy = 0.0, 0.0, 0.0
        if STATS:
            entropy = (log2_z - log_z / z) * LN2
            t = tl.load(t_ptr + row * (k + 1) + pair, mask=pair < k, other=float("-inf"))
            both = named & (t == tl.max(t, axis=0)) & (s == top)
            agreement = tl.max(both.to(tl.float32), axis=0) + z * 0.0
        if HAS_LABELS:
            cross_entropy = row_cross_entropy(
                s_row, tl.load(labels_ptr + row).to(tl.int64), lead, end,
                scale_1 if UNTEMPERED else scale_s, gain_s,
                reference_1 if UNTEMPERED else reference, z_1 if UNTEMPERED else z,
                full_end, BLOCK,
            )  # fmt: skip
        tl.store(of_student + 0, entropy)
        tl.store(of_student + 1, agreement)
        tl.store(of_student + 2, cross_entropy)
        largest = _largest(s_row, lead, end, top, full_end, STATS, BLOCK)
        tl.store(of_student + LARGEST_LOGIT, largest)

        some = z_rest != 0.0  # or else no other token has any mass
        lse_rest, lost_rest = rounded_sum(reference, tl.log2(tl.where(some, z_rest, z)))
        if UNTEMPERED:
            lse_1, lost_1 = rounded_sum(reference_1, tl.log2(z_1))
        else:
            lse_1, lost_1 = rounded_sum(reference, log2_z)
        tl.store(state + 0, lse_rest)
        tl.store(state + 1, tl.where(some, tl.exp2(-lost_rest), 0.0))
        tl.store(state + 2, lse_1)
        # A label that is no token makes the loss NaN, and all of the gradient with it.
        nothing = cross_entropy * 0.0 if HAS_LABELS else 0.0
        tl.store(state + 3, tl.exp2(-lost_1) + nothing)
        tl.store(state + 4, tl.where(full_end == 0, 0.0, 1.0))
        # What the sums of other shards of the vocabulary are added to.
        lse, lost = rounded_sum(reference, log2_z)
        tl.store(state + 5, lse)
        tl.store(state + 6, tl.exp2(-lost))
        tl.store(state + 7, tl.exp2(-lost_1))
    else:  # nobody reads them, but an operator's output must not depend on what was there
        tl.store(log_q_row + pair, 0.0, mask=pair < k)
        tl.store(log_q_row + k, 0.0)
        for i in tl.static_range(OF_STUDENT_WIDTH):
            tl.store(of_student + i, 0.0)
        for i in tl.static_range(PAIRS_STATE_WIDTH):
            tl.store(state + i, 0.0)


@triton.jit
def _statistics(
    s_row, lead, end, scale, gain, scale_1,
    STATS: tl.constexpr, UNTEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(reference, Z, reference_1, Z_1, sum 2^x x, largest logit, full_end), as `row_statistics`
    has them, of the student alone."""
    columns = tl.arange(0, BLOCK)
    full_end = tl.maximum(end // BLOCK, 1)
    blocks = tl.cdiv(end, BLOCK)
    first = tl.max(load_edge(s_row, columns, lead, end), axis=0)
    reference = scaled(first, scale, gain, 0.0)
    reference_1 = 0.0
    if UNTEMPERED:
        reference_1 = scaled(first, scale_1, gain, 0.0)
    z = 0.0
    z_1 = 0.0
    log_z = 0.0
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    sweeps = 3
    while sweeps > 0:
        sum_s = tl.zeros((BLOCK,), tl.float32)
        sum_1 = tl.zeros((BLOCK,), tl.float32)
        sum_log = tl.zeros((BLOCK,), tl.float32)
        for block in tl.range(1, full_end, loop_unroll_factor=UNROLL):
            s = load_full(s_row, block, True, BLOCK)
            x = scaled(s, scale, gain, reference)
            e = tl.exp2(x)
            sum_s += e
            if UNTEMPERED:
                sum_1 += tl.exp2(scaled(s, scale_1, gain, reference_1))
            if STATS:
                sum_log += e * tl.maximum(x, LOWEST)
                tops = tl.maximum(tops, s)
        base = row_base(s_row, lead, end, gain, full_end, BLOCK)
        for edge in range(0, edge_count(full_end, blocks)):
            offsets = edge_block(edge, full_end) * BLOCK + columns
            s = load_edge(s_row, offsets, lead, end)
            x = scaled(s, scale, gain, reference, base)
            e = tl.exp2(x)
            sum_s += e
            if UNTEMPERED:
                sum_1 += tl.exp2(scaled(s, scale_1, gain, reference_1, base))
            if STATS:
                sum_log += e * tl.maximum(x, LOWEST)
                tops = tl.maximum(tops, s)
        z, z_1, log_z = wanted_sums((sum_s, sum_1, sum_log), (True, UNTEMPERED, STATS))
        sweeps -= 1
        moderate = tl.abs(reference) < REFERENCE_LIMIT
        moderate = moderate & (tl.abs(reference_1) < REFERENCE_LIMIT)
        if (z < SUM_LIMIT) & (z_1 < SUM_LIMIT) & moderate:  # false for NaN
            sweeps = 0
        elif sweeps > 0:
            largest = row_max(s_row, lead, end, BLOCK)
            reference = scaled(largest, scale, gain, 0.0)
            if UNTEMPERED:
                reference_1 = scaled(largest, scale_1, gain, 0.0)
            moderate = tl.abs(reference) < REFERENCE_LIMIT
            moderate = moderate & (tl.abs(reference_1) < REFERENCE_LIMIT)
            if moderate == 0:
                reference = 0.0
                reference_1 = 0.0
                full_end = 0
    return reference, z, reference_1, z_1, log_z, tl.max(tops, axis=0), full_end


@triton.jit
def _largest(s_row, lead, end, top, full_end, STATS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit, which is -inf where all are, and +inf where any is NaN. `top` is known
    with statistics; without them it is 0 for rows that have no base, of which nobody asks."""
    largest = 0.0
    if STATS:
        largest = top
    if full_end == 0:
        columns = tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, end, BLOCK):
            s = load_edge(s_row, start + columns, lead, end)
            best = tl.maximum(best, tl.where(s == s, s, float("inf")))
        largest = tl.max(best, axis=0)
    return largest


@triton.jit
def _sum_of_rest(
    s_row, lead, end, scale, gain, reference, base, ids_row, k, BLOCK: tl.constexpr
):  # fmt: skip
    """Z_rest: the sum of the exponentials of all tokens but the pairs."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    i = 0
    pair = tl.load(ids_row)
    for start in range(0, end, BLOCK):
        offsets = start + columns
        e = tl.exp2(scaled(load_edge(s_row, offsets, lead, end), scale, gain, reference, base))
        while pair < start + BLOCK - lead:
            e = tl.where(offsets == lead + pair, 0.0, e)
            i += 1
            pair = tl.load(ids_row + i, mask=i < k, other=ABSENT)
        total += e
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_ds", "k"])
def pairs_gradient_kernel(
    ds_ptr,  # [outer, inner, V] gradient, may be s_ptr
    s_ptr,  # [outer, inner, V] student logits, N = outer * inner rows
    ids_ptr,  # [N, k] int32, ascending, ABSENT last
    valid_ptr,  # [N] bool (HAS_MASK)
    labels_ptr,  # [N] (HAS_LABELS)
    state_ptr,  # [N, 8] fp32 of pairs_kernel
    of_pairs_ptr,  # [N, k + 1] fp32, the gradient of the entries
    of_label_ptr,  # [N] fp32, that of the cross-entropy (HAS_LABELS)
    outer_s, outer_ds, inner_s, inner_ds, inner, V, k, base_lead,
    scale_s, gain_s, scale_1,  # of `scaled`
    rate,  # logit_scale / T
    label_rate,  # logit_scale
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_LEAD: tl.constexpr, DS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """ds_i = g_i of the pairs, g_rest 2^x_j / Z_rest of all others, and the cross-entropy's."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    columns = tl.arange(0, BLOCK)
    valid = True
    if HAS_MASK:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        offset = row_offset(row, inner, outer_s, inner_s)
        lead = 0
        if HAS_LEAD:
            lead = ((base_lead + offset) % 8).to(tl.int32)
        s_row = row_pointer(s_ptr, offset, lead, True)
        ds_row = row_pointer(ds_ptr, row_offset(row, inner, outer_ds, inner_ds), lead, DS_ALIGNED)
        end = lead + V
        state = state_ptr + row * PAIRS_STATE_WIDTH
        lse_rest = tl.load(state + 0)
        lse_1 = tl.load(state + 2)
        full_end = tl.where(tl.load(state + 4) == 0.0, 0, tl.maximum(end // BLOCK, 1))
        base = row_base(s_row, lead, end, gain_s, full_end, BLOCK)
        of_pairs = of_pairs_ptr + row * (k + 1)
        of_rest = tl.load(of_pairs + k) * rate * tl.load(state + 1)
        of_softmax, at_label, unit = 0.0, 0, 0.0
        if HAS_LABELS:
            unit = tl.load(of_label_ptr + row) * label_rate
            of_softmax = unit * tl.load(state + 3)
            at_label = lead + tl.load(labels_ptr + row).to(tl.int32)
            if not UNTEMPERED:
                of_rest += of_softmax * tl.exp2(lse_rest - lse_1)
        of_rest = held(of_rest, LARGEST)

        # All that is written behind the sweep is read before it: ds may be s.
        ids = tl.load(ids_ptr + row * k + pair, mask=pair < k, other=ABSENT)
        known = ids < V
        s_of_pairs = tl.load(s_row + lead + ids, mask=known, other=0.0).to(tl.float32)
        ds_of_pairs = tl.load(of_pairs + pair, mask=known, other=0.0) * rate
        ds_of_label = 0.0
        label_is_pair = True
        if HAS_LABELS:
            ds_of_pairs += of_softmax * tl.exp2(scaled(s_of_pairs, scale_1, gain_s, lse_1, base))
            ds_of_pairs -= tl.where(lead + ids == at_label, unit, 0.0)
            label_is_pair = tl.max((lead + ids == at_label).to(tl.int32), axis=0) != 0
            s_of_label = load_edge(s_row, at_label, lead, end)
            ds_of_label = _of_rest(
                s_of_label, scale_s, gain_s, scale_1, lse_rest, lse_1, of_rest, of_softmax,
                UNTEMPERED, base,
            ) - unit * _slope(s_of_label, gain_s)  # fmt: skip
        ds_of_pairs = held(ds_of_pairs, LARGEST) * _slope(s_of_pairs, gain_s)
        tl.debug_barrier()
        # As in gradient.py: all loads of a turn stand before the first of its stores.
        WIDTH: tl.constexpr = s_row.dtype.element_ty.primitive_bitwidth
        TURN: tl.constexpr = UNROLL if WIDTH == 16 else UNROLL // 2
        turns = (full_end - 1) // TURN
        for turn in tl.range(0, turns):
            begin = 1 + turn * TURN
            logits = ()
            for i in tl.static_range(TURN):
                logits = logits + (load_full(s_row, begin + i, True, BLOCK, DONE),)
            for i in tl.static_range(TURN):
                ds = _of_rest(
                    logits[i], scale_s, gain_s, scale_1, lse_rest, lse_1, of_rest, of_softmax,
                    UNTEMPERED,
                ).to(ds_row.dtype.element_ty)  # fmt: skip
                pointers = block_pointers(ds_row, begin + i, DS_ALIGNED, BLOCK)
                tl.store(pointers, ds, eviction_policy=DONE)
        for block in range(1 + turns * TURN, full_end):
            s = load_full(s_row, block, True, BLOCK, DONE)
            ds = _of_rest(
                s, scale_s, gain_s, scale_1, lse_rest, lse_1, of_rest, of_softmax, UNTEMPERED
            ).to(ds_row.dtype.element_ty)
            tl.store(block_pointers(ds_row, block, DS_ALIGNED, BLOCK), ds, eviction_policy=DONE)
        for edge in range(0, edge_count(full_end, tl.cdiv(end, BLOCK))):
            offsets = edge_block(edge, full_end) * BLOCK + columns
            s = load_edge(s_row, offsets, lead, end)
            ds = _of_rest(
                s, scale_s, gain_s, scale_1, lse_rest, lse_1, of_rest, of_softmax, UNTEMPERED, base
            )
            inside = (offsets >= lead) & (offsets < end)
            tl.store(ds_row + offsets, ds.to(ds_row.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        tl.store(ds_row + lead + ids, ds_of_pairs.to(ds_row.dtype.element_ty), mask=known)
        if HAS_LABELS:
            alone = is_token(at_label - lead, lead, end) & (label_is_pair == 0)
            tl.store(ds_row + at_label, ds_of_label.to(ds_row.dtype.element_ty), mask=alone)
    else:
        zero_row(ds_ptr + row_offset(row, inner, outer_ds, inner_ds), V, BLOCK)


@triton.jit
def _of_rest(
    s, scale, gain, scale_1, lse_rest, lse_1, of_rest, of_softmax,
    UNTEMPERED: tl.constexpr, base=None,
):  # fmt: skip
    """ds of tokens that are no pair."""
    ds = tl.exp2(scaled(s, scale, gain, lse_rest, base)) * of_rest
    if UNTEMPERED:
        ds += tl.exp2(scaled(s, scale_1, gain, lse_1, base)) * of_softmax
    return ds * _slope(s, gain)


@triton.jit
def _slope(s, gain):
    """The derivative of a capped logit."""
    slope = 1.0
    if gain is not None:
        slope = softcap_slope(s, gain)
    return slope
