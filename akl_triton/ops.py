"""The operators behind the losses of logits, registered with torch.library, and their autograd.

    akl_triton::divergence                loss of every row, and what its backward needs
    akl_triton::divergence_backward       gradient of the student logits
    akl_triton::divergence_with_gradient  both in one pass, the gradient over the student logits
    akl_triton::rescale                   rows times factors, in place

Logits are [outer, inner, V] with unit stride in V (`as_rows`), N = outer * inner rows. Where ids
[N, k] are given the teacher is pairs: see `BackendOfPairs`. The last arguments are those of
`RULE_SCHEMA`.
"""

from typing import NoReturn

import torch
from torch import Tensor

from .backend import backend_of, losses_of
from .divergences import RULE_SCHEMA, Rule
from .rows import LARGEST_WRITTEN, damping, empty_result, power_of_two, room

# "akl_triton", unless the package has another name: copies of it, as the kernel hub loads them, can
# then stand next to each other in a process.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")


@torch.library.custom_op(
    f"{NAMESPACE}::divergence",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor? ids, Tensor? valid, Tensor? labels, "
    f"bool with_stats, str backend, {RULE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def divergence(student, teacher, ids, valid, labels, with_stats, backend, *rule):  # type: ignore[no-untyped-def]
    """(loss [N], state, stats or no rows of them) in fp32: see layout."""
    result, rule = empty_result(student, with_stats, ids), Rule.unpack(*rule)
    if student.numel():
        losses_of(backend, ids, rule.vocab_size).forward(
            student, teacher, valid, labels, rule, result
        )
    return result


@divergence.register_fake
def _(student, teacher, ids, valid, labels, with_stats, backend, *rule):  # type: ignore[no-untyped-def]
    return empty_result(student, with_stats, ids)


@torch.library.custom_op(
    f"{NAMESPACE}::divergence_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor student, Tensor teacher, Tensor? ids, Tensor? valid, "
    f"Tensor? labels, Tensor state, str backend, {RULE_SCHEMA}) -> Tensor",
)
def divergence_backward(upstream, student, teacher, ids, valid, labels, state, backend, *rule):  # type: ignore[no-untyped-def]
    """upstream [N] * dloss/dstudent, [outer, inner, V_s] in the student's dtype."""
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if student.numel():
        rule = Rule.unpack(*rule)
        losses_of(backend, ids, rule.vocab_size).backward(
            upstream, student, teacher, valid, labels, state, rule, gradient
        )
    return gradient


@divergence_backward.register_fake
def _(upstream, student, *inputs):  # type: ignore[no-untyped-def]
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


@torch.library.custom_op(
    f"{NAMESPACE}::divergence_with_gradient",
    mutates_args=("student",),
    schema="(Tensor(a!) student, Tensor teacher, Tensor? ids, Tensor? valid, Tensor? labels, "
    f"Tensor upstream, bool damped, bool with_stats, str backend, {RULE_SCHEMA})"
    " -> (Tensor, Tensor)",
)
def divergence_with_gradient(  # type: ignore[no-untyped-def]
    student, teacher, ids, valid, labels, upstream, damped, with_stats, backend, *rule
):
    """(loss [N], stats), and upstream [N] * dloss/dstudent written over the student logits.

    `damped` divides that of a row by `damping` of its loss."""
    result, rule = empty_result(student, with_stats, ids), Rule.unpack(*rule)
    if student.numel():
        losses_of(backend, ids, rule.vocab_size).forward(
            student,
            teacher,
            valid,
            labels,
            rule,
            result,
            upstream=upstream,
            gradient=student,
            damped=damped,
        )
    return result.loss, result.stats


@divergence_with_gradient.register_fake
def _(student, teacher, ids, valid, labels, upstream, damped, with_stats, *inputs):  # type: ignore[no-untyped-def]
    loss, _, stats = empty_result(student, with_stats)
    return loss, stats


@torch.library.custom_op(f"{NAMESPACE}::rescale", mutates_args=("rows",))
def rescale(rows: Tensor, factor: Tensor, backend: str) -> None:
    """rows [N, V] *= factor [N], in place."""
    if rows.numel():
        backend_of(backend).rescale(rows, factor)


@rescale.register_fake
def _(rows, factor, backend):  # type: ignore[no-untyped-def]
    return None


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, _, backend, divergence, numbers = inputs
    ctx.options = backend, divergence, numbers
    _, state, stats = output
    ctx.mark_non_differentiable(state, stats)
    ctx.set_materialize_grads(False)  # no zeros for these two
    ctx.save_for_backward(*tensors, state)


def _differentiate(ctx, upstream, _state, _stats):  # type: ignore[no-untyped-def]
    gradient = divergence_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * (5 + len(ctx.options))


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
    def forward(ctx, with_gradient, tensors, factor, rule, with_stats, options, student):  # type: ignore[no-untyped-def]
        """`with_gradient` is the operator that is called with the student, these tensors and
        options, the first of which is the backend."""
        damped = student.dtype == torch.float16
        scale, rest = factor, None  # what the gradient has of the factor, and what it lacks
        if damped:
            # A weight of 0 has no power of two.
            rest = power_of_two(factor).clamp(min=torch.finfo(torch.float32).tiny)
            rest = rest / room(rule.bound, LARGEST_WRITTEN)
            scale = factor / rest
        n = student.shape[0] * student.shape[1]
        loss, stats = with_gradient(
            student, *tensors, scale.expand(n), damped, with_stats, *options, *rule.pack()
        )
        if rest is not None:
            rest = rest * damping(loss)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(student, rest)
        ctx.backend = options[0]
        return loss * factor, stats

    @staticmethod
    def backward(ctx, upstream, _stats):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True; the logits are gone
            refuse()
        gradient, rest = ctx.saved_tensors
        gradient = gradient.detach()
        factor = upstream if rest is None else upstream * rest
        rescale(gradient.view(-1, gradient.shape[-1]), factor, ctx.backend)
        return *[None] * 6, gradient
