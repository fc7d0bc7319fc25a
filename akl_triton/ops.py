"""The operators behind the API, registered with torch.library: both backends, one autograd formula.

    akl_triton::divergence                loss of every row, and what its backward needs
    akl_triton::divergence_backward       gradient of the student logits
    akl_triton::divergence_with_gradient  both in one pass, the gradient over the student logits
    akl_triton::rescale                   rows times factors, in place

Logits are [outer, inner, V] with unit stride in V (`as_rows`), N = outer * inner rows.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import eager
from .kernels.layout import STATE_WIDTH, STATISTICS
from .rows import LogitMap, RowResult, damping, power_of_two, room

TRITON, TORCH = "triton", "torch"


def triton_obstacle(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device; None if they can."""
    try:
        from triton import knobs
        from triton.runtime import driver
    except ImportError:
        return "triton is not installed"
    if knobs.runtime.interpret:
        return None
    try:
        runs_on = driver.active.get_active_torch_device().type
    except RuntimeError:
        return "triton finds no GPU (TRITON_INTERPRET=1 interprets the kernels on CPU tensors)"
    return None if runs_on == device_type else f"triton runs on {runs_on}, not on {device_type}"


def resolve_backend(backend: str, device_type: str) -> str:
    """The backend that `backend` means for tensors of this device; ValueError if it cannot run."""
    if backend == TORCH:
        return TORCH
    obstacle = triton_obstacle(device_type)
    if obstacle is None:
        return TRITON
    if backend == TRITON:
        raise ValueError(f"backend: expected one that can run here, got 'triton', but {obstacle}")
    return TORCH


# What torch.compiler.assume_constant_result does, which would import all of torch._dynamo.
resolve_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_rows(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """Both [..., V] as [outer, inner, V] with unit stride in V: views wherever strides allow it.

    A batch of sequences, sliced or not, is a view; a copy is made of logits whose last dimension is
    not contiguous or whose leading dimensions need more than two strides."""
    both = [
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (student, teacher)
    ]
    if any(x.dim() == 3 and not _merges(x) for x in both):
        return both
    return [x.reshape(1, -1, x.shape[-1]) for x in both]


def _merges(x: Tensor) -> bool:
    """Whether the rows of [outer, inner, V] are evenly spaced."""
    return x.stride(0) == x.stride(1) * x.shape[1] or 1 in x.shape[:2]


# A gradient in fp16 that is written before its loss scale is known uses the whole range of fp16: no
# loss scale could bring back what is lost below it, and a row of 32,000 tokens has probabilities
# there. Rows are divided by `damping`, a bound of what they hold, and multiplied by `room`.
LARGEST_WRITTEN = 2.0**14
# Temporaries of work in fp32 on tensors of another dtype.
BLOCK_BYTES = 4 * 2**20


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of x that are small in fp32: on a CPU a conversion goes through a temporary."""
    step = max(BLOCK_BYTES // max(4 * x[:1].numel(), 1), 1)
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


class Rule(NamedTuple):
    """The numbers that every loss computes with, in the order of the operators' arguments."""

    mu: float
    temperature: float
    head: str
    ties: str
    weight: float | None  # of the forward KL; None: adaptive
    student_softcap: float | None
    teacher_softcap: float | None
    student_logit_scale: float
    teacher_logit_scale: float

    @property
    def rate(self) -> float:
        """The most that the derivative of a scaled logit is, by the student's own."""
        return self.student_logit_scale / self.temperature

    @property
    def student_map(self) -> LogitMap:
        return LogitMap(self.student_softcap, self.student_logit_scale)

    @property
    def teacher_map(self) -> LogitMap:
        return LogitMap(self.teacher_softcap, self.teacher_logit_scale)


@torch.library.custom_op("akl_triton::divergence", mutates_args=())
def divergence(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    mu: float,
    temperature: float,
    head: str,
    ties: str,
    weight: float | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    with_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N], state [N, 8], stats [N, 6] or [0, 6]) in fp32."""
    result = empty_result(student, with_stats)
    rule = Rule(
        mu, temperature, head, ties, weight,
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale,
    )  # fmt: skip
    forward_rows(student, teacher, valid, result, rule, backend)
    return result


@divergence.register_fake
def _(student, *inputs):  # type: ignore[no-untyped-def]
    return empty_result(student, with_stats=inputs[-2])


@torch.library.custom_op("akl_triton::divergence_backward", mutates_args=())
def divergence_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    state: Tensor,
    temperature: float,
    weight: float | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    backend: str,
) -> Tensor:
    """upstream [N] * dloss/dstudent, [outer, inner, V_s] in the student's dtype."""
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if student.numel() == 0:
        return gradient
    if backend == TRITON:
        from .kernels import launch

        launch.backward(
            gradient,
            student,
            teacher,
            valid,
            state,
            upstream,
            temperature=temperature,
            reverse=weight != 1.0,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
        )
    else:
        eager.backward(
            upstream,
            student,
            teacher,
            valid,
            state,
            temperature=temperature,
            out=gradient,
            student_map=LogitMap(student_softcap, student_logit_scale),
            teacher_map=LogitMap(teacher_softcap, teacher_logit_scale),
        )
    return gradient


@divergence_backward.register_fake
def _(upstream, student, *inputs):  # type: ignore[no-untyped-def]
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


