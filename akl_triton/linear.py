"""Fused linear losses: from hidden states and head weights to the loss, logits by the chunk.

    for each chunk of the tokens that count:
        t = h_t @ W_t^T + b_t        s = h_s @ W_s^T + b_s      into two buffers, used again
        loss, and ds over s                                     `ops.forward_rows`
        dH[chunk] = ds @ W_s         dW += ds^T @ h_s           db += sum ds

All gradients are there when the forward pass ends: neither logits nor weights are needed later, and
backward multiplies by a number. Only with a loss per token and a weight to train is the pass made
again in backward: dW mixes the tokens before their upstream gradients are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .functional import (
    WITHOUT_HEAD,
    Backend,
    DivergenceStats,
    Head,
    LossOrPair,
    Reduction,
    Ties,
    check_options,
    row_factor,
    rule_of,
    valid_tokens,
)
from .kernels.layout import STATISTICS
from .rows import damping, power_of_two, room

# The fp32 sum of dW, 8 V H bytes read and written once per chunk, should cost little compared with
# the products, 8 V H flops a token or more. A chunk needs thousands of tokens where a machine does
# 200 flops in the time of a byte (a GPU), and a hundred where it does 10: `python -m bench linear`.
CHUNK_BYTES = {"cpu": 2**28}
CHUNK_BYTES_ELSEWHERE = 2**30
# What is written of fp16 gradients leaves so much room for their sums over the vocabulary.
_LARGEST_TERM = 2.0**9
# The sums over tokens undo the damping, a power of two from 2 up, in the other factor of the
# product: less this, so that hidden states of any size stay in the range of fp16.
_UNDAMPING = 8.0
_ROW_TILE = 128  # chunks are multiples of this where they can be: GEMMs come in such tiles


def linear_adaptive_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mu: float = 0.5,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    head: Head = "exclusive",
    ties: Ties = "stable",
    ignore_index: int = -100,
    shift: int = 0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    scale_by_t2: bool = False,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    r"""`adaptive_kl` of ``hidden @ weight.T + bias``, without ever holding more than a chunk of it.

    Math:
        ``adaptive_kl(student_hidden @ student_weight.T + student_bias, teacher_hidden @
        teacher_weight.T + teacher_bias, labels, ...)``; all options but those below are its own.
        The chunk changes the result by rounding alone, and equal chunks give equal bits.

    Args:
        student_hidden: ``[..., H_s]``, what the model's head is applied to.
        student_weight: ``[V_s, H_s]``, the weight of that head, also where it is the embedding.
        teacher_hidden, teacher_weight: ``[..., H_t]``, ``[V_t, H_t]``.
        labels: ``[...]``; what they leave out is left out before the products, and costs nothing.
        student_bias, teacher_bias: ``[V_s]``, ``[V_t]``.
        chunk_bytes: how much the logits of both sides may take at a time; by default 1 GiB, on a
            CPU 256 MiB.
        accum_dtype: in which the gradients of weight and bias are summed over the chunks.

    Memory beyond inputs and gradients: the chunk, and the sum of the weight's gradient, ``V_s H_s``
    of accum_dtype, where the weight requires grad; under torch.no_grad() the chunk alone. Autocast
    copies a weight of another dtype to its own, here as in every product: a frozen teacher's should
    have it. With ``reduction="none"`` and a weight or bias that requires grad, backward computes
    the logits once more; in every other case the weights are not needed after the forward pass.
    With labels, their number of tokens that count is read once, before the first product, which
    waits for the device.

    Sharded parameters:
        FSDP2 and ZeRO-3 hold parts of the weight, which are refused. Call the loss in the
        ``forward`` of the module that owns the head, and let that module gather it:
        ``fully_shard(model)`` does for every parameter that no submodule of its own wraps (do not
        wrap ``lm_head``); ZeRO-3 does after ``deepspeed.zero.register_external_parameter(model,
        model.lm_head.weight)``. A frozen weight may also be passed as ``weight.full_tensor()``.

    Shape:
        scalar, or that of labels for "none"; with ``return_stats`` the pair (loss, stats).

    Dtype:
        fp32, bf16 or fp16, the same for hidden, weight and bias of a side, which is that of its
        logits. Under autocast any mixture, and the logits have autocast's dtype. The loss is fp32;
        gradients have the dtypes of what they are gradients of.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing has been computed.
        RuntimeError: the gradient is differentiated.

    Reference:
        Wu et al., arXiv 2404.02657; Hsu et al., "Liger Kernel", arXiv 2410.10989, section 3.2 (the
        gradient in the forward pass, chunk by chunk).

    Example:
        >>> import torch
        >>> from akl_triton import linear_adaptive_kl
        >>> student, teacher = torch.nn.Linear(8, 50), torch.nn.Linear(16, 50).requires_grad_(False)
        >>> hidden, teacher_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
        >>> linear_adaptive_kl(hidden, student.weight, teacher_hidden, teacher.weight).backward()
        >>> student.weight.grad.shape
        torch.Size([50, 8])
    """
    return _linear_divergence(
        _Sides(
            student_hidden, student_weight, student_bias,
            teacher_hidden, teacher_weight, teacher_bias,
        ),
        labels,
        rule_of(
            mu, head, ties, None, temperature,
            student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale,
        ),
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        num_items=num_items,
        scale_by_t2=scale_by_t2,
        chunk_bytes=chunk_bytes,
        accum_dtype=accum_dtype,
        return_stats=return_stats,
        backend=backend,
    )  # fmt: skip


def linear_forward_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    scale_by_t2: bool = False,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    """`forward_kl` of ``hidden @ weight.T + bias``: `linear_mixed_kl` with weight 1.

    Math:
        ``loss = sum_i p_i (ln p_i - ln q_i)``; symbols, arguments, shapes,
        dtypes, memory and errors are those of `linear_adaptive_kl`.

    Reference:
        See `forward_kl` and `linear_adaptive_kl`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_forward_kl
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_forward_kl(hidden, weight, hidden, weight).item()
        0.0
    """
    return linear_mixed_kl(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        weight=1.0,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        num_items=num_items,
        scale_by_t2=scale_by_t2,
        chunk_bytes=chunk_bytes,
        accum_dtype=accum_dtype,
        return_stats=return_stats,
        backend=backend,
    )


def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    scale_by_t2: bool = False,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    """`reverse_kl` of ``hidden @ weight.T + bias``: `linear_mixed_kl` with weight 0.

    Math:
        ``loss = sum_i q_i (ln q_i - ln p_i)``; symbols, arguments, shapes,
        dtypes, memory and errors are those of `linear_adaptive_kl`.

    Reference:
        See `reverse_kl` and `linear_adaptive_kl`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_reverse_kl
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_reverse_kl(hidden, weight, hidden, weight).item()
        0.0
    """
    return linear_mixed_kl(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        weight=0.0,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        num_items=num_items,
        scale_by_t2=scale_by_t2,
        chunk_bytes=chunk_bytes,
        accum_dtype=accum_dtype,
        return_stats=return_stats,
        backend=backend,
    )


def linear_mixed_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight: float = 0.5,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    scale_by_t2: bool = False,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    """`mixed_kl` of ``hidden @ weight.T + bias``, without ever holding more than a chunk of it.

    Math:
        ``loss = weight forward_kl + (1 - weight) reverse_kl``; the other arguments, shapes, dtypes,
        memory and errors are those of `linear_adaptive_kl`.

    Reference:
        See `mixed_kl` and `linear_adaptive_kl`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_mixed_kl
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_mixed_kl(hidden, weight, hidden, weight).item()
        0.0
    """
    return _linear_divergence(
        _Sides(
            student_hidden, student_weight, student_bias,
            teacher_hidden, teacher_weight, teacher_bias,
        ),
        labels,
        rule_of(
            *WITHOUT_HEAD, weight, temperature,
            student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale,
        ),
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        num_items=num_items,
        scale_by_t2=scale_by_t2,
        chunk_bytes=chunk_bytes,
        accum_dtype=accum_dtype,
        return_stats=return_stats,
        backend=backend,
    )  # fmt: skip


def check_plan(chunk_bytes: object, accum_dtype: object) -> int | None:
    """Check the options that the losses of logits have not; gives chunk_bytes."""
    checks.check_accum_dtype(accum_dtype)
    return None if chunk_bytes is None else checks.check_integer("chunk_bytes", chunk_bytes)


def default_chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)


def chunk_rows(chunk_bytes: int, row_bytes: int) -> int:
    """Tokens a chunk, where the logits of one take so many bytes on both sides."""
    rows = chunk_bytes // row_bytes
    return rows - rows % _ROW_TILE if rows > _ROW_TILE else rows


class _Sides(NamedTuple):
    """The six tensors of the products, in the order of the operators' arguments."""

    student_hidden: Tensor  # [N, H_s], or [..., H_s] at the door
    student_weight: Tensor  # [V_s, H_s]
    student_bias: Tensor | None  # [V_s]
    teacher_hidden: Tensor  # [N, H_t]
    teacher_weight: Tensor  # [V_t, H_t]
    teacher_bias: Tensor | None  # [V_t]


