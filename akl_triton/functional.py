"""The losses as functions: checks, the tokens that count, the reduction. See `adaptive_kl`."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import checks, ops

Head: TypeAlias = Literal["exclusive", "inclusive"]
Ties: TypeAlias = Literal["stable", "average"]
Reduction: TypeAlias = Literal["none", "sum", "mean"]
Backend: TypeAlias = Literal["auto", "triton", "torch"]

HEADS = ("exclusive", "inclusive")
TIES = ("stable", "average")
REDUCTIONS = ("none", "sum", "mean")
BACKENDS = ("auto", "triton", "torch")
# What the options of the head are where there is none: they mean nothing.
WITHOUT_HEAD: tuple[float, Head, Ties] = (0.5, "exclusive", "stable")


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


# Tensor, or (Tensor, DivergenceStats) with return_stats; a union would have every caller narrow it.
LossOrPair: TypeAlias = Any


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    inplace: bool = False,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    r"""Adaptive KL divergence: forward and reverse KL, weighted per token by where the gap is.

    Math:
        With ``p = softmax(teacher / T)``, ``q = softmax(student / T)`` and the head H, the top of
        the teacher's sorted mass::

            forward_kl = sum_i p_i (ln p_i - ln q_i)       reverse_kl = sum_i q_i (ln q_i - ln p_i)
            w = sum_{i in H} |p_i - q_i| / sum_i |p_i - q_i|           (1/2 where p = q)
            loss = w forward_kl + (1 - w) reverse_kl

        w is a constant of the backward pass. ``head="exclusive"``: H is the longest prefix of the
        vocabulary, sorted by teacher logit, whose mass is <= mu, and always the first token;
        ``"inclusive"``: the shortest prefix whose mass is >= mu. Equal logits at the boundary:
        ``ties="stable"`` takes the lowest indices first, ``"average"`` gives each of the n of which
        k fit the weight k / n. Either side's logits are ``softcap tanh(logit_scale x / softcap)``
        of what is passed, x (without a softcap: ``logit_scale x``), which keeps the order of x: the
        head is that of the teacher's x. The gradient is with respect to x. A token that is -inf on
        either side adds nothing to the KL sums; a row that holds NaN or +inf, or nothing finite, is
        NaN.

    Args:
        student_logits: ``[..., V_s]``.
        teacher_logits: ``[..., V_t]``; where V_s != V_t, what one side has more is -inf on the
            other.
        labels: ``[...]``, only compared with ``ignore_index``: such tokens count nowhere, and give
            exactly 0 loss and gradient whatever their logits hold.
        mu: teacher mass of the head, in (0, 1).
        temperature: T > 0 of both distributions.
        student_softcap, teacher_softcap: of models that cap their logits (Gemma 2: 30), where
            what is passed is not capped yet.
        student_logit_scale, teacher_logit_scale: of models that scale their logits (Cohere's
            ``logit_scale``, 1 / Granite's ``logits_scaling``), where they are not scaled yet.
        head, ties: the rules above.
        ignore_index: the label of tokens that do not count.
        shift: compare the logits of position i with label i + shift (1: next-token labels as in
            the batch); the last positions then have no label and do not count, in a sequence of
            no more than ``shift`` tokens none does.
        reduction: "none" (shape of labels), "sum", or "mean" over the tokens that count.
        num_items: replaces that count in the mean: a number or a 0-d tensor >= 0 (on a GPU not
            checked: that would wait for it), the tokens of all micro-batches of a step. 0, where
            all of these are ignored, is taken as 1, and gives 0.
        scale_by_t2: multiply loss and gradient by T^2 (Hinton et al., arXiv 1503.02531).
        inplace: compute the gradient in the forward pass into the storage of ``student_logits``,
            which are consumed: whatever else reads them must have done so. Only where a gradient
            is needed; one backward pass.
        return_stats: also return ``DivergenceStats``.
        backend: "auto" is "triton" where it can run, else "torch".

    Shape:
        scalar, or that of labels for "none"; with ``return_stats`` the pair (loss, stats).

    Dtype:
        logits fp32, bf16 or fp16 in any mixture; loss and stats fp32, whose unit is nats; gradient
        in the dtype of ``student_logits``. Computation is fp32, also under autocast. Finite logits
        are exact up to a magnitude of 2^24 * T.

    torch.compile:
        has no graph break. PyTorch makes constants of mu, T and other floats: a schedule of them
        belongs outside of the compiled function, or compiles it anew for every value.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing has been launched or written.
        RuntimeError: the gradient is differentiated, or asked for in forward mode or by
            torch.func (torch.func.vmap works); or, with ``inplace``, it is used twice or
            overwritten before it is used.

    Reference:
        Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
        Language Models", arXiv 2404.02657, section 4 (adaptive KL) and the authors' ``AKL.py``.

    Example:
        >>> import torch
        >>> from akl_triton import adaptive_kl
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
        >>> student = torch.zeros(1, 3, requires_grad=True)
        >>> loss = adaptive_kl(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.2876, torch.Size([1, 3]))
    """
    return _divergence(
        student_logits,
        teacher_logits,
        labels,
        rule_of(
            mu,
            head,
            ties,
            None,
            temperature,
            student_softcap,
            teacher_softcap,
            student_logit_scale,
            teacher_logit_scale,
        ),
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        num_items=num_items,
        scale_by_t2=scale_by_t2,
        inplace=inplace,
        return_stats=return_stats,
        backend=backend,
    )


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    inplace: bool = False,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    """Forward KL divergence, KL(teacher || student): `mixed_kl` with weight 1.

    Math:
        ``loss = sum_i p_i (ln p_i - ln q_i)``; symbols, arguments, shapes, dtypes and errors are
        those of `adaptive_kl`.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Example:
        >>> import torch
        >>> from akl_triton import forward_kl
        >>> round(forward_kl(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.2662
    """
    return mixed_kl(
        student_logits,
        teacher_logits,
        labels,
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
        inplace=inplace,
        return_stats=return_stats,
        backend=backend,
    )


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    inplace: bool = False,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    """Reverse KL divergence, KL(student || teacher): `mixed_kl` with weight 0.

    Math:
        ``loss = sum_i q_i (ln q_i - ln p_i)``; symbols, arguments, shapes, dtypes and errors are
        those of `adaptive_kl`.

    Reference:
        Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543.

    Example:
        >>> import torch
        >>> from akl_triton import reverse_kl
        >>> round(reverse_kl(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.309
    """
    return mixed_kl(
        student_logits,
        teacher_logits,
        labels,
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
        inplace=inplace,
        return_stats=return_stats,
        backend=backend,
    )


def mixed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    inplace: bool = False,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> LossOrPair:
    """Forward and reverse KL with the same fixed weight for every token.

    Math:
        ``loss = weight forward_kl + (1 - weight) reverse_kl``; symbols, the other arguments,
        shapes, dtypes and errors are those of `adaptive_kl`. 0.5 is the Jeffreys divergence halved.

    Args:
        weight: in [0, 1], of the forward KL.

    Reference:
        The FKL + RKL baseline of Wu et al., arXiv 2404.02657.

    Example:
        >>> import torch
        >>> from akl_triton import mixed_kl
        >>> round(mixed_kl(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
        0.2876
    """
    return _divergence(
        student_logits,
        teacher_logits,
        labels,
        rule_of(
            *WITHOUT_HEAD,
            weight,
            temperature,
            student_softcap,
            teacher_softcap,
            student_logit_scale,
            teacher_logit_scale,
        ),
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        num_items=num_items,
        scale_by_t2=scale_by_t2,
        inplace=inplace,
        return_stats=return_stats,
        backend=backend,
    )


def rule_of(
    mu: float,
    head: Head,
    ties: Ties,
    weight: float | None,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
) -> ops.Rule:
    """The checked options that make a loss of a token."""
    checks.check_choice("head", head, HEADS)
    checks.check_choice("ties", ties, TIES)
    if weight is not None:
        weight = checks.check_number("weight", weight, above=0.0, below=1.0, closed=True)
    student_map = checks.check_logit_map("student", student_softcap, student_logit_scale)
    teacher_map = checks.check_logit_map("teacher", teacher_softcap, teacher_logit_scale)
    return ops.Rule(
        mu=checks.check_number("mu", mu, above=0.0, below=1.0),
        temperature=checks.check_number("temperature", temperature, above=0.0),
        head=head,
        ties=ties,
        weight=weight,
        student_softcap=student_map[0],
        teacher_softcap=teacher_map[0],
        student_logit_scale=student_map[1],
        teacher_logit_scale=teacher_map[1],
    )


def _divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    rule: ops.Rule,
    *,
    ignore_index: int,
    shift: int,
    reduction: Reduction,
    num_items: float | Tensor | None,
    scale_by_t2: bool,
    inplace: bool,
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
    checks.check_flag("inplace", inplace)
    checks.check_logits(student, teacher)
    checks.check_labels(labels, student, shift)
    items = checks.check_num_items(num_items, reduction, student)
    if inplace:
        checks.check_inplace(student, teacher)
    elif student.requires_grad and torch.is_grad_enabled():
        checks.check_can_be_saved("teacher_logits", teacher)
    chosen = ops.resolve_backend(backend, student.device.type)

    tokens = student.shape[:-1]
    valid = None if labels is None else valid_tokens(labels, ignore_index, shift)
    factor = row_factor(tokens, valid, reduction, items)
    if scale_by_t2:
        factor = factor * rule.temperature**2
    rows_s, rows_t = ops.as_rows(student, teacher)

    if inplace and student.requires_grad and torch.is_grad_enabled():
        # Multiplied, not copied to the device: a copy would wait for it.
        scale = torch.ones((), dtype=torch.float32, device=student.device) * factor
        loss, stats = ops.InPlaceDivergence.apply(  # type: ignore[no-untyped-call]
            rows_s, rows_t, valid, scale, rule, return_stats, chosen
        )
    else:
        loss, _, stats = ops.divergence(rows_s, rows_t, valid, *rule, return_stats, chosen)
        loss = loss * factor
    loss = loss.view(tokens) if reduction == "none" else loss.sum()
    if return_stats:
        return loss, DivergenceStats(*(column.view(tokens) for column in stats.unbind(1)))
    return loss


def check_options(
    *,
    ignore_index: object,
    shift: object,
    reduction: object,
    scale_by_t2: object,
    return_stats: object,
    backend: object,
) -> tuple[int, int]:
    """Check the options that all losses have and no divergence depends on: (ignore_index, shift)"""
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("backend", backend, BACKENDS)
    checks.check_flag("scale_by_t2", scale_by_t2)
    checks.check_flag("return_stats", return_stats)
    return checks.check_integer("ignore_index", ignore_index), checks.check_shift(shift)


def valid_tokens(labels: Tensor, ignore_index: int, shift: int) -> Tensor:
    """[N] bool: the tokens whose label, `shift` positions on, is not ignored."""
    if shift:
        # Padded before it is cut: a sequence may be shorter than the shift, or of symbolic length.
        labels = torch.nn.functional.pad(labels, (0, shift), value=ignore_index)[..., shift:]
    return (labels != ignore_index).reshape(-1)


def row_factor(
    tokens: torch.Size,
    valid: Tensor | None,
    reduction: Reduction,
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
