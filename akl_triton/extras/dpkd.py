"""Preference for the teacher's outputs over the student's. See `dpkd_loss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def dpkd_loss(
    student_chosen_logps: Tensor,
    student_rejected_logps: Tensor,
    teacher_chosen_logps: Tensor,
    teacher_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    length_normalised: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Direct preference knowledge distillation: prefer the teacher's output to the student's.

    Math:
        Of a prompt x there are two outputs, the chosen y_t, which the teacher wrote, and the
        rejected y_s, which the student wrote. With the student q and the teacher p::

            reward(y) = beta ln(q(y | x) / p(y | x)) = beta sum_i (ln q(y_i) - ln p(y_i))
            loss = -ln sigmoid(reward(y_t) - reward(y_s))

        This is the loss of DPO with the teacher in the place of the reference model: beta is the
        weight of KL(student || teacher) in the objective whose optimum has this reward. With
        ``length_normalised`` the sum over i is a mean over the tokens of that output.

        The loss needs no kernel. Of each position it takes one log-probability, which
        ``-F.cross_entropy(logits, labels, reduction="none")`` computes, and everything after that
        is a few numbers a sequence.

    Args:
        student_chosen_logps: ``[..., L_t]``, ln q of the tokens of y_t.
        student_rejected_logps: ``[..., L_s]``, ln q of the tokens of y_s. For the authors' script,
            which compares the likeliest token of either model at each position, pass outputs of one
            token: all four ``[..., L, 1]``.
        teacher_chosen_logps: ``[..., L_t]``, ln p of the tokens of y_t; no gradient.
        teacher_rejected_logps: ``[..., L_s]``, ln p of the tokens of y_s; no gradient.
        beta: > 0, above.
        chosen_mask, rejected_mask: ``[..., L_t]`` and ``[..., L_s]``, bool, True for the tokens of
            the output. The others (prompt, padding) have exactly 0 gradient whatever they hold. A
            pair whose chosen or rejected output has no token does not count, and has 0 loss.
        length_normalised: so that a long output weighs no more than a short one.
        reduction: "none" (a loss for each pair), "sum", or "mean" over the pairs that count.

    Shape:
        scalar, or that of the log-probabilities without their last dimension for "none".

    Dtype:
        any floating dtypes; loss fp32; gradients in the dtype of their input. The sums are fp32.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Reference:
        Li et al., "Direct Preference Knowledge Distillation for Large Language Models", arXiv
        2406.19774, and ``dpkd/main.py`` in microsoft/LMOps (``get_distil_loss``).

    Example:
        >>> import torch
        >>> from akl_triton.extras import dpkd_loss
        >>> student_chosen = torch.tensor([[-2.0, -2.0]], requires_grad=True)
        >>> teacher_chosen = torch.tensor([[-0.5, -0.5]])
        >>> student_rejected, teacher_rejected = torch.tensor([[-0.5]]), torch.tensor([[-4.0]])
        >>> loss = dpkd_loss(
        ...     student_chosen, student_rejected, teacher_chosen, teacher_rejected, beta=1.0
        ... )
        >>> loss.backward()  # a step makes both chosen tokens likelier
        >>> round(loss.item(), 4), bool((student_chosen.grad < 0).all())
        (6.5015, True)
    """
    sides = {
        "student_chosen_logps": student_chosen_logps,
        "student_rejected_logps": student_rejected_logps,
        "teacher_chosen_logps": teacher_chosen_logps,
        "teacher_rejected_logps": teacher_rejected_logps,
    }
    for name, logps in sides.items():
        check_values(name, logps)
        if logps.dim() == 0:
            raise ValueError(
                f"{name}: expected [..., L], an entry for each token of an output, got "
                f"{described(logps)}"
            )
    for output in ("chosen", "rejected"):
        name, of = f"teacher_{output}_logps", f"student_{output}_logps"
        check_like(name, sides[name], sides[of], of)
        check_constant(name, sides[name])
    if student_rejected_logps.shape[:-1] != student_chosen_logps.shape[:-1]:
        raise ValueError(
            "student_rejected_logps: expected the leading dimensions of student_chosen_logps, "
            f"{list(student_chosen_logps.shape[:-1])}, for a pair of outputs of each prompt, got "
            f"{described(student_rejected_logps)}"
        )
    checks.check_device(
        "student_rejected_logps",
        student_rejected_logps,
        student_chosen_logps,
        "student_chosen_logps",
    )
    beta = checks.check_number("beta", beta, above=0.0)
    chosen = check_mask("chosen_mask", chosen_mask, student_chosen_logps, "student_chosen_logps")
    rejected = check_mask(
        "rejected_mask", rejected_mask, student_rejected_logps, "student_rejected_logps"
    )
    checks.check_flag("length_normalised", length_normalised)
    checks.check_choice("reduction", reduction, REDUCTIONS)

    margin = _log_ratio(
        student_chosen_logps, teacher_chosen_logps, chosen, length_normalised
    ) - _log_ratio(student_rejected_logps, teacher_rejected_logps, rejected, length_normalised)
    counted = chosen.any(dim=-1) & rejected.any(dim=-1)
    loss = torch.where(counted, -F.logsigmoid(beta * margin), 0.0)
    return reduced(loss, counted, reduction)


def _log_ratio(student: Tensor, teacher: Tensor, mask: Tensor, length_normalised: bool) -> Tensor:
    """[...] sum over the tokens of an output of ln q - ln p, or their mean"""
    # Each side on its own: inf - inf under the mask would have a gradient of NaN.
    student, teacher = (torch.where(mask, side.float(), 0.0) for side in (student, teacher))
    total = (student - teacher).sum(dim=-1)
    return total / mask.sum(dim=-1).clamp(min=1) if length_normalised else total
