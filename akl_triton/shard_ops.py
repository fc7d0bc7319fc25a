"""The operators behind the losses of logits whose vocabulary is sharded, as those of ops.py.

    akl_triton::shard_divergence                loss of every row, and what its backward needs
    akl_triton::shard_divergence_backward       gradient of this rank's columns; nothing is sent
    akl_triton::shard_divergence_with_gradient  both, the gradient over the student logits

Logits are this rank's columns; shards [R, 2] int64, on the CPU, are the numbers of columns of all
ranks of the group of that name, on both sides. The others are the arguments of ops.py.
"""

import torch

from .backend import shard_losses_of
from .divergences import RULE_SCHEMA, Rule
from .ops import NAMESPACE, refuse
from .rows import empty_result

# They wait for the other ranks: no CUDA graph may capture them.
WAITS = torch.Tag.cudagraph_unsafe


@torch.library.custom_op(
    f"{NAMESPACE}::shard_divergence",
    mutates_args=(),
    tags=WAITS,
    schema="(Tensor student, Tensor teacher, Tensor? ids, Tensor? valid, Tensor? labels, "
    f"Tensor shards, bool with_stats, str backend, str group, {RULE_SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
)
def shard_divergence(  # type: ignore[no-untyped-def]
    student, teacher, ids, valid, labels, shards, with_stats, backend, group, *rule
):
    """(loss [N], state, stats or no rows of them) in fp32: see layout."""
    result, rule = empty_result(student, with_stats, ids), Rule.unpack(*rule)
    if len(result.loss):
        shard_losses_of(backend, ids, rule.vocab_size, shards, group).forward(
            student, teacher, valid, labels, rule, result
        )
    return result


@shard_divergence.register_fake
def _(student, teacher, ids, valid, labels, shards, with_stats, *options):  # type: ignore[no-untyped-def]
    return empty_result(student, with_stats, ids)


@torch.library.custom_op(
    f"{NAMESPACE}::shard_divergence_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor student, Tensor teacher, Tensor? ids, Tensor? valid, "
    "Tensor? labels, Tensor shards, Tensor state, str backend, str group, "
    f"{RULE_SCHEMA}) -> Tensor",
)
def shard_divergence_backward(  # type: ignore[no-untyped-def]
    upstream, student, teacher, ids, valid, labels, shards, state, backend, group, *rule
):
    """upstream [N] * dloss/dstudent, [outer, inner, W_s] in the student's dtype."""
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if student.numel():
        rule = Rule.unpack(*rule)
        shard_losses_of(backend, ids, rule.vocab_size, shards, group).backward(
            upstream, student, teacher, valid, labels, state, rule, gradient
        )
    return gradient


@shard_divergence_backward.register_fake
def _(upstream, student, *inputs):  # type: ignore[no-untyped-def]
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


@torch.library.custom_op(
    f"{NAMESPACE}::shard_divergence_with_gradient",
    mutates_args=("student",),
    tags=WAITS,
    schema="(Tensor(a!) student, Tensor teacher, Tensor? ids, Tensor? valid, Tensor? labels, "
    "Tensor shards, Tensor upstream, bool damped, bool with_stats, str backend, str group, "
    f"{RULE_SCHEMA}) -> (Tensor, Tensor)",
)
def shard_divergence_with_gradient(  # type: ignore[no-untyped-def]
    student, teacher, ids, valid, labels, shards, upstream, damped, with_stats, backend, group,
    *rule,
):  # fmt: skip
    """(loss [N], stats), and upstream [N] * dloss/dstudent written over the student logits.

    `damped` divides that of a row by `damping` of its loss."""
    result, rule = empty_result(student, with_stats, ids), Rule.unpack(*rule)
    if len(result.loss):
        shard_losses_of(backend, ids, rule.vocab_size, shards, group).forward(
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


@shard_divergence_with_gradient.register_fake
def _(student, teacher, ids, valid, labels, shards, upstream, damped, with_stats, *inputs):  # type: ignore[no-untyped-def]
    loss, _, stats = empty_result(student, with_stats)
    return loss, stats


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, _, backend, group, divergence, numbers = inputs
    ctx.options = backend, group, divergence, numbers
    _, state, stats = output
    ctx.mark_non_differentiable(state, stats)
    ctx.set_materialize_grads(False)  # no zeros for these two
    ctx.save_for_backward(*tensors, state)


def _differentiate(ctx, upstream, _state, _stats):  # type: ignore[no-untyped-def]
    gradient = shard_divergence_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * (6 + len(ctx.options))


shard_divergence.register_autograd(_differentiate, setup_context=_save)
shard_divergence_backward.register_autograd(refuse)
