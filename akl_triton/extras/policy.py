"""Policy gradient with a divergence to a reference model. See `kl_regularised_policy_loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

import akl_triton

from .. import checks
from .arguments import (
    REDUCTIONS,
    Reduction,
    check_constant,
    check_like,
    check_mask,
    check_values,
    described,
    reduced,
)

Penalty: TypeAlias = Literal["forward_kl", "reverse_kl"] | Callable[[Tensor, Tensor], Tensor]
PENALTIES = ("forward_kl", "reverse_kl")


class PolicyStats(NamedTuple):
    """The two terms of the loss per token, detached, fp32; 0 for tokens that do not count."""

    policy_loss: Tensor  # -A ln pi
    penalty: Tensor  # the divergence, without its coefficient


@overload
def kl_regularised_policy_loss(
    log_probs: Tensor, advantages: Tensor, student_logits: Tensor, reference_logits: Tensor, *,
    coefficient: float, penalty: Penalty = ..., mask: Tensor | None = ...,
    reduction: Reduction = ..., return_stats: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def kl_regularised_policy_loss(
    log_probs: Tensor, advantages: Tensor, student_logits: Tensor, reference_logits: Tensor, *,
    coefficient: float, penalty: Penalty = ..., mask: Tensor | None = ...,
    reduction: Reduction = ..., return_stats: Literal[True],
) -> tuple[Tensor, PolicyStats]: ...  # fmt: skip
@overload
def kl_regularised_policy_loss(
    log_probs: Tensor, advantages: Tensor, student_logits: Tensor, reference_logits: Tensor, *,
    coefficient: float, penalty: Penalty = ..., mask: Tensor | None = ...,
    reduction: Reduction = ..., return_stats: bool,
) -> Tensor | tuple[Tensor, PolicyStats]: ...  # fmt: skip
def kl_regularised_policy_loss(
    log_probs: Tensor,
    advantages: Tensor,
    student_logits: Tensor,
    reference_logits: Tensor,
    *,
    coefficient: float,
    penalty: Penalty = "reverse_kl",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PolicyStats]:
    r"""Policy gradient of sampled tokens, and a divergence that keeps the policy near a reference.

    Math:
        With ``pi = softmax(student_logits)``, the reference ``p = softmax(reference_logits)``, the
        sampled token a and its advantage A, a token's loss is::

            loss = -A ln pi(a) + coefficient D(pi, p)
            D = sum_i p_i (ln p_i - ln pi_i)         "forward_kl", KL(reference || policy)
            D = sum_i pi_i (ln pi_i - ln p_i)        "reverse_kl", KL(policy || reference)

        D is summed over the whole vocabulary. The estimators of D from the sampled token alone have
        a variance that this one lacks, and some a gradient that is not the divergence's.

        The loss needs no kernel of its own. D is one of this library's losses with
        ``reduction="none"``, in which the reference is the teacher, and the first term has one
        number a token.

    Args:
        log_probs: ``[...]``, ln pi(a) of the sampled tokens, with their graph, such as
            ``-F.cross_entropy(student_logits, a, reduction="none")``. Where the tokens come from an
            older policy pass the importance ratio ``exp(ln pi(a) - ln pi_old(a))``, clipped or not,
            in their place.
        advantages: ``[...]``, A of each sampled token, a constant.
        student_logits: ``[..., V]`` of the policy.
        reference_logits: ``[..., V]``; no gradient.
        coefficient: >= 0, the weight of D.
        penalty: which D, or a callable that takes (student_logits, reference_logits) and returns
            its own per token, ``[...]``, such as
            ``functools.partial(akl_triton.adaptive_kl, reduction="none")``.
        mask: ``[...]``, bool, True for the tokens that count, those of the completion. The others
            have exactly 0 loss, and 0 gradient whatever they hold, unless a callable penalty has an
            infinite derivative there.
        reduction: "none" (shape of log_probs), "sum", or "mean" over the tokens that count.
        return_stats: also return `PolicyStats`.

    Shape:
        scalar, or that of log_probs for "none"; with ``return_stats`` the pair (loss, stats).

    Dtype:
        logits fp32, bf16 or fp16 in any mixture; log_probs and advantages any floating dtype; loss
        fp32; gradients in the dtype of their input.

    Raises:
        ValueError, TypeError: an argument is not as above, or the penalty returns something else.

    Reference:
        Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
        Learning", 1992; Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv
        1909.08593, for the penalty.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from akl_triton.extras import kl_regularised_policy_loss
        >>> reference = torch.tensor([[2.0, 1.0, 0.0]])
        >>> policy = torch.zeros(1, 3, requires_grad=True)
        >>> log_probs = -F.cross_entropy(policy, torch.tensor([1]), reduction="none")
        >>> advantages = torch.tensor([1.0])
        >>> loss, stats = kl_regularised_policy_loss(
        ...     log_probs, advantages, policy, reference, coefficient=0.5, return_stats=True
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 4), round(stats.penalty.item(), 4)
        (1.2531, 0.309)
    """
    check_values("log_probs", log_probs)
    check_values("advantages", advantages)
    check_like("advantages", advantages, log_probs, "log_probs")
    check_constant("advantages", advantages)
    _check_logits(student_logits, reference_logits, log_probs)
    coefficient = checks.check_number("coefficient", coefficient)
    if coefficient < 0.0:
        raise ValueError(f"coefficient: expected a number >= 0, got {coefficient}")
    if not callable(penalty):
        checks.check_choice("penalty", penalty, PENALTIES)
    counted = check_mask("mask", mask, log_probs, "log_probs")
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_flag("return_stats", return_stats)

    policy_loss = -torch.where(counted, advantages.float(), 0.0) * torch.where(
        counted, log_probs.float(), 0.0
    )
    divergence = _penalty(penalty, student_logits, reference_logits, counted)
    loss = reduced(policy_loss + coefficient * divergence, counted, reduction)
    if not return_stats:
        return loss
    return loss, PolicyStats(policy_loss.detach(), divergence.detach())


def _check_logits(student: Tensor, reference: Tensor, log_probs: Tensor) -> None:
    """Logits of both models for each sampled token."""
    for name, logits in (("student_logits", student), ("reference_logits", reference)):
        checks.check_tensor(name, logits)
        if logits.dtype not in checks.LOGIT_DTYPES:
            raise TypeError(
                f"{name}: expected float32 or bfloat16 or float16, got {described(logits)}"
            )
        if logits.dim() == 0 or logits.shape[:-1] != log_probs.shape or logits.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected {[*log_probs.shape, 'V']}, logits for each of log_probs, got "
                f"{described(logits)}"
            )
        checks.check_device(name, logits, log_probs, "log_probs")
    check_constant("reference_logits", reference)


def _penalty(penalty: Penalty, student: Tensor, reference: Tensor, counted: Tensor) -> Tensor:
    """[...] D of the tokens that count, fp32"""
    if not callable(penalty):
        loss = akl_triton.forward_kl if penalty == "forward_kl" else akl_triton.reverse_kl
        labels = torch.where(counted, 0, -100)
        divergence: Tensor = loss(student, reference, labels, reduction="none")
        return divergence
    given = penalty(student, reference)
    checks.check_tensor("penalty", given)
    if given.shape != counted.shape:
        raise ValueError(
            f"penalty: expected a callable that returns {list(counted.shape)}, a divergence for "
            f'each token (reduction="none"), got one that returns {described(given)}'
        )
    return torch.where(counted, given.float(), 0.0)
