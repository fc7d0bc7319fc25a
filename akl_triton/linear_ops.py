"""The operators of the losses of hidden states: the logits by the chunk, the loss and gradients.

    for each chunk of the tokens that count:
        t = h_t @ W_t^T + b_t        s = h_s @ W_s^T + b_s      into two buffers, used again
        loss, and ds over s                                     a backend
        dH[chunk] = ds @ W_s         dW += ds^T @ h_s           db += sum ds

All gradients are there when the forward pass ends: neither logits nor weights are needed later, and
backward multiplies by a number. Only with a loss per token and a weight to train is the pass made
again in backward: dW mixes the tokens before their upstream gradients are known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .backend import losses_of, shard_losses_of
from .divergences import RULE_SCHEMA, Rule
from .exchange import Flight
from .kernels.layout import STATISTICS
from .rows import LARGEST_WRITTEN, RowResult, blocks, damping, empty_result, power_of_two, room

# The fp32 sum of dW, 8 V H bytes read and written once per chunk, should cost little compared with
# the products, 8 V H flops a token or more. A chunk needs thousands of tokens where a machine does
# 200 flops in the time of a byte (a GPU), and a hundred where it does 10: `python -m bench linear`.
CHUNK_BYTES = {"cpu": 2**28}
CHUNK_BYTES_ELSEWHERE = 2**30
# The largest fp16 gradient that is written: its sums over the vocabulary have to fit as well.
_LARGEST_TERM = 2.0**9
# The sums over tokens undo the damping, a power of two from 2 up, in the other factor of the
# product: less this, so that hidden states of any size stay in the range of fp16.
_UNDAMPING = 8.0
_ROW_TILE = 128  # chunks are multiples of this where they can be: GEMMs come in such tiles


def default_chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)


def chunk_rows(chunk_bytes: int, row_bytes: int) -> int:
    """Tokens a chunk, where the logits of one take so many bytes on both sides."""
    rows = chunk_bytes // row_bytes
    return rows - rows % _ROW_TILE if rows > _ROW_TILE else rows


class Sides(NamedTuple):
    """The tensors of both sides, in the order of the operators' arguments. Of a teacher that is
    pairs there is no product: see `BackendOfPairs`."""

    student_hidden: Tensor  # [N, H_s], or [..., H_s] at the door
    student_weight: Tensor  # [V_s, H_s]
    student_bias: Tensor | None  # [V_s]
    teacher_hidden: Tensor  # [N, H_t], or the entries of pairs [N, k + 1]
    teacher_weight: Tensor | None  # [V_t, H_t]
    teacher_bias: Tensor | None  # [V_t]
    ids: Tensor | None = None  # [N, k] of pairs


class Plan(NamedTuple):
    """The plan of the sweep over the chunks, in the order of the operators' arguments."""

    student_dtype: torch.dtype  # of the student's products, hence of its logits
    teacher_dtype: torch.dtype
    accum_dtype: torch.dtype
    chunk_bytes: int
    hidden_gradient: bool  # which gradients are wanted
    weight_gradient: bool
    bias_gradient: bool
    backend: str
    group: str | None = None  # over which the vocabulary is sharded

    def bytes_per_row(self, sides: Sides, shards: Tensor | None = None) -> int:
        """Bytes that the logits of one token take on both sides, on the rank that has most."""
        width_s = sides.student_weight.shape[0]
        width_t = 0 if sides.teacher_weight is None else sides.teacher_weight.shape[0]
        if shards is not None:  # chunks have to be the same on all ranks
            width_s, of_teacher = shards.amax(0).tolist()
            width_t = 0 if sides.teacher_weight is None else of_teacher
        return width_s * self.student_dtype.itemsize + width_t * self.teacher_dtype.itemsize

    @property
    def damped(self) -> bool:
        """Whether the gradient of the logits is divided by each row's damping."""
        return self.student_dtype == torch.float16

    def room(self, rule: Rule) -> float:
        """By which that is multiplied, where the upstream gradient is not known."""
        if not self.damped:
            return 1.0
        if self.accum_dtype == torch.float16:  # the sum over tokens has all the room of fp16
            return min(_UNDAMPING, room(rule.bound, LARGEST_WRITTEN))
        return room(rule.bound, _LARGEST_TERM)

    def unit(self, rule: Rule) -> float:
        """By which the sums over tokens are multiplied."""
        return self.room(rule) / _UNDAMPING if self.damped else 1.0

    @property
    def any_gradient(self) -> bool:
        return self.hidden_gradient or self.weight_gradient or self.bias_gradient


