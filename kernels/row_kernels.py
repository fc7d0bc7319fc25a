"""The stages composed into kernels.

    forward    statistics, boundary, divergence     the loss, and 12 floats a row for the backward
               the same and gradient                both in one launch; the gradient may overwrite
                                                    the student
    backward   gradient                             from the logits and those 12 floats

Where the weights of the KLs are the same for every token there is no boundary and, unless
statistics are asked for, no divergence stage: the statistics give the KLs.

One program handles one row.
"""

import triton
import triton.language as tl

from . import layout
from .arithmetic import LN2, LOG2E, rounded_sum
from .blocks import full_end_of, row_offset, row_pointer, zero_row
from .cross_entropy import row_cross_entropy
from .decoupled import label_apart
from .divergence import row_divergence
from .gradient import damping, kl_coefficients, row_gradient
from .head import head_boundary
from .statistics import normalisers, row_statistics

STATE_WIDTH = tl.constexpr(layout.STATE_WIDTH)
FIRST_COEFFICIENT = tl.constexpr(layout.STATE_WIDTH - layout.COEFFICIENTS)
COEFFICIENTS = tl.constexpr(layout.COEFFICIENTS)
STATS_WIDTH = tl.constexpr(len(layout.STATISTICS))


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_t", "outer_ds"])
def forward_kernel(
    s_ptr,  # [outer, inner, V_s] student logits, N = outer * inner rows
    t_ptr,  # [outer, inner, V_t] teacher logits
    valid_ptr,  # [N] bool, rows that count (HAS_MASK)
    labels_ptr,  # [N] token of the cross-entropy (HAS_LABELS)
    loss_ptr,  # [N] fp32
    state_ptr,  # [N, 12] fp32, what the backward needs (not HAS_GRADIENT)
    stats_ptr,  # [N, 10] fp32: layout.STATISTICS (STATS)
    ds_ptr,  # [outer, inner, V_s] gradient (HAS_GRADIENT), may be s_ptr
    upstream_ptr,  # [N] fp32, dL/dloss (HAS_GRADIENT)
    outer_s, outer_t, outer_ds, inner_s, inner_t, inner_ds,  # strides
    stride_upstream,
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s, scale_1,  # of `scaled`
    rate,  # divergence_weight logit_scale / T of the student
    label_rate,  # label_weight logit_scale of the student
    mu, tau, eta,
    alpha, beta,  # by which the two parts of a decoupled loss are multiplied
    forward_weight,  # w where there is no head
    divergence_weight, label_weight,  # by which divergence and cross-entropy are multiplied
    a, b, keep_p, keep_q,  # of the terms
    HAS_HEAD: tl.constexpr, INCLUSIVE: tl.constexpr, STABLE: tl.constexpr,
    REST: tl.constexpr,  # whether the last token is no part of the head: see pairs.py
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, STATS: tl.constexpr,
    SWITCHES: tl.constexpr,  # whether the forward KL is added where the teacher's entropy is > tau
    TERMS: tl.constexpr,  # a function of terms.py, or None for the two KLs
    HYBRID: tl.constexpr,  # whether the forward KL is mixed with them, its weight by eta or alpha
    MOMENTS: tl.constexpr,  # whether they are `moments`, and the loss is a variance
    APART: tl.constexpr,  # whether the label is apart from all others, of which the KL is
    ONE_SCALE: tl.constexpr,  # of `log_ratio`
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr,  # a label, and its softmax where T is not 1
    HAS_MASK: tl.constexpr, HAS_GRADIENT: tl.constexpr, DAMPED: tl.constexpr,
    HAS_LEAD: tl.constexpr, S_ALIGNED: tl.constexpr, DS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = w KL(p || q) + w_r KL(q || p) of one row, w by its head, its entropy, or given; or the
    sum of its TERMS, w KL(p || q) mixed in where HYBRID; or the KLs of the label and of all others;
    each plus a share of cross-entropy."""
    row = tl.program_id(0).to(tl.int64)
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
        if APART and not STATS:  # they are of all tokens
            apart = lead + label
        (
            reference_t, z_t, reference_s, z_s, reference_1, z_1, slots, top, _, hidden,
            forward_kl, reverse_kl, kept_p, kept_q, entropy_t, entropy_s, agreement, full_end,
        ) = row_statistics(
            t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1, apart,
            HAS_HEAD or STATS, STATS, SWITCHES, FORWARD, REVERSE, UNTEMPERED, S_ALIGNED, BLOCK,
        )  # fmt: skip
        cross_entropy = float("nan")
        if HAS_LABELS and not APART:
            if UNTEMPERED:
                cross_entropy = row_cross_entropy(
                    s_row, label, lead, end_s, scale_1, gain_s, reference_1, z_1, full_end, BLOCK
                )
            else:
                cross_entropy = row_cross_entropy(
                    s_row, label, lead, end_s, scale_s, gain_s, reference_s, z_s, full_end, BLOCK
                )
        crossing, mass, taken, tie_mass, cut = 0.0, float("nan"), float("nan"), 0.0, 0
        end_of_head = None
        if HAS_HEAD:
            last = end_t
            if REST:  # all tokens are in the first block, so that no slot hides any
                last = end_t - 1
                end_of_head = last
                slots = tl.where(tl.arange(0, BLOCK) == last, float("-inf"), slots)
                top = tl.max(slots, axis=0)
                hidden = 0.0
            crossing, mass, taken, tie_mass, cut = head_boundary(
                t_row, lead, last, scale_t, gain_t, reference_t, z_t, slots, top, hidden, full_end,
                mu, INCLUSIVE, STABLE, REST, BLOCK,
            )  # fmt: skip
        w, total_x, total_g = forward_weight, 0.0, 0.0
        pivot = forward_kl * LOG2E  # the mean of u where its weights are p
        if HAS_HEAD or STATS or TERMS is not None:
            w, gap, size, total_x, total_g, variance, full_end = row_divergence(
                t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s,
                reference_t, z_t, reference_s, z_s, full_end,
                crossing, taken, cut, end_of_head, forward_weight, a, b, keep_p, keep_q, pivot,
                HAS_HEAD, STABLE, STATS, TERMS, MOMENTS, ONE_SCALE, S_ALIGNED, BLOCK,
            )  # fmt: skip
        of_reverse = 1.0 - w
        if SWITCHES:
            w = tl.where(entropy_t > tau, 1.0, 0.0)
            of_reverse = 1.0
        loss, pull, not_label = 0.0, 0.0, 0.0
        if MOMENTS:
            loss = alpha * forward_kl + (0.5 * beta * LN2 * LN2) * variance
        elif TERMS is not None:
            loss = (total_x + total_g) * LN2
            loss = tl.where(loss < 0.0, 0.0, loss)  # which no phi is
            if HYBRID:
                w = tl.exp2((loss - 1.0) * (eta * LOG2E))
                loss = w * forward_kl + (1.0 - w) * loss
        elif APART:
            apart = lead + label
            others = forward_kl
            if STATS:
                (
                    reference_t, z_t, reference_s, z_s, reference_1, z_1, _, _, _, _,
                    others, _, kept_p, _, _, _, _, full_end,
                ) = row_statistics(
                    t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1,
                    apart, False, False, False, True, False, UNTEMPERED, S_ALIGNED, BLOCK,
                )  # fmt: skip
            some = (z_t != 0.0) & (z_s != 0.0)  # or else a side has no other token
            others = tl.where(some, others, 0.0)
            kept_p = tl.where(some, kept_p, 0.0)
            target, pull, cross_entropy, not_label, z_t, z_s, z_1 = label_apart(
                t_row, s_row, apart, lead, end_t, end_s,
                scale_t, gain_t, scale_s, gain_s, scale_1,
                reference_t, z_t, reference_s, z_s, reference_1, z_1, full_end, UNTEMPERED, BLOCK,
            )  # fmt: skip
            loss = alpha * target + beta * others
            cross_entropy = tl.where(label_weight != 0.0, cross_entropy, float("nan"))
        else:
            if FORWARD & (w != 0.0):
                loss += w * forward_kl
            if REVERSE & (of_reverse != 0.0):
                loss += of_reverse * reverse_kl
        loss *= divergence_weight
        if HAS_LABELS:
            # 0 times what may be infinite would be NaN.
            loss += tl.where(label_weight != 0.0, label_weight * cross_entropy, 0.0)
        tl.store(loss_ptr + row, loss)
        if STATS:
            stats = stats_ptr + row * STATS_WIDTH
            nothing = gap * 0.0  # NaN where a side has no softmax: then nothing is known
            tl.store(stats + 0, forward_kl)
            tl.store(stats + 1, reverse_kl)
            tl.store(stats + 2, w + nothing)
            tl.store(stats + 3, mass + taken * tie_mass + nothing)
            tl.store(stats + 4, size + nothing)
            tl.store(stats + 5, gap)
            tl.store(stats + 6, entropy_s + nothing)
            tl.store(stats + 7, entropy_t + nothing)
            tl.store(stats + 8, agreement + nothing)
            tl.store(stats + 9, cross_entropy)
        lse_t, lse_s, factor_t, factor_s, shift = normalisers(reference_t, z_t, reference_s, z_s)
        lse_1, of_label = 0.0, 0.0
        if HAS_LABELS:
            of_label = factor_s * label_rate
            if UNTEMPERED:
                lse_1, correction = rounded_sum(reference_1, tl.log2(z_1))
                of_label = tl.exp2(-correction) * label_rate
            if APART:
                of_label *= not_label
            # A label that is no token makes the loss NaN, and all of the gradient with it.
            of_label = tl.where(loss == loss, of_label, float("nan"))
        if TERMS is not None:
            of_terms = factor_s * LN2 * rate
            of_p, of_q = 0.0, 0.0
            if MOMENTS:
                # Where nothing is kept there is no weight.
                of_terms = -beta * LN2 * rate / tl.where(total_x == 0.0, 1.0, total_x)
                shift -= pivot
            elif HYBRID:
                of_terms *= 1.0 - w
            if HYBRID:
                of_p, of_q = factor_t * rate * w, factor_s * rate * w * kept_p
            coefficients = (of_terms, total_g, shift, factor_s, of_p, of_q)
        elif APART:
            of_others = 0.0 if UNTEMPERED else of_label
            coefficients = kl_coefficients(
                factor_t, factor_s, shift, beta, 0.0, 0.0, kept_p, 0.0, rate,
                of_others - alpha * pull * rate * factor_s,
            )  # fmt: skip
            at_apart = alpha * pull * rate - not_label * label_rate
            coefficients = coefficients + (at_apart, 0.0)
        else:
            coefficients = kl_coefficients(
                factor_t, factor_s, shift, w, of_reverse, reverse_kl, kept_p, kept_q, rate,
                0.0 if UNTEMPERED else of_label,
            )  # fmt: skip
            coefficients = coefficients + (0.0, 0.0)
        if HAS_GRADIENT:
            upstream = tl.load(upstream_ptr + row * stride_upstream)
            if DAMPED:
                upstream /= damping(loss)
            ds_row = row_pointer(
                ds_ptr, row_offset(row, inner, outer_ds, inner_ds), lead, DS_ALIGNED
            )
            _write_gradient(
                ds_row, t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1,
                full_end, upstream, lse_t, lse_s, lse_1, coefficients, of_label, label,
                label_rate, a, b, keep_p, keep_q, FORWARD, REVERSE, TERMS, HYBRID, MOMENTS,
                ONE_SCALE, HAS_LABELS, UNTEMPERED, APART, S_ALIGNED, DS_ALIGNED, BLOCK,
            )  # fmt: skip
        else:
            state = state_ptr + row * STATE_WIDTH
            tl.store(state + 0, lse_t)
            tl.store(state + 1, lse_s)
            tl.store(state + 2, lse_1)
            tl.store(state + 3, of_label)
            tl.store(state + 4, full_end.to(tl.float32))
            tl.store(state + 5, BLOCK)
            for i in tl.static_range(COEFFICIENTS):
                tl.store(state + FIRST_COEFFICIENT + i, coefficients[i])
    else:
        tl.store(loss_ptr + row, 0.0)
        if STATS:
            for i in tl.static_range(STATS_WIDTH):
                tl.store(stats_ptr + row * STATS_WIDTH + i, 0.0)
        if HAS_GRADIENT:
            zero_row(ds_ptr + row_offset(row, inner, outer_ds, inner_ds), V_s, BLOCK)
        else:  # nobody reads it, but an operator's output must not depend on what was there
            for i in tl.static_range(STATE_WIDTH):
                tl.store(state_ptr + row * STATE_WIDTH + i, 0.0)


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_t", "outer_ds"])
def backward_kernel(
    ds_ptr,  # [outer, inner, V_s] gradient, may be s_ptr
    s_ptr,  # [outer, inner, V_s] student logits, N = outer * inner rows
    t_ptr,  # [outer, inner, V_t] teacher logits
    valid_ptr,  # [N] bool (HAS_MASK)
    labels_ptr,  # [N] (HAS_LABELS)
    state_ptr,  # [N, 12] fp32 of forward_kernel
    upstream_ptr,  # [N] fp32
    outer_s, outer_t, outer_ds, inner_s, inner_t, inner_ds,  # strides
    stride_upstream,
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s, scale_1,  # of `scaled`
    label_rate,
    a, b, keep_p, keep_q,  # of the terms
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    TERMS: tl.constexpr, HYBRID: tl.constexpr, MOMENTS: tl.constexpr, ONE_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr, APART: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LEAD: tl.constexpr, S_ALIGNED: tl.constexpr, DS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ds = upstream * dloss/ds of one row."""
    row = tl.program_id(0).to(tl.int64)
    offset_t = row_offset(row, inner, outer_t, inner_t)
    lead = 0
    if HAS_LEAD:
        lead = ((base_lead + offset_t) % 8).to(tl.int32)
    valid = True
    if HAS_MASK:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        upstream = tl.load(upstream_ptr + row * stride_upstream)
        label = 0
        if HAS_LABELS:
            label = tl.load(labels_ptr + row).to(tl.int64)
        state = state_ptr + row * STATE_WIDTH
        full_end = full_end_of(tl.load(state + 4), tl.load(state + 5), BLOCK)
        coefficients = ()
        for i in tl.static_range(COEFFICIENTS):
            coefficients = coefficients + (tl.load(state + FIRST_COEFFICIENT + i),)
        _write_gradient(
            row_pointer(ds_ptr, row_offset(row, inner, outer_ds, inner_ds), lead, DS_ALIGNED),
            row_pointer(t_ptr, offset_t, lead, True),
            row_pointer(s_ptr, row_offset(row, inner, outer_s, inner_s), lead, S_ALIGNED),
            lead, lead + V_t, lead + V_s, scale_t, gain_t, scale_s, gain_s, scale_1,
            full_end, upstream,
            tl.load(state + 0), tl.load(state + 1), tl.load(state + 2), coefficients,
            tl.load(state + 3), label, label_rate, a, b, keep_p, keep_q,
            FORWARD, REVERSE, TERMS, HYBRID, MOMENTS, ONE_SCALE, HAS_LABELS, UNTEMPERED, APART,
            S_ALIGNED, DS_ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        zero_row(ds_ptr + row_offset(row, inner, outer_ds, inner_ds), V_s, BLOCK)


@triton.jit
def _write_gradient(
    ds_row, t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1,
    full_end, upstream, lse_t, lse_s, lse_1, coefficients, of_label, label, label_rate,
    a, b, keep_p, keep_q,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    TERMS: tl.constexpr, HYBRID: tl.constexpr, MOMENTS: tl.constexpr, ONE_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr, UNTEMPERED: tl.constexpr, APART: tl.constexpr,
    S_ALIGNED: tl.constexpr, DS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last stage, with the coefficients of `row_gradient` times the upstream gradient."""
    if TERMS is not None:
        rate, total, shift, factor_s, of_p, of_q = coefficients
        of_p *= upstream
        of_q *= upstream
        coefficients = (rate * upstream, total, shift, factor_s, of_p, of_q)
    else:
        scaled_coefficients = ()
        for i in tl.static_range(COEFFICIENTS):
            scaled_coefficients = scaled_coefficients + (coefficients[i] * upstream,)
        coefficients = scaled_coefficients
    row_gradient(
        ds_row, t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, scale_1,
        full_end, lse_t, lse_s, lse_1, coefficients, upstream * of_label, label,
        upstream * label_rate, a, b, keep_p, keep_q,
        FORWARD, REVERSE, TERMS, HYBRID, MOMENTS, ONE_SCALE, HAS_LABELS, UNTEMPERED, APART,
        S_ALIGNED, DS_ALIGNED, BLOCK,
    )  # fmt: skip


@triton.jit
def rescale_kernel(
    x_ptr,  # [N, V], contiguous
    factor_ptr,  # [N] fp32
    stride_factor, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x[n] *= factor[n]; a row whose factor is 1 is not read, which spares the host from asking."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row * stride_factor)
    if factor != 1.0:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = x_ptr + row * V + columns
            value = tl.load(x, mask=columns < V).to(tl.float32) * factor
            tl.store(x, value.to(x_ptr.dtype.element_ty), mask=columns < V)
