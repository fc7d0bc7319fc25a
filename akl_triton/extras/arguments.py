"""The checks and the reduction that all functions of this package share."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .. import checks

Reduction: TypeAlias = Literal["none", "sum", "mean"]
REDUCTIONS = ("none", "sum", "mean")


def check_values(name: str, value: Tensor) -> None:
    """A floating tensor with an entry per token."""
    checks.check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {described(value)}")


def check_like(name: str, value: Tensor, other: Tensor, of: str) -> None:
    """The shape and device of another argument, which is called `of`."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {of}, {list(other.shape)}, got {described(value)}"
        )
    checks.check_device(name, value, other, of)


def check_constant(name: str, value: Tensor) -> None:
    """No gradient flows into this argument, so none may be asked for."""
    if checks.wants_gradient(value):
        raise ValueError(
            f"{name}: expected a tensor that does not require grad (compute it under "
            f"torch.no_grad() or pass {name}.detach()), got {described(value)} with "
            "requires_grad=True"
        )


def check_mask(name: str, mask: Tensor | None, other: Tensor, of: str) -> Tensor:
    """The tokens that count: all of them where the mask is None."""
    if mask is None:
        return torch.ones_like(other, dtype=torch.bool)
    checks.check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected a bool tensor, True where a token counts (labels != -100), got "
            f"{described(mask)}"
        )
    check_like(name, mask, other, of)
    return mask


def reduced(loss: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    """The loss of each item, which is 0 where it does not count, their sum, or their mean.

    Where none counts the mean is 0, and still has a graph."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)


def described(tensor: Tensor) -> str:
    """Shape and dtype, as an error names them."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