class _Plan(NamedTuple):
    """The plan of the sweep over the chunks, in the order of the operators' arguments."""

    student_dtype: torch.dtype  # of the student's products, hence of its logits
    teacher_dtype: torch.dtype
    accum_dtype: torch.dtype
    chunk_bytes: int
    hidden_gradient: bool  # which gradients are wanted
    weight_gradient: bool
    bias_gradient: bool
    backend: str

    def bytes_per_row(self, sides: _Sides) -> int:
        """Bytes that the logits of one token take on both sides."""
        student = sides.student_weight.shape[0] * self.student_dtype.itemsize
        return student + sides.teacher_weight.shape[0] * self.teacher_dtype.itemsize

    @property
    def damped(self) -> bool:
        """Whether the gradient of the logits is divided by each row's damping."""
        return self.student_dtype == torch.float16

    def room(self, rule: ops.Rule) -> float:
        """By which that is multiplied, where the upstream gradient is not known."""
        if not self.damped:
            return 1.0
        if self.accum_dtype == torch.float16:  # the sum over tokens has all the room of fp16
            return min(_UNDAMPING, room(rule.rate, ops.LARGEST_WRITTEN))
        return room(rule.rate, _LARGEST_TERM)

    def unit(self, rule: ops.Rule) -> float:
        """By which the sums over tokens are multiplied."""
        return self.room(rule) / _UNDAMPING if self.damped else 1.0

    @property
    def any_gradient(self) -> bool:
        return self.hidden_gradient or self.weight_gradient or self.bias_gradient


