"""The losses of logits: one door, `distillation_loss`, and its short names."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias, cast, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import checks, ops, shard_ops, sharding
from .backend import resolve_backend
from .divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    Head,
    JensenShannon,
    MixedKL,
    ReverseKL,
    Rule,
    Ties,
    resolve,
)
from .options import LOSS_OPTIONS, LossOptions, completed, documented, resolved
from .rows import LogitMap, as_rows
from .sparse import SparseTeacher, check_supported


class DivergenceStats(NamedTuple):
    """The quantities that a trainer logs, per token and detached; 0 for tokens that do not count.

    Shape: each as labels, or as the logits without the vocabulary. Dtype: fp32. Unit: nats.
    """

    forward_kl: Tensor  # KL(teacher || student)
    reverse_kl: Tensor  # KL(student || teacher)
    forward_weight: Tensor  # w, the weight of forward_kl; g_head / gap for adaptive_kl
    head_mass: Tensor  # teacher mass of the head; NaN where w is fixed
    head_size: Tensor  # tokens in the head; NaN where w is fixed
    gap: Tensor  # sum |p - q|, twice the total variation
    student_entropy: Tensor  # -sum q ln q
    teacher_entropy: Tensor  # -sum p ln p
    top1_agreement: Tensor  # 1 where some token is a most probable one on both sides, else 0
    cross_entropy: Tensor  # -ln softmax(student)[label] at T = 1; NaN without kd_ratio < 1

    def means(self, valid: Tensor | None = None) -> dict[str, Tensor]:
        """The mean of each over the tokens where `valid` [...] is True, for a logger.

        Example:
            >>> import torch
            >>> from akl_triton import forward_kl
            >>> _, stats = forward_kl(torch.zeros(1, 3), torch.zeros(1, 3), return_stats=True)
            >>> stats.means()["gap"]
            tensor(0.)
        """
        if valid is None:
            return {name: column.mean() for name, column in self._asdict().items()}
        count = valid.sum().clamp(min=1)
        return {
            name: column.where(valid, 0.0).sum() / count for name, column in self._asdict().items()
        }


LossAndStats: TypeAlias = tuple[Tensor, DivergenceStats]


@overload
def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    divergence: Divergence | str = ..., return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    divergence: Divergence | str = ..., return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> LossAndStats: ...  # fmt: skip
@overload
def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    divergence: Divergence | str = ..., return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats: ...  # fmt: skip
@documented(LossOptions)
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | str = AdaptiveKL(),  # noqa: B008 - it is frozen
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    r"""The divergence between teacher and student, reduced over the tokens.

    Math:
        With ``p = softmax(teacher / T)`` and ``q = softmax(student / T)`` the loss of a token is
        what its `divergence` says, a function of p and q. The gradient is with respect to
        student_logits; the teacher gets none. A token of the vocabulary that is -inf on either side
        adds nothing to the KL sums; a row that holds NaN or +inf, or nothing finite, is NaN.

    Args:
        student_logits: ``[..., V_s]``.
        teacher_logits: ``[..., V_t]``; where V_s != V_t, what one side has more is -inf on the
            other. Or a `SparseTeacher`, of k tokens a position.
        labels: ``[...]``. Tokens whose label is ``ignore_index`` count nowhere, and give exactly 0
            loss and gradient whatever their logits hold. Other labels are read only where the loss
            needs them, with ``kd_ratio`` < 1 and for `DKD`: then they have to be tokens.
        divergence: a member of the family, or its name, such as "reverse_kl".
        return_stats: also return `DivergenceStats`.
        {options}

    Shape:
        scalar, or that of labels for "none"; with ``return_stats`` the pair (loss, stats).

    Dtype:
        logits fp32, bf16 or fp16 in any mixture; loss and stats fp32, whose unit is nats; gradient
        in the dtype of ``student_logits``. Computation is fp32, also under autocast. Finite logits
        are exact up to a magnitude of 2^24 * T.

    torch.compile:
        has no graph break. PyTorch makes constants of mu, T and other floats: a schedule of them
        belongs outside of the compiled function, or compiles it anew for every value.

    CUDA graphs:
        a step can be captured once another like it has run: see docs/cuda_graphs.md.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing has been launched or written.
        RuntimeError: the gradient is differentiated, or asked for in forward mode or by
            torch.func (torch.func.vmap works); or, with ``inplace``, it is used twice or
            overwritten before it is used.

    Example:
        >>> import torch
        >>> from akl_triton import AdaptiveKL, distillation_loss
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
        >>> student = torch.zeros(1, 3, requires_grad=True)
        >>> loss = distillation_loss(student, teacher, divergence=AdaptiveKL(mu=0.5))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.2876, torch.Size([1, 3]))
    """
    return _loss(
        "distillation_loss",
        student_logits,
        teacher_logits,
        labels,
        resolve(divergence),
        return_stats,
        options,
    )


class AdaptiveKLOptions(LossOptions, total=False):
    mu: float
    head: Head
    ties: Ties


class MixedKLOptions(LossOptions, total=False):
    alpha: float


class JensenShannonOptions(LossOptions, total=False):
    beta: float


@overload
def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[AdaptiveKLOptions],
) -> Tensor: ...  # fmt: skip
@overload
def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[AdaptiveKLOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LossOptions, AdaptiveKL)
def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[AdaptiveKLOptions],
) -> Tensor | LossAndStats:
    """Adaptive KL divergence: `distillation_loss` of `AdaptiveKL`, whose fields are options here.

    Math:
        ``loss = w forward_kl + (1 - w) reverse_kl``, w per token from where the gap is.

    Reference:
        See `AdaptiveKL`.

    Example:
        >>> import torch
        >>> from akl_triton import adaptive_kl
        >>> round(adaptive_kl(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.2876
    """
    return _loss(
        "adaptive_kl", student_logits, teacher_logits, labels, AdaptiveKL, return_stats, options
    )


@overload
def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LossOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LossOptions, ForwardKL)
def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    """Forward KL divergence, KL(teacher || student): `distillation_loss` of `ForwardKL`.

    Math:
        ``loss = sum_i p_i (ln p_i - ln q_i)``.

    Reference:
        See `ForwardKL`.

    Example:
        >>> import torch
        >>> from akl_triton import forward_kl
        >>> round(forward_kl(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.2662
    """
    return _loss(
        "forward_kl", student_logits, teacher_logits, labels, ForwardKL, return_stats, options
    )


@overload
def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[LossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[LossOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LossOptions, ReverseKL)
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    """Reverse KL divergence, KL(student || teacher): `distillation_loss` of `ReverseKL`.

    Math:
        ``loss = sum_i q_i (ln q_i - ln p_i)``.

    Reference:
        See `ReverseKL`.

    Example:
        >>> import torch
        >>> from akl_triton import reverse_kl
        >>> round(reverse_kl(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.309
    """
    return _loss(
        "reverse_kl", student_logits, teacher_logits, labels, ReverseKL, return_stats, options
    )


@overload
def mixed_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[MixedKLOptions],
) -> Tensor: ...  # fmt: skip
@overload
def mixed_kl(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[MixedKLOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LossOptions, MixedKL)
def mixed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[MixedKLOptions],
) -> Tensor | LossAndStats:
    """Forward and reverse KL with a fixed weight: `distillation_loss` of `MixedKL`.

    Math:
        ``loss = alpha forward_kl + (1 - alpha) reverse_kl``.

    Reference:
        See `MixedKL`.

    Example:
        >>> import torch
        >>> from akl_triton import mixed_kl
        >>> round(mixed_kl(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.2876
    """
    return _loss("mixed_kl", student_logits, teacher_logits, labels, MixedKL, return_stats, options)


@overload
def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[JensenShannonOptions],
) -> Tensor: ...  # fmt: skip
@overload
def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[JensenShannonOptions],
) -> LossAndStats: ...  # fmt: skip
@documented(LossOptions, JensenShannon)
def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher,
    labels: Tensor | None = None,
    *,
    return_stats: bool = False,
    **options: Unpack[JensenShannonOptions],
) -> Tensor | LossAndStats:
    """Generalised Jensen-Shannon divergence: `distillation_loss` of `JensenShannon`.

    Math:
        ``loss = beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``.

    Reference:
        See `JensenShannon`.

    Example:
        >>> import torch
        >>> from akl_triton import jensen_shannon
        >>> round(jensen_shannon(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.0687
    """
    return _loss(
        "jensen_shannon",
        student_logits,
        teacher_logits,
        labels,
        JensenShannon,
        return_stats,
        options,
    )


def _loss(
    function: str,
    student: Tensor,
    teacher: Tensor | SparseTeacher,
    labels: Tensor | None,
    divergence: Divergence | type[Divergence],
    return_stats: bool,
    given: Any,
) -> Tensor | LossAndStats:
    """The body of the losses above; `function` is the one that was called, which for a
    short name gives the class of its divergence."""
    divergence, given = resolved(function, divergence, LOSS_OPTIONS, given)
    options = cast(LossOptions, completed(LOSS_OPTIONS, given))
    checks.check_flag("return_stats", return_stats)
    rule = rule_of(divergence, options)
    inplace, reduction, shift = options["inplace"], options["reduction"], options["shift"]
    if sharding.is_dtensor(student) or sharding.is_dtensor(teacher):
        student, teacher = sharding.local_logits(student, teacher, options)
        labels = sharding.local(labels)
    group = cast("str | None", options["group"])
    ids: Tensor | None = None
    if isinstance(teacher, SparseTeacher):
        checks.check_vocabulary("student_logits", student, sharded=group is not None)
        rule, ids, teacher = of_pairs("teacher_logits", teacher, "student_logits", student, rule)
    else:
        checks.check_logits(student, teacher, sharded=group is not None)
    checks.check_tokens(labels, options["mask"], options["token_weights"], shift, student)
    items = checks.check_num_items(options["num_items"], reduction, student)
    wants_gradient = student.requires_grad and torch.is_grad_enabled()
    if inplace:
        checks.check_inplace(student, teacher)
    elif wants_gradient:
        checks.check_can_be_saved("teacher_logits", teacher if ids is None else ids)
    backend = resolve_backend(options["backend"], student.device.type)

    tokens = student.shape[:-1]
    valid, targets, factor = rows_that_count(tokens, labels, rule, options, items)
    widths = {"student_logits": student.shape[-1]}
    if ids is None:
        widths["teacher_logits"] = teacher.shape[-1]
    shards, vocabulary = sharding.shards_and_vocabulary(
        group, rule, widths, student, teacher, (targets, valid, ids), options["token_weights"],
        reduction=reduction, return_stats=return_stats,
    )  # fmt: skip
    checks.check_targets(labels, options["mask"], rule, options["ignore_index"], vocabulary)
    if ids is not None:
        checks.check_ids(ids, valid, vocabulary)
    rows_s, rows_t = as_rows(student, teacher) if ids is None else (*as_rows(student), teacher)
    inputs: tuple[Tensor | None, ...] = rows_t, ids, valid, targets
    own: tuple[str | None, ...] = (backend,)
    operator, with_gradient = ops.divergence, ops.divergence_with_gradient
    if shards is not None:
        inputs, own = (*inputs, shards), (backend, group)
        operator = shard_ops.shard_divergence
        with_gradient = shard_ops.shard_divergence_with_gradient
    if inplace and wants_gradient:
        # Multiplied, not copied to the device: a copy would wait for it.
        scale = torch.ones((), dtype=torch.float32, device=student.device) * factor
        loss, stats = ops.InPlaceDivergence.apply(  # type: ignore[no-untyped-call]
            with_gradient, inputs, scale, rule, return_stats, own, rows_s
        )
    else:
        loss, _, stats = operator(rows_s, *inputs, return_stats, *own, *rule.pack())
        loss = loss * factor
    loss = loss.view(tokens) if reduction == "none" else loss.sum()
    return (loss, stats_of(stats, tokens)) if return_stats else loss


def rule_of(divergence: Divergence, options: Any) -> Rule:
    """The rule that the options of either door ask for."""
    kd_ratio, temperature = options["kd_ratio"], options["temperature"]
    return Rule(
        divergence,
        temperature,
        LogitMap(options["student_softcap"], options["student_logit_scale"]),
        LogitMap(options["teacher_softcap"], options["teacher_logit_scale"]),
        divergence_weight=kd_ratio * (temperature**2 if options["scale_by_t2"] else 1.0),
        label_weight=1.0 - kd_ratio,
        vocab_size=options["vocab_size"],
    )


def of_pairs(
    name: str, teacher: SparseTeacher, student_name: str, student: Tensor, rule: Rule
) -> tuple[Rule, Tensor, Tensor]:
    """The rule, the ids [N, k] and the entries [1, N, k + 1] of a teacher that is pairs."""
    check_supported(rule.divergence, teacher.outside)
    if rule.temperature != teacher.temperature:
        raise ValueError(
            f"temperature: expected {teacher.temperature:g}, that of the teacher's pairs, got "
            f"{rule.temperature:g}; store log-probabilities of that temperature"
        )
    if rule.teacher_map != LogitMap():
        raise ValueError(
            "teacher_softcap, teacher_logit_scale: expected None and 1 with a SparseTeacher, whose "
            f"log_probs have them, got {rule.teacher_map.softcap} and {rule.teacher_map.scale:g}"
        )
    if teacher.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: expected the leading dimensions of {student_name}, "
            f"{list(student.shape[:-1])}, got a SparseTeacher of {list(teacher.shape)}"
        )
    checks.check_device(name, teacher.ids, student, student_name)
    k = teacher.ids.shape[-1]
    entries = teacher.entries().reshape(1, -1, k + 1)
    return (
        rule._replace(rest=teacher.outside != "renormalise"),
        teacher.ids.reshape(-1, k).contiguous(),
        entries.contiguous(),
    )


def stats_of(columns: Tensor, tokens: torch.Size) -> DivergenceStats:
    """The operators' [N, columns of layout.STATISTICS] in the shape of the tokens."""
    return DivergenceStats(*(column.view(tokens) for column in columns.unbind(1)))


def rows_that_count(
    tokens: torch.Size,
    labels: Tensor | None,
    rule: Rule,
    options: Any,
    num_items: float | Tensor | None,
) -> tuple[Tensor | None, Tensor | None, float | Tensor]:
    """[N] bool, or None where all rows count; [N] labels, or None where the loss needs none; and
    what the loss of a row is multiplied by: a number, [] or [N]."""
    shift, ignored, weights = options["shift"], options["ignore_index"], options["token_weights"]
    valid = targets = None
    if labels is not None:
        labels = shifted(labels, shift, ignored)
        valid = labels != ignored
        if rule.needs_labels:
            targets = labels.reshape(-1)
    if options["mask"] is not None:
        mask = shifted(options["mask"], shift, False)
        valid = mask if valid is None else valid & mask
    if shift and valid is None:
        valid = shifted(torch.ones_like(weights, dtype=torch.bool), shift, False)
    factor = _of_reduction(tokens, valid, options["reduction"], num_items)
    if weights is not None:
        weights = shifted(weights.float(), shift, 0.0)
        # The weight of an ignored token does not matter, not even if it is NaN.
        factor = factor * (weights if valid is None else weights.where(valid, 0.0)).reshape(-1)
    return None if valid is None else valid.reshape(-1), targets, factor


def shifted(of_tokens: Tensor, shift: int, value: float) -> Tensor:
    """The tensor moved by `shift` positions towards the start, filled with `value` at the end."""
    if not shift:
        return of_tokens
    # Padded before it is cut: a sequence may be shorter than the shift, or of symbolic length.
    return torch.nn.functional.pad(of_tokens, (0, shift), value=value)[..., shift:]


def _of_reduction(
    tokens: torch.Size,
    valid: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
) -> float | Tensor:
    """The factor by which the reduction multiplies the loss of every row, without a host sync."""
    if reduction != "mean":
        return 1.0
    if isinstance(num_items, Tensor):
        return num_items.reciprocal()
    if num_items is not None:
        return 1.0 / num_items
    if valid is None:
        # torch.Size.numel() would be an int, and fix the batch of an exported program.
        return 1.0 / max(math.prod(tokens), 1)
    return valid.sum().clamp(min=1).float().reciprocal()