# Labels and masks make both operators wait for the device, to count the tokens. Tagged, they are
# left out of the CUDA graphs that torch.compile(mode="reduce-overhead") captures.
WAITS = torch.Tag.cudagraph_unsafe

# The last arguments of both operators: Sides, which tokens count, their labels, the widths of the
# shards, the factor of their losses, Plan, Rule.
_ARGUMENTS = f"""
    Tensor student_hidden, Tensor student_weight, Tensor? student_bias,
    Tensor teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? ids,
    Tensor? valid, Tensor? labels, Tensor? shards, Tensor factor,
    ScalarType student_dtype, ScalarType teacher_dtype, ScalarType accum_dtype,
    SymInt chunk_bytes, bool hidden_gradient, bool weight_gradient, bool bias_gradient, str backend,
    str? group,
    {RULE_SCHEMA}
"""


@torch.library.custom_op(
    f"{ops.NAMESPACE}::linear_divergence",
    mutates_args=(),
    tags=WAITS,
    schema=f"(bool per_token, bool with_stats, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_divergence(per_token, with_stats, *inputs):  # type: ignore[no-untyped-def]
    """(loss [] or [N] fp32, stats [N, 10] or [0, 10] fp32, dampings, gradients of the summed loss).

    The gradients are [N, H_s], [V_s, H_s] and [V_s], or [0] where the forward pass gives none. In
    fp16 they still have to be multiplied by `_rests`; dampings [N] are [0] elsewhere."""
    sides, valid, labels, shards, factor, plan, rule = _unpack(inputs)
    now = _now(plan, per_token)
    loss, *rest = _sweep(sides, valid, labels, shards, factor, now, rule, with_stats)
    return (loss if per_token else loss.sum(), *rest)


@torch.library.custom_op(
    f"{ops.NAMESPACE}::linear_divergence_backward",
    mutates_args=(),
    tags=WAITS,
    schema=f"(Tensor upstream, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def linear_divergence_backward(upstream, *inputs):  # type: ignore[no-untyped-def]
    """The gradients of sum upstream [N] * loss [N], or [0] where none is wanted."""
    _, _, _, *gradients = _sweep(*_unpack(inputs), False, upstream)
    return tuple(gradients)


@torch.library.custom_op(f"{ops.NAMESPACE}::scaled", mutates_args=())
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * x in `dtype`, rounded once; factor [] or one for each x[i]."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for block in blocks(x):
        by = factor[block].view(-1, *[1] * (x.dim() - 1)) if factor.dim() else factor
        torch.mul(x[block], by, out=out[block])
    return out


def is_late(plan: Plan, per_token: bool) -> bool:
    """Whether the gradients have to wait for the upstream gradient of every token."""
    return per_token and (plan.weight_gradient or plan.bias_gradient)


def _now(plan: Plan, per_token: bool) -> Plan:
    """The part of the plan that runs in the forward pass."""
    if is_late(plan, per_token):
        return plan._replace(hidden_gradient=False, weight_gradient=False, bias_gradient=False)
    return plan


def _empty_gradients(sides: Sides, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = sides.student_hidden, sides.student_weight

    def empty(wanted: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=hidden.device)

    return (
        empty(plan.hidden_gradient, hidden.shape, plan.student_dtype),
        empty(plan.weight_gradient, weight.shape, plan.accum_dtype),
        empty(plan.bias_gradient, weight.shape[:1], plan.accum_dtype),
    )


@linear_divergence.register_fake
def _(per_token, with_stats, *inputs):  # type: ignore[no-untyped-def]
    sides, *_, plan, _ = _unpack(inputs)
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
    sides, *_, plan, _ = _unpack(inputs)
    return _empty_gradients(sides, plan)


@scaled.register_fake
def _(x, factor, dtype):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _unpack(
    inputs: Sequence[Any],
) -> tuple[Sides, Tensor | None, Tensor | None, Tensor | None, Tensor, Plan, Rule]:
    """The arguments of `_ARGUMENTS`."""
    sides, rest = Sides(*inputs[: len(Sides._fields)]), inputs[len(Sides._fields) :]
    valid, labels, shards, factor, *rest = rest
    end_of_plan = len(Plan._fields)
    plan, rule = Plan(*rest[:end_of_plan]), Rule.unpack(*rest[end_of_plan:])
    return sides, valid, labels, shards, factor, plan, rule


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    per_token, _, *arguments = inputs
    sides, valid, labels, shards, factor, plan, rule = _unpack(arguments)
    ctx.count = len(inputs)
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # no zeros for what has no upstream gradient
    ctx.late = is_late(plan, per_token)
    ctx.options = plan, rule
    ctx.dtypes = [None if x is None else x.dtype for x in sides[:3]]
    ctx.save_for_backward(factor, *(*sides, valid, labels, shards) if ctx.late else rest[1:])


def _differentiate(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():  # create_graph=True; what was computed in forward has no graph
        ops.refuse()
    plan, rule = ctx.options
    factor, *saved = ctx.saved_tensors
    wanted = plan.hidden_gradient, plan.weight_gradient, plan.bias_gradient
    if ctx.late:
        saved = linear_divergence_backward(upstream, *saved, factor, *plan, *rule.pack())
        rests = [torch.ones((), dtype=torch.float32, device=upstream.device)] * 3
    else:
        dampings, *saved = saved
        rests = [upstream * rest for rest in _rests(factor, dampings, plan, rule)]
    gradients = [
        scaled(x, rest, dtype) if some else None
        for x, rest, dtype, some in zip(saved, rests, ctx.dtypes, wanted, strict=True)
    ]
    return None, None, *gradients, *[None] * (ctx.count - 5)


def _rests(factor: Tensor, dampings: Tensor, plan: Plan, rule: Rule) -> list[Tensor | float]:
    """The factor that the gradients of hidden states, weight and bias still lack."""
    if not plan.damped:
        return [1.0, 1.0, 1.0]
    base = _base(factor)
    of_sums, of_rows = base / plan.unit(rule), base / plan.room(rule)
    return [of_rows * dampings if plan.hidden_gradient else of_rows, of_sums, of_sums]


def _base(factor: Tensor) -> Tensor:
    """The power of two by which factors, [] or [N], are divided to be within 2, without a sync."""
    # Padded: there may be no rows.
    largest = torch.nn.functional.pad(factor.abs().reshape(-1), (0, 1)).amax()
    return power_of_two(largest).clamp(min=torch.finfo(torch.float32).tiny)


linear_divergence.register_autograd(_differentiate, setup_context=_save)


class _Chunk(NamedTuple):
    """A chunk of C tokens whose loss is under way."""

    rows: Any  # slice, or indices [C]
    hidden: Tensor  # [C, H_s]
    logits: Tensor  # [C, V_s], and then their gradient
    result: RowResult
    buffers: tuple[Tensor, Tensor | None]  # of the logits of both sides
    flight: Flight | None  # None: the loss is there


def _sweep(
    sides: Sides,
    valid: Tensor | None,
    labels: Tensor | None,
    shards: Tensor | None,
    factor: Tensor,
    plan: Plan,
    rule: Rule,
    with_stats: bool,
    upstream: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(factor * loss [N], stats, dampings, gradients of upstream * that, summed).

    Where the upstream gradient is not known yet it is taken to be 1, and in fp16 the gradients lack
    `_rests`: a power of two, so that they are rounded once if the loss scale is one, too.

    With a group two chunks of half the size are under way: while the messages of one travel, the
    products of the other are made."""
    student, teacher = sides.student_hidden, sides.teacher_hidden
    n, device = student.shape[0], student.device
    loss = torch.zeros(n, dtype=torch.float32, device=device)
    stats = loss.new_zeros(n if with_stats else 0, len(STATISTICS))
    damped = upstream is None and plan.damped and plan.any_gradient
    dampings = loss.new_ones(n if damped and plan.hidden_gradient else 0)
    d_hidden, d_weight, d_bias = (x.zero_() for x in _empty_gradients(sides, plan))

    counting = None if valid is None else valid.nonzero().flatten()
    count = n if counting is None else len(counting)
    in_flight = 1 if shards is None else 2
    step = min(chunk_rows(plan.chunk_bytes // in_flight, plan.bytes_per_row(sides, shards)), count)
    step = max(step, min(count, 1))
    weight = sides.student_weight.to(plan.student_dtype)
    teacher_weight = sides.teacher_weight
    if teacher_weight is not None:
        teacher_weight = teacher_weight.to(plan.teacher_dtype)
    buffers = [
        (
            weight.new_empty(step, weight.shape[0]),
            None if teacher_weight is None else teacher_weight.new_empty(step, len(teacher_weight)),
        )
        for _ in range(in_flight)
    ]
    scale = factor.expand(n) if upstream is None else factor * upstream
    if damped:
        scale = scale * (plan.room(rule) / _base(factor))

    def begin(start: int) -> _Chunk:
        """The logits of a chunk, and its loss as far as that needs nobody else."""
        end = min(start + step, count)
        rows = slice(start, end) if counting is None else counting[start:end]
        own = buffers.pop()
        logits, teacher_logits = own
        h = student[rows].to(plan.student_dtype)
        s, t = logits[: end - start], teacher[rows]
        _project(h, weight, sides.student_bias, out=s)
        if teacher_weight is not None and teacher_logits is not None:
            hidden, t = t.to(plan.teacher_dtype), teacher_logits[: end - start]
            _project(hidden, teacher_weight, sides.teacher_bias, out=t)
        ids = None if sides.ids is None else sides.ids[rows]
        result = empty_result(s[None], with_stats, ids)
        arguments = s[None], t[None], None, None if labels is None else labels[rows], rule, result
        options: dict[str, Any] = {
            "upstream": scale[rows] if plan.any_gradient else None,
            "gradient": s[None] if plan.any_gradient else None,
            "damped": damped,
        }
        if shards is None or plan.group is None:
            losses_of(plan.backend, ids, rule.vocab_size).forward(*arguments, **options)
            return _Chunk(rows, h, s, result, own, None)
        losses = shard_losses_of(plan.backend, ids, rule.vocab_size, shards, plan.group)
        flight = Flight(losses.steps(*arguments, **options), plan.group)
        return _Chunk(rows, h, s, result, own, flight)

    def finish(chunk: _Chunk) -> None:
        """What is made of the loss and of the gradient of the logits."""
        rows, h, s, result, own, _ = chunk
        loss[rows] = (factor[rows] if factor.dim() else factor) * result.loss
        if with_stats:
            stats[rows] = result.stats
        if plan.hidden_gradient:
            d_hidden[rows] = s @ weight
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
        buffers.append(own)

    under_way: deque[_Chunk] = deque()
    for start in range(0, count, max(step, 1)):
        under_way.append(begin(start))
        while len(under_way) == in_flight or (under_way and start + step >= count):
            chunk = under_way.popleft()
            if chunk.flight is not None and chunk.flight.advance():
                under_way.append(chunk)
            else:
                finish(chunk)
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
        for block in blocks(ds.t()):
            total[block].addmm_(ds[:, block].t().to(total.dtype), wide)


def _add_sum(total: Tensor, ds: Tensor, factor: Tensor | None) -> None:
    """total [V] += sum of ds over the tokens, each times its factor [C, 1] fp32."""
    for block in blocks(ds.t()):
        terms = ds[:, block] if factor is None else ds[:, block] * factor
        total[block] += terms.sum(0, dtype=total.dtype)