def _linear_divergence(
    sides: _Sides,
    labels: Tensor | None,
    rule: ops.Rule,
    *,
    ignore_index: int,
    shift: int,
    reduction: Reduction,
    num_items: float | Tensor | None,
    scale_by_t2: bool,
    chunk_bytes: int | None,
    accum_dtype: torch.dtype,
    return_stats: bool,
    backend: Backend,
) -> LossOrPair:
    """The common body of the losses."""
    ignore_index, shift = check_options(
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        scale_by_t2=scale_by_t2,
        return_stats=return_stats,
        backend=backend,
    )
    chunk_bytes = check_plan(chunk_bytes, accum_dtype)
    student, student_weight, student_bias, teacher, *_ = sides
    checks.check_tensor("student_hidden", student)
    autocast = _autocast_dtype(student.device.type)
    checks.check_projection("student", *sides[:3], student, autocast is not None)
    checks.check_projection("teacher", *sides[3:], student, autocast is not None)
    checks.check_labels(labels, student, shift, of="student_hidden")
    items = checks.check_num_items(num_items, reduction, student, of="student_hidden")
    differentiable = torch.is_grad_enabled()
    plan = _Plan(
        student_dtype=autocast or student.dtype,
        teacher_dtype=autocast or teacher.dtype,
        accum_dtype=accum_dtype,
        chunk_bytes=default_chunk_bytes(student.device) if chunk_bytes is None else chunk_bytes,
        hidden_gradient=differentiable and checks.wants_gradient(student),
        weight_gradient=differentiable and checks.wants_gradient(student_weight),
        bias_gradient=differentiable
        and student_bias is not None
        and checks.wants_gradient(student_bias),
        backend=ops.resolve_backend(backend, student.device.type),
    )
    checks.check_chunk_bytes(plan.chunk_bytes, plan.bytes_per_row(sides))
    per_token = reduction == "none"
    if _late(plan, per_token):
        for name, tensor in sides._asdict().items():
            if tensor is not None:
                checks.check_can_be_saved(name, tensor)

    tokens = student.shape[:-1]
    valid = None if labels is None else valid_tokens(labels, ignore_index, shift)
    factor = row_factor(tokens, valid, reduction, items)
    if scale_by_t2:
        factor = factor * rule.temperature**2
    rows = sides._replace(
        student_hidden=student.reshape(-1, student.shape[-1]),
        teacher_hidden=teacher.reshape(-1, teacher.shape[-1]),
    )
    # Multiplied, not copied to the device: a copy would wait for it.
    scale = torch.ones((), dtype=torch.float32, device=student.device) * factor
    loss, stats, *_ = linear_divergence(*rows, valid, scale, *rule, *plan, per_token, return_stats)
    if per_token:
        loss = loss.view(tokens)
    if return_stats:
        return loss, DivergenceStats(*(column.view(tokens) for column in stats.unbind(1)))
    return loss


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast computes products here; None outside autocast."""
    # torch.amp.is_autocast_available would break a graph of PyTorch before 2.12.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


# The arguments of both operators: _Sides, which tokens count, the factor of their losses, ops.Rule,
# _Plan.
_ARGUMENTS = """
    Tensor student_hidden, Tensor student_weight, Tensor? student_bias,
    Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias,
    Tensor? valid, Tensor factor,
    float mu, float temperature, str head, str ties, float? weight,
    float? student_softcap, float? teacher_softcap,
    float student_logit_scale, float teacher_logit_scale,
    ScalarType student_dtype, ScalarType teacher_dtype, ScalarType accum_dtype,
    SymInt chunk_bytes, bool hidden_gradient, bool weight_gradient, bool bias_gradient, str backend
