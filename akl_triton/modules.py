"""The losses as modules, which hold nothing but the options of the functions they call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import checks, functional, linear
from .functional import LossOrPair


class _Options(torch.nn.Module):
    """A loss with its options fixed; they are those of `function`, and shown in the repr."""

    function: ClassVar[Callable[..., LossOrPair]]
    of_a_call: ClassVar[tuple[str, ...]]  # keywords that are not options

    def __init__(self, **options: Any) -> None:
        super().__init__()
        defaults = {
            p.name: p.default
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in self.of_a_call
        }
        unknown = sorted(options.keys() - defaults.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: expected options among {', '.join(defaults)}, "
                f"got {', '.join(unknown)}"
            )
        _check(**(defaults | options))
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check(
    *,
    mu: float = 0.5,
    head: functional.Head = "exclusive",
    ties: functional.Ties = "stable",
    weight: float | None = None,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    inplace: bool = False,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    **common: Any,
) -> None:
    """Check the options of any loss, here where they are given: a call comes after both models."""
    functional.rule_of(
        mu, head, ties, weight, temperature,
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale,
    )  # fmt: skip
    functional.check_options(**common)
    checks.check_flag("inplace", inplace)
    linear.check_plan(chunk_bytes, accum_dtype)


class _Loss(_Options):
    """A loss of logits."""

    of_a_call = ("num_items",)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
    ) -> LossOrPair:
        """The loss of student_logits [..., V_s] against teacher_logits [..., V_t]."""
        return type(self).function(
            student_logits, teacher_logits, labels, num_items=num_items, **self.options
        )


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


class _LinearLoss(_Options):
    """A loss of hidden states and the weights of both heads, which stay with their models."""

    of_a_call = ("student_bias", "teacher_bias", "num_items")

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> LossOrPair:
        """The loss of hidden [..., H] @ weight [V, H]^T + bias [V], student against teacher."""
        return type(self).function(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            num_items=num_items,
            **self.options,
        )


class LinearAdaptiveKLLoss(_LinearLoss):
    """`linear_adaptive_kl` as a module; the constructor takes its options, the call the tensors.

    Example:
        >>> import torch
        >>> from akl_triton import LinearAdaptiveKLLoss
        >>> loss_function = LinearAdaptiveKLLoss(temperature=2.0, student_softcap=30.0)
        >>> hidden, weight = torch.randn(2, 4, 8), torch.randn(50, 8)
        >>> loss_function(hidden, weight, hidden, weight).shape
        torch.Size([])
    """

    function = staticmethod(linear.linear_adaptive_kl)


class LinearForwardKLLoss(_LinearLoss):
    """`linear_forward_kl` as a module; the constructor takes its options, the call the tensors.

    Example:
        >>> from akl_triton import LinearForwardKLLoss
        >>> LinearForwardKLLoss(chunk_bytes=2**26)
        LinearForwardKLLoss(chunk_bytes=67108864)
    """

    function = staticmethod(linear.linear_forward_kl)


class LinearReverseKLLoss(_LinearLoss):
    """`linear_reverse_kl` as a module; the constructor takes its options, the call the tensors.

    Example:
        >>> from akl_triton import LinearReverseKLLoss
        >>> LinearReverseKLLoss(shift=1)
        LinearReverseKLLoss(shift=1)
    """

    function = staticmethod(linear.linear_reverse_kl)


class LinearMixedKLLoss(_LinearLoss):
    """`linear_mixed_kl` as a module; the constructor takes its options, the call the tensors.

    Example:
        >>> from akl_triton import LinearMixedKLLoss
        >>> LinearMixedKLLoss(weight=0.25)
        LinearMixedKLLoss(weight=0.25)
    """

    function = staticmethod(linear.linear_mixed_kl)
