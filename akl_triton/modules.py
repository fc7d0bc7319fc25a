"""The losses as modules, which hold nothing but a divergence and the options of a door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.nn.modules.loss import _Loss
from typing_extensions import Unpack

from .divergences import AdaptiveKL, Divergence, resolve
from .linear_losses import linear_distillation_loss
from .losses import AdaptiveKLOptions, LossAndStats, distillation_loss
from .options import (
    LINEAR_LOSS_OPTIONS,
    LOSS_OPTIONS,
    RETURN_STATS,
    LinearLossOptions,
    LossOptions,
    Option,
    Reduction,
    resolved,
)
from .sparse import SparseTeacher


class _DivergenceLoss(_Loss):
    """Checks its divergence and options when it is made: a call comes after both models have run.

    The reduction is an attribute, as in the losses of PyTorch."""

    def __init__(
        self,
        divergence: Divergence | type[Divergence],
        table: Mapping[str, Option],
        given: Mapping[str, Any],
    ) -> None:
        known = {name: option for name, option in table.items() if option.check is not None}
        known["return_stats"] = RETURN_STATS
        member, options = resolved(type(self).__name__, divergence, known, given)
        super().__init__(reduction=options.pop("reduction", "mean"))
        self.divergence = member
        self.return_stats: bool = options.pop("return_stats")
        self.options = options

    def extra_repr(self) -> str:
        options = {
            **self.options,
            "reduction": self.reduction,
            "return_stats": self.return_stats,
        }
        return f"{self.divergence}, " + ", ".join(f"{k}={v!r}" for k, v in options.items())


class DistillationLoss(_DivergenceLoss):
    """`distillation_loss` as a module; the call takes the tensors, ``mask``, ``token_weights``
    and ``num_items``.

    Args:
        divergence: a member of the family, or its name, such as "reverse_kl".
        return_stats: also return `DivergenceStats`.
        options: those of `distillation_loss`.

    Example:
        >>> import torch
        >>> from akl_triton import DistillationLoss, ReverseKL
        >>> loss_function = DistillationLoss(ReverseKL(), temperature=2.0, shift=1)
        >>> student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
        >>> loss_function(student, teacher, labels=torch.zeros(2, 4, dtype=torch.long)).shape
        torch.Size([])
    """

    def __init__(
        self,
        divergence: Divergence | str = AdaptiveKL(),  # noqa: B008 - it is frozen
        *,
        return_stats: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        given = {"return_stats": return_stats, **options}
        super().__init__(resolve(divergence), LOSS_OPTIONS, given)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseTeacher,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | LossAndStats:
        """The loss of student_logits [..., V_s] against teacher_logits [..., V_t] or pairs."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            divergence=self.divergence,
            mask=mask,
            token_weights=token_weights,
            num_items=num_items,
            return_stats=self.return_stats,
            reduction=cast(Reduction, self.reduction),
            **self.options,
        )


class AdaptiveKLLoss(DistillationLoss):
    """`DistillationLoss` of `AdaptiveKL`, whose fields are options here, as in `adaptive_kl`.

    Example:
        >>> from akl_triton import AdaptiveKLLoss
        >>> AdaptiveKLLoss(mu=0.8, temperature=2.0).divergence
        AdaptiveKL(mu=0.8, head='exclusive', ties='stable')
    """

    def __init__(self, *, return_stats: bool = False, **options: Unpack[AdaptiveKLOptions]) -> None:
        given = {"return_stats": return_stats, **options}
        _DivergenceLoss.__init__(self, AdaptiveKL, LOSS_OPTIONS, given)


class LinearDistillationLoss(_DivergenceLoss):
    """`linear_distillation_loss` as a module; the call takes the tensors, which stay with their
    models, ``mask``, ``token_weights`` and ``num_items``.

    Args:
        divergence: a member of the family, or its name, such as "reverse_kl".
        return_stats: also return `DivergenceStats`.
        options: those of `linear_distillation_loss`, but for the biases.

    Example:
        >>> import torch
        >>> from akl_triton import AdaptiveKL, LinearDistillationLoss
        >>> loss_function = LinearDistillationLoss(AdaptiveKL(), student_softcap=30.0)
        >>> hidden, weight = torch.randn(2, 4, 8), torch.randn(50, 8)
        >>> loss_function(hidden, weight, hidden, weight).shape
        torch.Size([])
    """

    def __init__(
        self,
        divergence: Divergence | str = AdaptiveKL(),  # noqa: B008 - it is frozen
        *,
        return_stats: bool = False,
        **options: Unpack[LinearLossOptions],
    ) -> None:
        given = {"return_stats": return_stats, **options}
        super().__init__(resolve(divergence), LINEAR_LOSS_OPTIONS, given)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | SparseTeacher,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | LossAndStats:
        """The loss of hidden [..., H] @ weight [V, H]^T + bias [V], student against teacher; pairs
        take the place of the teacher's hidden states, and have no weight."""
        return linear_distillation_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            divergence=self.divergence,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            mask=mask,
            token_weights=token_weights,
            num_items=num_items,
            return_stats=self.return_stats,
            reduction=cast(Reduction, self.reduction),
            **self.options,
        )
