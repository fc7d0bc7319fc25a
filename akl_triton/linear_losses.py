"""The losses of hidden states: one door, `linear_distillation_loss`, and its short names."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import checks, sharding
from .backend import resolve_backend
from .divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    Head,
    JensenShannon,
    MixedKL,
    ReverseKL,
    Ties,
    resolve,
)
from .linear_ops import Plan, Sides, default_chunk_bytes, is_late, linear_divergence
from .losses import LossAndStats, of_pairs, rows_that_count, rule_of, stats_of
from .options import LINEAR_LOSS_OPTIONS, LinearLossOptions, completed, documented, resolved
from .sparse import SparseTeacher


@overload
def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    divergence: Divergence | str = ..., return_stats: Literal[False] = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    divergence: Divergence | str = ..., return_stats: Literal[True],
    **options: Unpack[LinearLossOptions],
) -> LossAndStats: ...  # fmt: skip
@overload
def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    divergence: Divergence | str = ..., return_stats: bool,
    **options: Unpack[LinearLossOptions],
) -> Tensor | LossAndStats: ...  # fmt: skip
@documented(LinearLossOptions)
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | str = AdaptiveKL(),  # noqa: B008 - it is frozen
    return_stats: bool = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor | LossAndStats:
    """`distillation_loss` of ``hidden @ weight.T + bias``, by the chunk.

    Math:
        ``distillation_loss(student_hidden @ student_weight.T + student_bias, teacher_hidden @
        teacher_weight.T + teacher_bias, labels, ...)``. The chunk changes the result by rounding
        alone, and equal chunks give equal bits.

    Args:
        student_hidden: ``[..., H_s]``, what the model's lm_head is applied to.
        student_weight: ``[V_s, H_s]``, the weight of the lm_head, also where it is the embedding.
        teacher_hidden, teacher_weight: ``[..., H_t]``, ``[V_t, H_t]``. Or a `SparseTeacher` in the
            place of teacher_hidden, and no weight: nothing of the teacher is then projected.
        labels: ``[...]``; the tokens that they ignore are left out of the products and cost
            nothing.
        divergence: a member of the family, or its name, such as "reverse_kl".
        return_stats: also return `DivergenceStats`.
        {options}

    Memory beyond inputs and gradients: the chunk, and the sum of the weight's gradient, ``V_s H_s``
    of accum_dtype, where the weight requires grad; under torch.no_grad() the chunk alone. Autocast
    copies a weight of another dtype to its own, here as in every product: a frozen teacher's should
    have it. With ``reduction="none"`` and a weight or bias that requires grad, backward computes
    the logits once more; in every other case the weights are not needed after the forward pass.
    With labels, a mask or a shift, the number of tokens that count is read once, before the first
    product, which waits for the device and cannot be captured in a CUDA graph
    (docs/cuda_graphs.md).

    Where the call is right as it stands:
        in one process, with a plain lm_head whose softcap and scale, if any, are passed, and with
        ``num_items`` where gradients are accumulated. Outside of the model's forward,
        DistributedDataParallel reduces no gradient of the lm_head, and an adapter on it is not
        seen: `akl_triton.integrations.distillation_loss_of_models` computes the loss in the place
        of the lm_head, within the forward.

    Sharded parameters:
        FSDP2 and ZeRO-3 hold parts of the weight, and these are refused: FSDP2's are DTensors as
        those of a tensor-parallel lm_head are (docs/vocabulary_parallel.md), but the ranks have
        other tokens. Call the loss in the ``forward`` of the module that owns the lm_head, and let
        that module gather it: ``fully_shard(model)`` does for every parameter that no submodule of
        its own wraps (do not wrap ``lm_head``); ZeRO-3 does after
        ``deepspeed.zero.register_external_parameter(model, model.lm_head.weight)``. A frozen
        weight may also be passed as ``weight.full_tensor()``.

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
        Hsu et al., "Liger Kernel", arXiv 2410.10989, section 3.2 (the gradient in the forward pass,
        chunk by chunk).

    Example:
        >>> import torch
        >>> from akl_triton import linear_distillation_loss
        >>> student, teacher = torch.nn.Linear(8, 50), torch.nn.Linear(16, 50).requires_grad_(False)
        >>> hidden, teacher_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
        >>> loss = linear_distillation_loss(
        ...     hidden, student.weight, teacher_hidden, teacher.weight, divergence="forward_kl"
        ... )
        >>> loss.backward()
        >>> student.weight.grad.shape
        torch.Size([50, 8])
    """
    return _loss(
        "linear_distillation_loss",
        (student_hidden, student_weight, options.get("student_bias")),
        (teacher_hidden, teacher_weight, options.get("teacher_bias")),
        labels,
        resolve(divergence),
        return_stats,
        options,
    )


class LinearAdaptiveKLOptions(LinearLossOptions, total=False):
    mu: float
    head: Head
    ties: Ties


class LinearMixedKLOptions(LinearLossOptions, total=False):
    alpha: float


class LinearJensenShannonOptions(LinearLossOptions, total=False):
    beta: float


@overload
def linear_adaptive_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearAdaptiveKLOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_adaptive_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LinearAdaptiveKLOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LinearLossOptions, AdaptiveKL)
def linear_adaptive_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[LinearAdaptiveKLOptions],
) -> Tensor | LossAndStats:
    """`adaptive_kl` of ``hidden @ weight.T + bias``: `linear_distillation_loss` of `AdaptiveKL`.

    Math:
        ``loss = w forward_kl + (1 - w) reverse_kl``, w per token from where the gap is.

    Reference:
        See `AdaptiveKL` and `linear_distillation_loss`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_adaptive_kl
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_adaptive_kl(hidden, weight, hidden, weight).item()
        0.0
    """
    return _loss(
        "linear_adaptive_kl",
        (student_hidden, student_weight, options.get("student_bias")),
        (teacher_hidden, teacher_weight, options.get("teacher_bias")),
        labels,
        AdaptiveKL,
        return_stats,
        options,
    )


@overload
def linear_forward_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_forward_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LinearLossOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LinearLossOptions, ForwardKL)
def linear_forward_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor | LossAndStats:
    """`forward_kl` of ``hidden @ weight.T + bias``: `linear_distillation_loss` of `ForwardKL`.

    Math:
        ``loss = sum_i p_i (ln p_i - ln q_i)``.

    Reference:
        See `ForwardKL` and `linear_distillation_loss`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_forward_kl
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_forward_kl(hidden, weight, hidden, weight).item()
        0.0
    """
    return _loss(
        "linear_forward_kl",
        (student_hidden, student_weight, options.get("student_bias")),
        (teacher_hidden, teacher_weight, options.get("teacher_bias")),
        labels,
        ForwardKL,
        return_stats,
        options,
    )


@overload
def linear_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LinearLossOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LinearLossOptions, ReverseKL)
def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor | LossAndStats:
    """`reverse_kl` of ``hidden @ weight.T + bias``: `linear_distillation_loss` of `ReverseKL`.

    Math:
        ``loss = sum_i q_i (ln q_i - ln p_i)``.

    Reference:
        See `ReverseKL` and `linear_distillation_loss`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_reverse_kl
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_reverse_kl(hidden, weight, hidden, weight).item()
        0.0
    """
    return _loss(
        "linear_reverse_kl",
        (student_hidden, student_weight, options.get("student_bias")),
        (teacher_hidden, teacher_weight, options.get("teacher_bias")),
        labels,
        ReverseKL,
        return_stats,
        options,
    )


@overload
def linear_mixed_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearMixedKLOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_mixed_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LinearMixedKLOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LinearLossOptions, MixedKL)
def linear_mixed_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[LinearMixedKLOptions],
) -> Tensor | LossAndStats:
    """`mixed_kl` of ``hidden @ weight.T + bias``: `linear_distillation_loss` of `MixedKL`.

    Math:
        ``loss = alpha forward_kl + (1 - alpha) reverse_kl``.

    Reference:
        See `MixedKL` and `linear_distillation_loss`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_mixed_kl
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_mixed_kl(hidden, weight, hidden, weight).item()
        0.0
    """
    return _loss(
        "linear_mixed_kl",
        (student_hidden, student_weight, options.get("student_bias")),
        (teacher_hidden, teacher_weight, options.get("teacher_bias")),
        labels,
        MixedKL,
        return_stats,
        options,
    )


@overload
def linear_jensen_shannon(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearJensenShannonOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_jensen_shannon(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None, labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LinearJensenShannonOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LinearLossOptions, JensenShannon)
def linear_jensen_shannon(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | SparseTeacher,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[LinearJensenShannonOptions],
) -> Tensor | LossAndStats:
    """`jensen_shannon` of ``hidden @ weight.T + bias``, for `linear_distillation_loss`.

    Math:
        ``loss = beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``.

    Reference:
        See `JensenShannon` and `linear_distillation_loss`.

    Example:
        >>> import torch
        >>> from akl_triton import linear_jensen_shannon
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
        >>> linear_jensen_shannon(hidden, weight, hidden, weight).item()
        0.0
    """
    return _loss(
        "linear_jensen_shannon",
        (student_hidden, student_weight, options.get("student_bias")),
        (teacher_hidden, teacher_weight, options.get("teacher_bias")),
        labels,
        JensenShannon,
        return_stats,
        options,
    )


def _loss(
    function: str,
    of_student: tuple[Tensor, Tensor, Tensor | None],
    of_teacher: tuple[Tensor | SparseTeacher, Tensor | None, Tensor | None],
    labels: Tensor | None,
    divergence: Divergence | type[Divergence],
    return_stats: bool,
    given: Any,
) -> Tensor | LossAndStats:
    """The body of the losses above; `function` is the one that was called, which for a
    short name gives the class of its divergence."""
    divergence, given = resolved(function, divergence, LINEAR_LOSS_OPTIONS, given)
    options = cast(LinearLossOptions, completed(LINEAR_LOSS_OPTIONS, given))
    checks.check_flag("return_stats", return_stats)
    rule = rule_of(divergence, options)
    reduction, shift = options["reduction"], options["shift"]
    chunk_bytes = options["chunk_bytes"]
    sums_itself = sharding.is_dtensor(of_student[0])
    if sharding.is_dtensor(of_student[1]) or sharding.is_dtensor(of_teacher[1]):
        of_student, of_teacher = sharding.local_projections(of_student, of_teacher, options)
        labels = sharding.local(labels)
    group = cast("str | None", options["group"])
    student, student_weight, student_bias = of_student
    checks.check_tensor("student_hidden", student)
    autocast = _autocast_dtype(student.device.type)
    is_sharded = group is not None
    checks.check_projection("student", *of_student, student, autocast is not None, is_sharded)
    teacher, teacher_weight, teacher_bias = of_teacher
    ids: Tensor | None = None
    if isinstance(teacher, SparseTeacher):
        checks.check_no_projection(teacher_weight, teacher_bias)
        rule, ids, entries = of_pairs("teacher_hidden", teacher, "student_hidden", student, rule)
        teacher = entries[0]
    else:
        checks.check_projection(
            "teacher", teacher, *of_teacher[1:], student, autocast is not None, is_sharded
        )
    if group is not None and not sums_itself:
        student = sharding.summed_gradient(student, group)
    sides = Sides(student, *of_student[1:], teacher, teacher_weight, teacher_bias, ids)
    of_tokens = labels, options["mask"], options["token_weights"]
    checks.check_tokens(*of_tokens, shift, student, of="student_hidden")
    items = checks.check_num_items(options["num_items"], reduction, student, of="student_hidden")
    differentiable = torch.is_grad_enabled()
    plan = Plan(
        student_dtype=autocast or student.dtype,
        teacher_dtype=autocast or teacher.dtype,
        accum_dtype=options["accum_dtype"],
        chunk_bytes=default_chunk_bytes(student.device) if chunk_bytes is None else chunk_bytes,
        hidden_gradient=differentiable and checks.wants_gradient(student),
        weight_gradient=differentiable and checks.wants_gradient(student_weight),
        bias_gradient=differentiable
        and student_bias is not None
        and checks.wants_gradient(student_bias),
        backend=resolve_backend(options["backend"], student.device.type),
        group=group,
    )
    checks.check_chunk(plan.chunk_bytes, plan.bytes_per_row(sides))
    per_token = reduction == "none"
    if is_late(plan, per_token):
        for name, tensor in sides._asdict().items():
            if tensor is not None:
                checks.check_can_be_saved(name, tensor)

    tokens = student.shape[:-1]
    valid, targets, factor = rows_that_count(tokens, labels, rule, options, items)
    widths = {"student_weight": len(student_weight)}
    if teacher_weight is not None:
        widths["teacher_weight"] = len(teacher_weight)
    shards, vocabulary = sharding.shards_and_vocabulary(
        group, rule, widths, student, teacher, (targets, valid, ids), options["token_weights"],
        are_hidden=True, reduction=reduction, return_stats=return_stats,
        chunk_bytes=plan.chunk_bytes,
    )  # fmt: skip
    checks.check_targets(labels, options["mask"], rule, options["ignore_index"], vocabulary)
    if ids is not None:
        checks.check_ids(ids, valid, vocabulary)
    rows = sides._replace(
        student_hidden=student.reshape(-1, student.shape[-1]),
        teacher_hidden=teacher.reshape(-1, teacher.shape[-1]),
    )
    # Multiplied, not copied to the device: a copy would wait for it.
    scale = torch.ones((), dtype=torch.float32, device=student.device) * factor
    loss, stats, *_ = linear_divergence(
        per_token, return_stats, *rows, valid, targets, shards, scale, *plan, *rule.pack()
    )
    if per_token:
        loss = loss.view(tokens)
    return (loss, stats_of(stats, tokens)) if return_stats else loss


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast computes products here; None outside autocast."""
    # torch.amp.is_autocast_available would break a graph of PyTorch before 2.12.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