@torch.library.custom_op("akl_triton::divergence_with_gradient", mutates_args=("student",))
def divergence_with_gradient(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    upstream: Tensor,
    mu: float,
    temperature: float,
    head: str,
    ties: str,
    weight: float | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    damped: bool,
    with_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [N], stats), and upstream [N] * dloss/dstudent written over the student logits.

    `damped` divides that of a row by `damping` of its loss."""
    result = empty_result(student, with_stats)
    rule = Rule(
        mu, temperature, head, ties, weight,
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale,
    )  # fmt: skip
    forward_rows(student, teacher, valid, result, rule, backend, upstream, damped)
    return result.loss, result.stats


@divergence_with_gradient.register_fake
def _(student, *inputs):  # type: ignore[no-untyped-def]
    loss, _, stats = empty_result(student, with_stats=inputs[-2])
    return loss, stats


@torch.library.custom_op("akl_triton::rescale", mutates_args=("rows",))
def rescale(rows: Tensor, factor: Tensor, backend: str) -> None:
    """rows [N, V] *= factor [N], in place."""
    if rows.numel() == 0:
        return
    if backend == TRITON:
        from .kernels import launch

        launch.rescale(rows, factor)
    else:
        for block in blocks(rows):
            rows[block].mul_(factor[block, None])


@rescale.register_fake
def _(rows, factor, backend):  # type: ignore[no-untyped-def]
    return None


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    student, teacher, valid, *options, _, backend = inputs
    rule = Rule(*options)
    _, state, stats = output
    ctx.mark_non_differentiable(state, stats)
    ctx.save_for_backward(student, teacher, valid, state)
    ctx.options = rule.temperature, *rule[4:], backend


def _differentiate(ctx, upstream, _state, _stats):  # type: ignore[no-untyped-def]
    gradient = divergence_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * (4 + len(Rule._fields))


def refuse(*_: object) -> NoReturn:
    raise RuntimeError(
        "akl_triton: the losses cannot be differentiated twice (their gradient has no backward)"
    )


divergence.register_autograd(_differentiate, setup_context=_save)
divergence_backward.register_autograd(refuse)


class InPlaceDivergence(torch.autograd.Function):
    """loss * factor, whose gradient is left in the student logits' storage.

    The factor is in that gradient, so that an upstream gradient of 1 leaves nothing to do. In fp16
    it is there up to a power of two, as is all that backward multiplies by if the loss scale is
    one: the gradient is rounded once."""

    @staticmethod
    def forward(ctx, student, teacher, valid, factor, rule, *options):  # type: ignore[no-untyped-def]
        damped = student.dtype == torch.float16
        scale, rest = factor, None  # what the gradient has of the factor, and what it lacks
        if damped:
            rest = power_of_two(factor) / room(rule.rate, LARGEST_WRITTEN)
            scale = factor / rest
        n = student.shape[0] * student.shape[1]
        loss, stats = divergence_with_gradient(
            student, teacher, valid, scale.expand(n), *rule, damped, *options
        )
        if rest is not None:
            rest = rest * damping(loss)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(student, rest)
        ctx.backend = options[-1]
        return loss * factor, stats

    @staticmethod
    def backward(ctx, upstream, _stats):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True; the logits are gone
            refuse()
        gradient, rest = ctx.saved_tensors
        gradient = gradient.detach()
        factor = upstream if rest is None else upstream * rest
        rescale(gradient.view(-1, gradient.shape[-1]), factor, ctx.backend)
        return gradient, *[None] * 6


def empty_result(student: Tensor, with_stats: bool) -> RowResult:
    n, device = student.shape[0] * student.shape[1], student.device
    return RowResult(
        torch.empty(n, dtype=torch.float32, device=device),
        torch.empty(n, STATE_WIDTH, dtype=torch.float32, device=device),
        torch.empty(n if with_stats else 0, len(STATISTICS), dtype=torch.float32, device=device),
    )


def forward_rows(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    result: RowResult,
    rule: Rule,
    backend: str,
    upstream: Tensor | None = None,
    damped: bool = False,
) -> None:
    """Fill `result`; with `upstream`, write the gradient over the student logits (`damped`: as in
    `divergence_with_gradient`)."""
    if student.numel() == 0:
        return
    loss, state, stats = result
    if backend == TRITON:
        from .kernels import launch

        launch.forward(
            student,
            teacher,
            valid,
            loss,
            state if upstream is None else None,
            stats if len(stats) else None,
            mu=rule.mu,
            temperature=rule.temperature,
            inclusive=rule.head == "inclusive",
            stable=rule.ties == "stable",
            weight=rule.weight,
            student_softcap=rule.student_softcap,
            teacher_softcap=rule.teacher_softcap,
            student_logit_scale=rule.student_logit_scale,
            teacher_logit_scale=rule.teacher_logit_scale,
            gradient=None if upstream is None else student,
            upstream=upstream,
            damped=damped,
        )
        return
    options: dict[str, Any] = {
        **dict(zip(Rule._fields[:5], rule, strict=False)),
        "student_map": rule.student_map,
        "teacher_map": rule.teacher_map,
    }
    if upstream is None:
        result_of_rows = eager.forward(student, teacher, valid, **options)
    else:
        result_of_rows = eager.forward_with_gradient(
            student, teacher, valid, upstream, **options, out=student, damped=damped
        )
    loss.copy_(result_of_rows.loss)
    state.copy_(result_of_rows.state)
    if len(stats):
        stats.copy_(result_of_rows.stats)