"""


@torch.library.custom_op(
    "akl_triton::linear_divergence",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool per_token, bool with_stats)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_divergence(*inputs):  # type: ignore[no-untyped-def]
    """(loss [] or [N] fp32, stats [N, 6] or [0, 6] fp32, dampings, gradients of the summed loss).

    The gradients are [N, H_s], [V_s, H_s] and [V_s], or [0] where the forward pass gives none. In
    fp16 they still have to be multiplied by `_rests`; dampings [N] are [0] elsewhere."""
    sides, valid, factor, rule, plan, per_token, with_stats = _unpack(inputs)
    loss, *rest = _sweep(sides, valid, factor, rule, _now(plan, per_token), with_stats)
    return (loss if per_token else loss.sum(), *rest)


@torch.library.custom_op(
    "akl_triton::linear_divergence_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def linear_divergence_backward(upstream, *inputs):  # type: ignore[no-untyped-def]
    """The gradients of sum upstream [N] * loss [N], or [0] where none is wanted."""
    sides, valid, factor, rule, plan = _unpack(inputs)
    _, _, _, *gradients = _sweep(sides, valid, factor, rule, plan, False, upstream)
    return tuple(gradients)


@torch.library.custom_op("akl_triton::scaled", mutates_args=())
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * x in `dtype`, rounded once; factor [] or one for each x[i]."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for block in ops.blocks(x):
        by = factor[block].view(-1, *[1] * (x.dim() - 1)) if factor.dim() else factor
        torch.mul(x[block], by, out=out[block])
    return out


def _late(plan: _Plan, per_token: bool) -> bool:
    """Whether the gradients have to wait for the upstream gradient of every token."""
    return per_token and (plan.weight_gradient or plan.bias_gradient)


def _now(plan: _Plan, per_token: bool) -> _Plan:
    """The part of the plan that runs in the forward pass."""
    if _late(plan, per_token):
        return plan._replace(hidden_gradient=False, weight_gradient=False, bias_gradient=False)
    return plan


def _empty_gradients(sides: _Sides, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = sides.student_hidden, sides.student_weight

    def empty(wanted: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=hidden.device)

    return (
        empty(plan.hidden_gradient, hidden.shape, plan.student_dtype),
        empty(plan.weight_gradient, weight.shape, plan.accum_dtype),
        empty(plan.bias_gradient, weight.shape[:1], plan.accum_dtype),
    )


@linear_divergence.register_fake
def _(*inputs):  # type: ignore[no-untyped-def]
    sides, _, _, _, plan, per_token, with_stats = _unpack(inputs)
    hidden = sides.student_hidden
    n = hidden.shape[0]
    loss = torch.empty((n,) if per_token else (), dtype=torch.float32, device=hidden.device)
    stats = torch.empty(
        n if with_stats else 0, len(STATISTICS), dtype=torch.float32, device=hidden.device
    )
    now = _now(plan, per_token)
    dampings = loss.new_empty(n if now.damped and now.hidden_gradient else 0)
    return (loss, stats, dampings, *_empty_gradients(sides, now))


@linear_divergence_backward.register_fake
def _(upstream, *inputs):  # type: ignore[no-untyped-def]
    sides, _, _, _, plan = _unpack(inputs)
    return _empty_gradients(sides, plan)


@scaled.register_fake
def _(x, factor, dtype):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _unpack(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The operators' arguments: (sides, valid, factor, rule, plan, the rest)."""
    a = len(_Sides._fields)
    b = a + 2 + len(ops.Rule._fields)
    c = b + len(_Plan._fields)
    return (
        _Sides(*inputs[:a]),
        inputs[a],
        inputs[a + 1],
        ops.Rule(*inputs[a + 2 : b]),
        _Plan(*inputs[b:c]),
        *inputs[c:],
    )


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    sides, valid, factor, rule, plan, per_token, _ = _unpack(inputs)
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # no zeros for what has no upstream gradient
    ctx.late = _late(plan, per_token)
    ctx.options = rule, plan
    ctx.dtypes = [None if x is None else x.dtype for x in sides[:3]]
    ctx.save_for_backward(factor, *(*sides, valid) if ctx.late else rest[1:])


