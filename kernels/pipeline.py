"""The four stages composed into kernels, one row a program, and their launchers.

    forward    A R B      loss, 8 floats a row for the backward, statistics if asked for
               A R B C    with a gradient: both in one launch, and it may overwrite the student
    backward   C          gradient from the logits and those 8 floats

Nothing of size [N, V] is allocated here: outputs come from the caller.
"""

import contextlib
import os

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from .divergence import row_divergence
from .gradient import damping, gradient_coefficients, row_gradient
from .head import head_boundary
from .launch_table import CANDIDATES, REGISTERS, launch_for
from .rows import row_offset, row_pointer
from .statistics import row_statistics

LOG2E = 1.4426950408889634
STATE_WIDTH = tl.constexpr(8)
STATS_WIDTH = tl.constexpr(6)


@triton.jit(do_not_specialize=["base_lead", "inner", "outer_s", "outer_t", "outer_ds"])
def forward_kernel(
    s_ptr,  # [outer, inner, V_s] student logits, N = outer * inner rows
    t_ptr,  # [outer, inner, V_t] teacher logits
    counted_ptr,  # [N] bool, rows that count (HAS_MASK)
    loss_ptr,  # [N] fp32
    state_ptr,  # [N, 8] fp32, what the backward needs (not HAS_GRADIENT)
    stats_ptr,  # [N, 6] fp32: forward_kl, reverse_kl, head weight, mass, size, gap (STATS)
    ds_ptr,  # [outer, inner, V_s] gradient (HAS_GRADIENT), may be s_ptr
    upstream_ptr,  # [N] fp32, dL/dloss (HAS_GRADIENT)
    outer_s, outer_t, outer_ds, inner_s, inner_t, inner_ds,  # strides
    stride_upstream,
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    rate,  # logit_scale / T of the student
    mu,
    weight,  # w where there is no head
    HAS_HEAD: tl.constexpr, INCLUSIVE: tl.constexpr, STABLE: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, STATS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRADIENT: tl.constexpr, DAMPED: tl.constexpr,
    HAS_LEAD: tl.constexpr, S_ALIGNED: tl.constexpr, DS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = w KL(p || q) + (1 - w) KL(q || p) of one row, w = g_head / gap or given."""
    row = tl.program_id(0).to(tl.int64)
    offset_t = row_offset(row, inner, outer_t, inner_t)
    lead = 0
    if HAS_LEAD:
        lead = ((base_lead + offset_t) % 8).to(tl.int32)
    counts = True
    if HAS_MASK:
        counts = tl.load(counted_ptr + row) != 0
    if counts:
        t_row = row_pointer(t_ptr, offset_t, lead, True)
        s_row = row_pointer(s_ptr, row_offset(row, inner, outer_s, inner_s), lead, S_ALIGNED)
        end_t = lead + V_t
        end_s = lead + V_s
        reference_t, z_t, reference_s, z_s, slots, hidden, full = row_statistics(
            t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s,
            HAS_HEAD, S_ALIGNED, BLOCK,
        )  # fmt: skip
        crossing, mass, k, each, cut = 0.0, float("nan"), float("nan"), 0.0, 0
        if HAS_HEAD:
            crossing, mass, k, each, cut = head_boundary(
                t_row, lead, end_t, scale_t, gain_t, reference_t, z_t, slots, hidden, full, mu,
                INCLUSIVE, STABLE, BLOCK,
            )  # fmt: skip
        forward_kl, reverse_kl, w, gap, size, kept_p, kept_q, full_end = row_divergence(
            t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s,
            reference_t, z_t, reference_s, z_s, full,
            crossing, k, cut, weight, HAS_HEAD, STABLE, FORWARD, REVERSE, STATS, S_ALIGNED, BLOCK,
        )  # fmt: skip
        loss = 0.0
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
            tl.store(stats + 3, mass + k * each + nothing)
            tl.store(stats + 4, size + nothing)
            tl.store(stats + 5, gap)
        lse_t, lse_s, slope, offset, teacher, lost = gradient_coefficients(
            reference_t, z_t, reference_s, z_s, w, reverse_kl, kept_p, kept_q, rate
        )
        if HAS_GRADIENT:
            g = tl.load(upstream_ptr + row * stride_upstream)
            if DAMPED:
                g /= damping(loss)
            row_gradient(
                row_pointer(
                    ds_ptr, row_offset(row, inner, outer_ds, inner_ds), lead, DS_ALIGNED
                ),
                t_row, s_row, lead, end_t, end_s, scale_t, gain_t, scale_s, gain_s, full_end,
                lse_t, lse_s, g * slope, g * offset, g * teacher, g * lost,
                REVERSE, S_ALIGNED, BLOCK,
            )  # fmt: skip
        else:
            state = state_ptr + row * STATE_WIDTH
            tl.store(state + 0, lse_t)
            tl.store(state + 1, lse_s)
            tl.store(state + 2, slope)
            tl.store(state + 3, offset)
            tl.store(state + 4, teacher)
            tl.store(state + 5, lost)
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
    counted_ptr,  # [N] bool (HAS_MASK)
    state_ptr,  # [N, 8] fp32 of forward_kernel
    upstream_ptr,  # [N] fp32
    outer_s, outer_t, outer_ds, inner_s, inner_t, inner_ds,  # strides
    stride_upstream,
    inner, V_s, V_t, base_lead,
    scale_t, gain_t, scale_s, gain_s,  # of `scaled`
    REVERSE: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_LEAD: tl.constexpr, S_ALIGNED: tl.constexpr, DS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ds = upstream * dloss/ds of one row."""
    row = tl.program_id(0).to(tl.int64)
    offset_t = row_offset(row, inner, outer_t, inner_t)
    lead = 0
    if HAS_LEAD:
        lead = ((base_lead + offset_t) % 8).to(tl.int32)
    counts = True
    if HAS_MASK:
        counts = tl.load(counted_ptr + row) != 0
    if counts:
        g = tl.load(upstream_ptr + row * stride_upstream)
        state = state_ptr + row * STATE_WIDTH
        # The forward found its own blocks finite, which may have been narrower; if they were wider,
        # several of these lie in its block 0, where anything may stand.
        forward_block = tl.load(state + 7).to(tl.int32)
        forward_end = tl.load(state + 6).to(tl.int32)
        full_end = tl.where(forward_block <= BLOCK, forward_end * forward_block // BLOCK, 1)
        full_end = tl.where(forward_end == 0, 0, tl.maximum(full_end, 1))
        row_gradient(
            row_pointer(ds_ptr, row_offset(row, inner, outer_ds, inner_ds), lead, DS_ALIGNED),
            row_pointer(t_ptr, offset_t, lead, True),
            row_pointer(s_ptr, row_offset(row, inner, outer_s, inner_s), lead, S_ALIGNED),
            lead, lead + V_t, lead + V_s, scale_t, gain_t, scale_s, gain_s, full_end,
            tl.load(state + 0), tl.load(state + 1), g * tl.load(state + 2),
            g * tl.load(state + 3), g * tl.load(state + 4), g * tl.load(state + 5),
            REVERSE, S_ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        _zero_row(ds_ptr + row_offset(row, inner, outer_ds, inner_ds), V_s, BLOCK)


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


def forward(
    student: torch.Tensor,  # [outer, inner, V_s] fp32 | bf16 | fp16, unit stride in V
    teacher: torch.Tensor,  # [outer, inner, V_t]
    counted: torch.Tensor | None,  # [N] bool, N = outer * inner
    loss: torch.Tensor,  # [N] fp32
    state: torch.Tensor | None,  # [N, 8] fp32, or None with a gradient
    stats: torch.Tensor | None,  # [N, 6] fp32, or None where nobody asks
    *,
    mu: float,
    temperature: float,
    inclusive: bool,
    stable: bool,
    weight: float | None,  # None: adaptive
    student_softcap: float | None = None,  # logit = softcap tanh(logit_scale x / softcap)
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    gradient: torch.Tensor | None = None,  # [outer, inner, V_s] student's dtype; may be student
    upstream: torch.Tensor | None = None,  # [N] fp32, any stride
    damped: bool = False,  # divide the gradient of a row by `damping` of its loss
) -> None:
    """Launch A R B, and C where a gradient is given."""
    maps = _maps(
        temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
    )
    with _device_of(student):
        _forward[(loss.shape[0],)](
            s_ptr=student,
            t_ptr=teacher,
            counted_ptr=counted,
            loss_ptr=loss,
            state_ptr=state,
            stats_ptr=stats,
            ds_ptr=gradient,
            upstream_ptr=upstream,
            stride_upstream=0 if upstream is None else upstream.stride(0),
            rate=_fp32(student_logit_scale / temperature),
            **maps,
            mu=mu,
            weight=0.0 if weight is None else weight,
            HAS_HEAD=weight is None,
            INCLUSIVE=inclusive,
            STABLE=stable,
            FORWARD=weight != 0.0 or stats is not None,
            REVERSE=weight != 1.0 or stats is not None,
            STATS=stats is not None,
            HAS_MASK=counted is not None,
            HAS_GRADIENT=gradient is not None,
            DAMPED=damped,
            **_addressing(student, teacher, student if gradient is None else gradient),
            **_registers("adaptive" if weight is None else "fixed weight"),
        )


def backward(
    gradient: torch.Tensor,  # [outer, inner, V_s] student's dtype; may be student itself
    student: torch.Tensor,  # [outer, inner, V_s]
    teacher: torch.Tensor,  # [outer, inner, V_t]
    counted: torch.Tensor | None,  # [N] bool
    state: torch.Tensor,  # [N, 8] fp32 of forward
    upstream: torch.Tensor,  # [N] fp32, any stride
    *,
    temperature: float,
    reverse: bool,  # False where w is 1
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> None:
    """Launch C."""
    softcap = student_softcap or teacher_softcap
    maps = _maps(
        temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
    )
    with _device_of(student):
        _backward[(upstream.shape[0],)](
            ds_ptr=gradient,
            s_ptr=student,
            t_ptr=teacher,
            counted_ptr=counted,
            state_ptr=state,
            upstream_ptr=upstream,
            stride_upstream=upstream.stride(0),
            **maps,
            REVERSE=reverse,
            HAS_MASK=counted is not None,
            **_addressing(student, teacher, gradient),
            **_registers("gradient" if softcap is None else "gradient with a softcap"),
        )


def rescale(
    rows: torch.Tensor,  # [N, V], contiguous
    factor: torch.Tensor,  # [N] fp32, any stride
) -> None:
    """Launch rows *= factor, in place."""
    launch = launch_for(rows.shape[1])
    with _device_of(rows):
        rescale_kernel[(rows.shape[0],)](
            x_ptr=rows,
            factor_ptr=factor,
            stride_factor=factor.stride(0),
            V=rows.shape[1],
            BLOCK=launch.BLOCK,
            num_warps=launch.num_warps,
        )


def _maps(
    temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
) -> dict:
    """Arguments of `scaled` for both sides."""
    arguments = {}
    for side, softcap, logit_scale in (
        ("t", teacher_softcap, teacher_logit_scale),
        ("s", student_softcap, student_logit_scale),
    ):
        arguments[f"scale_{side}"] = _fp32(LOG2E * (softcap or logit_scale) / temperature)
        arguments[f"gain_{side}"] = None if softcap is None else _fp32(logit_scale / softcap)
    return arguments


def _fp32(number: float) -> float:
    """A positive number, or 2^126, of which twice is a number of fp32, too."""
    return min(number, 2.0**126)


def _addressing(student, teacher, gradient) -> dict:
    """Strides, sizes, alignment and the launch.

    Tensors that stand where the teacher stands between 16-byte boundaries, in every row, are read
    and written 16 bytes at a time."""
    lead = _lead(teacher)
    arguments = {
        "outer_s": student.stride(0),
        "outer_t": teacher.stride(0),
        "outer_ds": gradient.stride(0),
        "inner_s": student.stride(1),
        "inner_t": teacher.stride(1),
        "inner_ds": gradient.stride(1),
        "inner": student.shape[1],
        "V_s": student.shape[2],
        "V_t": teacher.shape[2],
        "base_lead": lead[0],
        "HAS_LEAD": any(lead),
        "S_ALIGNED": _lead(student) == lead,
        "DS_ALIGNED": _lead(gradient) == lead,
    }
    if not _AUTOTUNE:
        arguments |= launch_for(max(student.shape[2], teacher.shape[2]))._asdict()
    return arguments


def _lead(logits) -> tuple[int, int, int]:
    """Where rows stand between 16-byte boundaries (of 2-byte elements): the first, the steps."""
    base = logits.data_ptr() // logits.element_size()
    outer = logits.stride(0) if logits.shape[0] > 1 else 0
    return base % 8, outer % 8, logits.stride(1) % 8


def _registers(kernel: str) -> dict:
    """The limit on registers, as an option of the launch; only NVIDIA's compiler knows it."""
    if triton.knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": REGISTERS[kernel]}


def _device_of(tensor):
    """Make the tensor's device current: Triton launches there."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


_AUTOTUNE = os.environ.get("AKL_AUTOTUNE") == "1"


def _tuned(kernel, *key):
    """The kernel; with AKL_AUTOTUNE=1, timed over CANDIDATES for all values of what `key` names."""
    if not _AUTOTUNE:
        return kernel
    configs = [triton.Config({"BLOCK": c.BLOCK}, num_warps=c.num_warps) for c in CANDIDATES]
    return triton.autotune(configs, key=key, restore_value=["s_ptr"])(kernel)


_forward = _tuned(forward_kernel, "V_s", "V_t", "HAS_HEAD", "HAS_GRADIENT")
_backward = _tuned(backward_kernel, "V_s", "V_t")
