"""The losses as modules, which hold nothing but the options of the functions they call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import functional
from .functional import LossOrPair


class _Loss(torch.nn.Module):
    """A loss with its options fixed; they are those of `function`, and shown in the repr."""

    function: ClassVar[Callable[..., LossOrPair]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = inspect.signature(self.function).parameters.values()
        names = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name != "num_items"]
        unknown = sorted(options.keys() - set(names))
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: expected options among {', '.join(names)}, "
                f"got {', '.join(unknown)}"
            )
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        num_items: int | Tensor | None = None,
    ) -> LossOrPair:
        """The loss of student_logits [..., V_s] against teacher_logits [..., V_t]."""
        return type(self).function(
            student_logits, teacher_logits, labels, num_items=num_items, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class AdaptiveKLLoss(_Loss):
    """`adaptive_kl` as a module; the constructor takes its keyword options but `num_items`.

    Example:
        >>> import torch
        >>> from akl_triton import AdaptiveKLLoss
        >>> loss_function = AdaptiveKLLoss(mu=0.5, temperature=2.0, shift=1)
        >>> student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
        >>> loss_function(student, teacher, labels=torch.zeros(2, 4, dtype=torch.long)).shape
        torch.Size([])
    """

    function = staticmethod(functional.adaptive_kl)


class ForwardKLLoss(_Loss):
    """`forward_kl` as a module; the constructor takes its keyword options but `num_items`.

    Example:
        >>> from akl_triton import ForwardKLLoss
        >>> ForwardKLLoss(temperature=2.0)
        ForwardKLLoss(temperature=2.0)
    """

    function = staticmethod(functional.forward_kl)


class ReverseKLLoss(_Loss):
    """`reverse_kl` as a module; the constructor takes its keyword options but `num_items`.

    Example:
        >>> from akl_triton import ReverseKLLoss
        >>> ReverseKLLoss(reduction="sum")
        ReverseKLLoss(reduction='sum')
    """

    function = staticmethod(functional.reverse_kl)


class MixedKLLoss(_Loss):
    """`mixed_kl` as a module; the constructor takes its keyword options but `num_items`.

    Example:
        >>> from akl_triton import MixedKLLoss
        >>> MixedKLLoss(weight=0.25)
        MixedKLLoss(weight=0.25)
    """

    function = staticmethod(functional.mixed_kl)
