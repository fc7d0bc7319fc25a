"""Sinkhorn distance between the tokens of a batch. See `sinkd_loss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .arguments import REDUCTIONS, Reduction, check_mask, reduced

# Elements of the buffer that the backward pass of torch.cdist may allocate: 256 MiB in fp32.
BUFFER = 2**26


def sinkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Sinkhorn distance between the student's and the teacher's tokens, as one batch.

    Math:
        With ``p_j = softmax(teacher_j / T)``, ``q_i = softmax(student_i / T)`` and the N tokens
        that count::

            D_ij = sum_v |q_iv - p_jv|                                        cost, [N, N]
            K = exp(-D / epsilon), then `iterations` times
                K_ij <- K_ij / sum_j K_ij,    K_ij <- K_ij / sum_i K_ij       plan
            loss_i = sum_j K_ij D_ij

        The rows and columns of the plan K sum to 1, so that the mean of loss_i is the entropic
        transport cost between the uniform distributions over the two sets of tokens. It compares
        the sets: a student with the right distributions at the wrong positions has almost no loss,
        so that it is added to cross-entropy or a KL divergence, not used alone. Like the authors,
        we differentiate through the iterations; they are computed on ln K, so that a cost which is
        large compared with epsilon does not underflow.

        The loss needs no kernel. A token's loss depends on all other tokens, so that it cannot be
        computed row by row, and the N^2 V operations of ``torch.cdist`` outweigh the two softmaxes
        that a kernel could fuse. Choose N accordingly: the tokens of a batch of short answers, or a
        sample of those of a long one, which `mask` selects.

    Args:
        student_logits: ``[..., V_s]``.
        teacher_logits: ``[..., V_t]``; where V_s != V_t, what one side has more has probability 0
            on the other.
        mask: ``[...]``, bool, True for the tokens that count. The others have exactly 0 loss and
            gradient whatever their logits hold, and are in no plan.
        temperature: T > 0 of both distributions.
        epsilon: > 0, the weight of the entropy of the plan. The smaller it is, the nearer the loss
            is to the unregularised transport, and the more iterations it takes to converge.
        iterations: >= 1, of a normalisation of the rows and one of the columns.
        reduction: "none" (shape of mask), "sum", or "mean" over the tokens that count.

    Shape:
        scalar, or that of the logits without the vocabulary for "none".

    Dtype:
        logits fp32, bf16 or fp16 in any mixture; loss fp32; gradient in the dtype of
        ``student_logits``. Two fp32 probability tensors ``[N, V]`` are kept for the backward pass,
        and 2 ``iterations`` plans ``[N, N]``. With a mask the number of tokens becomes a shape,
        which on a GPU waits for it.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Reference:
        Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation", arXiv 2402.17110,
        the batch-wise form, and the authors' ``loss.py``, whose temperature, epsilon and number of
        iterations are the defaults here.

    Example:
        >>> import torch
        >>> from akl_triton.extras import sinkd_loss
        >>> teacher = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> student = teacher.flip(0).requires_grad_()  # the right tokens, in the wrong order
        >>> per_token = sinkd_loss(student, teacher, reduction="none")
        >>> per_token.shape, bool((per_token < 1e-3).all())
        (torch.Size([2]), True)
        >>> sinkd_loss(student, teacher, mask=torch.tensor([True, False])).item() > 1.0
        True
    """
    checks.check_logits(student_logits, teacher_logits)
    tokens = student_logits[..., 0]
    counted = check_mask("mask", mask, tokens, "student_logits without the vocabulary")
    temperature = checks.check_number("temperature", temperature, above=0.0)
    epsilon = checks.check_number("epsilon", epsilon, above=0.0)
    iterations = checks.check_integer("iterations", iterations)
    if iterations < 1:
        raise ValueError(f"iterations: expected an integer >= 1, got {iterations}")
    checks.check_choice("reduction", reduction, REDUCTIONS)

    width = max(student_logits.shape[-1], teacher_logits.shape[-1])
    q, p = (
        _probabilities(logits if mask is None else logits[counted], temperature, width)
        for logits in (student_logits, teacher_logits)
    )
    cost = _cost(q, p)
    log_plan = -cost / epsilon
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True)
    of_counted = (log_plan.exp() * cost).sum(dim=1)
    loss = of_counted.new_zeros(counted.shape).masked_scatter(counted, of_counted)
    return reduced(loss, counted, reduction)


def _probabilities(logits: Tensor, temperature: float, width: int) -> Tensor:
    """[N, width] fp32, with probability 0 for what this side lacks."""
    rows = logits.reshape(-1, logits.shape[-1]).float()
    return F.pad(torch.softmax(rows / temperature, dim=-1), (0, width - rows.shape[1]))


def _cost(q: Tensor, p: Tensor) -> Tensor:
    """[N, N] sum_v |q_iv - p_jv|

    On a GPU the backward pass of torch.cdist allocates as many elements as it compares pairs of
    probabilities; taken a few rows at a time it reuses the same memory."""
    rows = max(1, BUFFER // max(1, p.numel()))
    return torch.cat([torch.cdist(some, p, p=1.0) for some in torch.split(q, rows)])
