"""The stages composed into kernels.

    forward    statistics, boundary, divergence     the loss, and 8 floats a row for the backward
               the same and gradient                both in one launch; the gradient may overwrite
                                                    the student
    backward   gradient                             from the logits and those 8 floats

One program handles one row.
"""

import triton
import triton.language as tl

from . import layout
from .arithmetic import LN2
from .blocks import row_offset, row_pointer
from .divergence import row_divergence
from .gradient import damping, gradient_coefficients, row_gradient, row_gradient_of_terms
from .head import head_boundary
from .statistics import normalisers, row_statistics

STATE_WIDTH = tl.constexpr(layout.STATE_WIDTH)
STATS_WIDTH = tl.constexpr(len(layout.STATISTICS))


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_t", "outer_ds"])
def forward_kernel(
    s_ptr,  # [outer, inner, V_s] student logits, N = outer * inner rows
    t_ptr,  # [outer, inner, V_t] teacher logits
    valid_ptr,  # [N] bool, rows that count (HAS_MASK)
    loss_ptr,  # [N] fp32
    state_ptr,  # [N, 8] fp32, what the backward needs (not HAS_GRADIENT)
    stats_ptr,  # [N, 6] fp32: layout.STATISTICS (STATS)
    ds_ptr,  # [outer, inner, V_s] gradient (HAS_GRADIENT), may be s_ptr
    upstream_ptr,  # [N] fp32, dL/dloss (HAS_GRADIENT)
    outer_s, outer_t, outer_ds, inner_s, inner_t, inner_ds,  # strides
    stride_upstream,
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    rate,  # logit_scale / T of the student
    mu,
    forward_weight,  # w where there is no head
    a, b, keep_p, keep_q,  # of the terms
    HAS_HEAD: tl.constexpr, INCLUSIVE: tl.constexpr, STABLE: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, STATS: tl.constexpr,
    TERMS: tl.constexpr,  # a function of terms.py, or None for the two KLs
    ONE_SCALE: tl.constexpr,  # of `log_ratio`
    HAS_MASK: tl.constexpr, HAS_GRADIENT: tl.constexpr, DAMPED: tl.constexpr,
    HAS_LEAD: tl.constexpr, S_ALIGNED: tl.constexpr, DS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = w KL(p || q) + (1 - w) KL(q || p) of one row, w = g_head / gap or given; or the sum
    of its TERMS."""
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
        reference_t, z_t, reference_s, z_s, slots, hidden, full_end = row_statistics(
            t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s,
            HAS_HEAD, S_ALIGNED, BLOCK,
        )  # fmt: skip
        crossing, mass, taken, tie_mass, cut = 0.0, float("nan"), float("nan"), 0.0, 0
        if HAS_HEAD:
            crossing, mass, taken, tie_mass, cut = head_boundary(
                t_row, lead, end_t, scale_t, gain_t, reference_t, z_t, slots, hidden, full_end, mu,
                INCLUSIVE, STABLE, BLOCK,
            )  # fmt: skip
        (
            forward_kl, reverse_kl, w, gap, size, kept_p, kept_q, total_x, total_g, full_end,
        ) = row_divergence(
            t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s,
            reference_t, z_t, reference_s, z_s, full_end,
            crossing, taken, cut, forward_weight, a, b, keep_p, keep_q,
            HAS_HEAD, STABLE, FORWARD, REVERSE, STATS, TERMS, ONE_SCALE, S_ALIGNED, BLOCK,
        )  # fmt: skip
        loss = 0.0
        if TERMS is not None:
            loss = (total_x + total_g) * LN2
        else:
            if FORWARD & (w != 0.0):
                loss += w * forward_kl
            if REVERSE & (w != 1.0):
                loss += (1.0 - w) * reverse_kl
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
        if TERMS is not None:
            lse_t, lse_s, _, factor_s, shift = normalisers(reference_t, z_t, reference_s, z_s)
            c2, c3, c4, c5 = shift, factor_s * LN2 * rate, total_g, factor_s
        else:
            lse_t, lse_s, c2, c3, c4, c5 = gradient_coefficients(
                reference_t, z_t, reference_s, z_s, w, reverse_kl, kept_p, kept_q, rate
            )
        if HAS_GRADIENT:
            upstream = tl.load(upstream_ptr + row * stride_upstream)
            if DAMPED:
                upstream /= damping(loss)
            ds_row = row_pointer(
                ds_ptr, row_offset(row, inner, outer_ds, inner_ds), lead, DS_ALIGNED
            )
            _write_gradient(
                ds_row, t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s,
                full_end, upstream, lse_t, lse_s, c2, c3, c4, c5, a, b, keep_p, keep_q,
                REVERSE, TERMS, ONE_SCALE, S_ALIGNED, BLOCK,
            )  # fmt: skip
        else:
            state = state_ptr + row * STATE_WIDTH
            tl.store(state + 0, lse_t)
            tl.store(state + 1, lse_s)
            tl.store(state + 2, c2)
            tl.store(state + 3, c3)
            tl.store(state + 4, c4)
            tl.store(state + 5, c5)
            tl.store(state + 6, full_end.to(tl.float32))
            tl.store(state + 7, BLOCK)
    else:
        tl.store(loss_ptr + row, 0.0)
        if STATS:
            for i in tl.static_range(STATS_WIDTH):
                tl.store(stats_ptr + row * STATS_WIDTH + i, 0.0)
        if HAS_GRADIENT:
            _zero_row(ds_ptr + row_offset(row, inner, outer_ds, inner_ds), V_s, BLOCK)
        else:  # nobody reads it, but an operator's output must not depend on what was there
            for i in tl.static_range(STATE_WIDTH):
                tl.store(state_ptr + row * STATE_WIDTH + i, 0.0)


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_t", "outer_ds"])
def backward_kernel(
    ds_ptr,  # [outer, inner, V_s] gradient, may be s_ptr
    s_ptr,  # [outer, inner, V_s] student logits, N = outer * inner rows
    t_ptr,  # [outer, inner, V_t] teacher logits
    valid_ptr,  # [N] bool (HAS_MASK)
    state_ptr,  # [N, 8] fp32 of forward_kernel
    upstream_ptr,  # [N] fp32
    outer_s, outer_t, outer_ds, inner_s, inner_t, inner_ds,  # strides
    stride_upstream,
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    a, b, keep_p, keep_q,  # of the terms
    REVERSE: tl.constexpr, TERMS: tl.constexpr, ONE_SCALE: tl.constexpr,
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
        state = state_ptr + row * STATE_WIDTH
        # The forward found its own blocks finite, which may have been narrower; if they were wider,
        # several of these lie in its block 0, where anything may stand.
        forward_block = tl.load(state + 7).to(tl.int32)
        forward_end = tl.load(state + 6).to(tl.int32)
        full_end = tl.where(forward_block <= BLOCK, forward_end * forward_block // BLOCK, 1)
        full_end = tl.where(forward_end == 0, 0, tl.maximum(full_end, 1))
        _write_gradient(
            row_pointer(ds_ptr, row_offset(row, inner, outer_ds, inner_ds), lead, DS_ALIGNED),
            row_pointer(t_ptr, offset_t, lead, True),
            row_pointer(s_ptr, row_offset(row, inner, outer_s, inner_s), lead, S_ALIGNED),
            lead, lead + V_t, lead + V_s, scale_t, gain_t, scale_s, gain_s, full_end, upstream,
            tl.load(state + 0), tl.load(state + 1), tl.load(state + 2), tl.load(state + 3),
            tl.load(state + 4), tl.load(state + 5), a, b, keep_p, keep_q,
            REVERSE, TERMS, ONE_SCALE, S_ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        _zero_row(ds_ptr + row_offset(row, inner, outer_ds, inner_ds), V_s, BLOCK)


@triton.jit
def _write_gradient(
    ds_row, t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, full_end,
    upstream, lse_t, lse_s,
    c2, c3, c4, c5,  # of the state: slope, offset, teacher, lost; of terms shift, rate, G, factor_s
    a, b, keep_p, keep_q,
    REVERSE: tl.constexpr, TERMS: tl.constexpr, ONE_SCALE: tl.constexpr,
    S_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last stage, of either kind of divergence."""
    if TERMS is not None:
        row_gradient_of_terms(
            ds_row, t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, full_end,
            lse_t, lse_s, c2, c5, upstream * c3, c4, a, b, keep_p, keep_q,
            TERMS, ONE_SCALE, S_ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        row_gradient(
            ds_row, t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, full_end,
            lse_t, lse_s, upstream * c2, upstream * c3, upstream * c4, upstream * c5,
            REVERSE, S_ALIGNED, BLOCK,
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


@triton.jit
def _zero_row(row_ptr, V, BLOCK: tl.constexpr):
    """row = 0."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        zero = tl.zeros((BLOCK,), row_ptr.dtype.element_ty)
        tl.store(row_ptr + start + columns, zero, mask=start + columns < V)