def _differentiate(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():  # create_graph=True; what was computed in forward has no graph
        ops.refuse()
    rule, plan = ctx.options
    factor, *saved = ctx.saved_tensors
    wanted = plan.hidden_gradient, plan.weight_gradient, plan.bias_gradient
    if ctx.late:
        *inputs, valid = saved
        saved = linear_divergence_backward(upstream, *inputs, valid, factor, *rule, *plan)
        rests = [torch.ones((), dtype=torch.float32, device=upstream.device)] * 3
    else:
        dampings, *saved = saved
        rests = [upstream * rest for rest in _rests(factor, dampings, rule, plan)]
    gradients = [
        scaled(x, rest, dtype) if some else None
        for x, rest, dtype, some in zip(saved, rests, ctx.dtypes, wanted, strict=True)
    ]
    return *gradients, *[None] * (7 + len(rule) + len(plan))


def _rests(factor: Tensor, dampings: Tensor, rule: ops.Rule, plan: _Plan) -> list[Tensor | float]:
    """The factor that the gradients of hidden states, weight and bias still lack."""
    if not plan.damped:
        return [1.0, 1.0, 1.0]
    of_sums = power_of_two(factor) / plan.unit(rule)
    of_rows = power_of_two(factor) / plan.room(rule)
    return [of_rows * dampings if plan.hidden_gradient else of_rows, of_sums, of_sums]


linear_divergence.register_autograd(_differentiate, setup_context=_save)


def _sweep(
    sides: _Sides,
    valid: Tensor | None,
    factor: Tensor,
    rule: ops.Rule,
    plan: _Plan,
    with_stats: bool,
    upstream: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(factor * loss [N], stats, dampings, gradients of upstream * that, summed).

    Where the upstream gradient is not known yet it is taken to be 1, and in fp16 the gradients lack
    `_rests`: a power of two, so that they are rounded once if the loss scale is one, too."""
    student, teacher = sides.student_hidden, sides.teacher_hidden
    n, device = student.shape[0], student.device
    loss = torch.zeros(n, dtype=torch.float32, device=device)
    stats = loss.new_zeros(n if with_stats else 0, len(STATISTICS))
    damped = upstream is None and plan.damped and plan.any_gradient
    dampings = loss.new_ones(n if damped and plan.hidden_gradient else 0)
    d_hidden, d_weight, d_bias = (x.zero_() for x in _empty_gradients(sides, plan))

    counting = None if valid is None else valid.nonzero().flatten()
    count = n if counting is None else len(counting)
    step = min(chunk_rows(plan.chunk_bytes, plan.bytes_per_row(sides)), count)
    weights = (
        sides.student_weight.to(plan.student_dtype),
        sides.teacher_weight.to(plan.teacher_dtype),
    )
    buffers = [weight.new_empty(step, weight.shape[0]) for weight in weights]
    scale = factor.expand(n) if upstream is None else factor * upstream
    if damped:
        scale = scale * (plan.room(rule) / power_of_two(factor))
    for start in range(0, count, max(step, 1)):
        end = min(start + step, count)
        rows = slice(start, end) if counting is None else counting[start:end]
        h = student[rows].to(plan.student_dtype)
        s, t = (buffer[: end - start] for buffer in buffers)
        _project(h, weights[0], sides.student_bias, out=s)
        _project(teacher[rows].to(plan.teacher_dtype), weights[1], sides.teacher_bias, out=t)
        result = ops.empty_result(s[None], with_stats)
        scale_of_rows = scale[rows] if plan.any_gradient else None
        ops.forward_rows(s[None], t[None], None, result, rule, plan.backend, scale_of_rows, damped)
        loss[rows] = factor * result.loss
        if with_stats:
            stats[rows] = result.stats
        if plan.hidden_gradient:
            d_hidden[rows] = s @ weights[0]
        undamping = None
        if damped:
            row_dampings = damping(result.loss)
            undamping = row_dampings[:, None] / _UNDAMPING
            if plan.hidden_gradient:
                dampings[rows] = row_dampings
        if plan.weight_gradient:
            undamped = h if undamping is None else (h * undamping).to(h.dtype)
            _add_product(d_weight, s, undamped)
        if plan.bias_gradient:
            _add_sum(d_bias, s, undamping)
    return loss, stats, dampings, d_hidden, d_weight, d_bias


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight^T + bias, in the dtype of hidden, weight and out."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias.to(out.dtype), hidden, weight.t(), out=out)


def _add_product(total: Tensor, ds: Tensor, hidden: Tensor) -> None:
    """total [V, H] += ds^T @ hidden, summed in the dtype of total."""
    if ds.dtype == total.dtype:
        total.addmm_(ds.t(), hidden)
    elif ds.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, ds.t(), hidden, out_dtype=torch.float32, out=total)
    else:  # no GEMM sums bf16 in fp32 here: it is given copies, a block of them at a time
        wide = hidden.to(total.dtype)
        for block in ops.blocks(ds.t()):
            total[block].addmm_(ds[:, block].t().to(total.dtype), wide)


def _add_sum(total: Tensor, ds: Tensor, factor: Tensor | None) -> None:
    """total [V] += sum of ds over the tokens, each times its factor [C, 1] fp32."""
    for block in ops.blocks(ds.t()):
        terms = ds[:, block] if factor is None else ds[:, block] * factor
        total[block] += terms.sum(0, dtype=total.dtype)
