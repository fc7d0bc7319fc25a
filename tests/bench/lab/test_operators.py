"""The meter of PyTorch's operators, compared with counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.lab.operators import Moved, OperatorMeter

X = 4 * 8 * 4  # bytes of the fp32 [4, 8] tensors x, y, z
INDEX = 4 * 8 * 8  # of int64
PICKED = torch.zeros(4, 2, dtype=torch.int64)

OPERATORS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], int, int]] = {
    "two inputs": (lambda x, y, z: x + y, 2 * X, X),
    "the same input twice": (lambda x, y, z: x * x, X, X),
    "both halves": (lambda x, y, z: x[:2] + x[2:], X, X // 2),
    "overlapping views": (lambda x, y, z: x[:3] + x[1:], X, 3 * X // 4),
    "part of a tensor": (lambda x, y, z: x[:1] + y[:1], X // 2, X // 4),
    "an expanded input": (lambda x, y, z: x[:, :1].expand(4, 8) + y, X + X // 8, X),
    "views": (lambda x, y, z: x.t().reshape(2, 16)[1:].detach().expand(3, 1, 16), X, X),
    "in place": (lambda x, y, z: x.add_(y), 2 * X, X),
    "out": (lambda x, y, z: torch.add(x, y, out=z), 2 * X, X),
    "out in place": (lambda x, y, z: torch.add(x, y, out=x), 2 * X, X),
    "copied over": (lambda x, y, z: x.copy_(y), X, X),
    "filled": (lambda x, y, z: x.fill_(1.0), 0, X),
    "allocated": (lambda x, y, z: torch.empty_like(x), 0, 0),
    "allocated and cleared": (lambda x, y, z: torch.zeros(4, 8), 0, X),
    "reduced": (lambda x, y, z: x.sum(-1), X, X // 8),
    "two outputs": (lambda x, y, z: x.sort(-1), X, X + INDEX),
    "picked": (lambda x, y, z: y.gather(-1, PICKED), 4 * 2 * (4 + 8), 4 * 2 * 4),
    "converted": (lambda x, y, z: x.bfloat16(), X, X // 2),
    "list of inputs": (lambda x, y, z: torch.cat([x, y]), 2 * X, 2 * X),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_bytes_of_an_operator(name: str) -> None:
    run, read, written = OPERATORS[name]
    x, y, z = torch.zeros(3, 4, 8).unbind()
    x, y, z = x.clone(), y.clone(), z.clone()
    with OperatorMeter() as meter:
        run(x, y, z)
    total = meter.total()
    assert (total.read, total.written) == (read, written)


def test_bytes_of_large_tensors() -> None:
    small, large = torch.zeros(8), torch.zeros(64, 8)
    with OperatorMeter(large=large.nbytes) as meter:
        small + small
        large + small
    total = meter.total()
    assert total.large == 2 * large.nbytes
    assert total.read + total.written == 2 * large.nbytes + 3 * small.nbytes


def test_backward_is_counted() -> None:
    """exp: x read, y written; backward: grad and y read, the product written."""
    x = torch.zeros(4, 8, requires_grad=True)
    with OperatorMeter() as meter:
        x.exp().backward(torch.ones(4, 8))
    assert meter.operators["exp"] == Moved(1, X, X, 2 * X)
    assert meter.operators["mul"] == Moved(1, 2 * X, X, 3 * X)


def test_what_is_counted_elsewhere_is_left_out() -> None:
    x = torch.zeros(4, 8)

    def is_exp(operator: object, arguments: tuple[object, ...]) -> bool:
        assert arguments[0] is x
        return "exp" in str(operator)

    with OperatorMeter(elsewhere=is_exp) as meter:
        x.exp()
        x.sin()
    assert set(meter.operators) == {"sin"}
