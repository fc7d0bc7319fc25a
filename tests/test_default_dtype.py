"""Torch's default dtype: computation and loss are fp32 whatever a trainer has set it to.

Lightning's bf16-true and 64-true set it around a whole step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import (
    adaptive_kl,
    distillation_loss,
    forward_kl,
    linear_adaptive_kl,
    linear_forward_kl,
    linear_mixed_kl,
    mixed_kl,
    reverse_kl,
)
from tests.support.cases import DIVERGENCES

V, H, TOKENS = 200, 16, (3, 3)
LABELS = torch.tensor([[1, 2, -100], [-100, 3, 4], [5, 6, 7]])
MAPS = {"student_softcap": 4.0, "teacher_softcap": 3.0, "student_logit_scale": 0.75}
LOGITS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adaptive": (adaptive_kl, {}),
    "adaptive, inclusive, average": (adaptive_kl, {"head": "inclusive", "ties": "average"}),
    "forward": (forward_kl, {"temperature": 2.0, "scale_by_t2": True}),
    "reverse": (reverse_kl, {"reduction": "sum"}),
    "mixed, per token": (mixed_kl, {"reduction": "none"}),
    "num_items": (adaptive_kl, {"num_items": 5}),
    "num_items tensor": (adaptive_kl, {"num_items": torch.tensor(5)}),
    "maps": (adaptive_kl, MAPS),
    **{
        f"{divergence}, labels": (distillation_loss, {"divergence": divergence, "kd_ratio": 0.5})
        for divergence in DIVERGENCES
    },
}
LINEAR: dict[str, tuple[Any, dict[str, Any]]] = {
    "adaptive": (linear_adaptive_kl, {}),
    "forward, chunks": (linear_forward_kl, {"chunk_bytes": 8 * V * 2}),
    "mixed, per token": (linear_mixed_kl, {"reduction": "none", "num_items": None}),
    "maps": (linear_adaptive_kl, MAPS),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=g, dtype=torch.float32)).to(dtype)


def of_logits(function: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """[loss, statistics, gradient]"""
    student = random(*TOKENS, V, seed=1, dtype=dtype).requires_grad_()
    teacher = random(*TOKENS, V, seed=2, dtype=dtype)
    loss, stats = function(student * 1, teacher, LABELS, shift=1, return_stats=True, **options)
    return [loss, *stats, *torch.autograd.grad(loss.sum(), student)]


def of_hidden(function: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    hidden, teacher_hidden = (random(*TOKENS, H, seed=i, dtype=dtype) for i in (1, 2))
    weight, teacher_weight = (random(V, H, seed=i, dtype=dtype) / 4 for i in (3, 4))
    bias = random(V, seed=5, dtype=dtype)
    trained = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss, stats = function(
        hidden, weight, teacher_hidden, teacher_weight, LABELS,
        student_bias=bias, return_stats=True, **options,
    )  # fmt: skip
    return [loss, *stats, *torch.autograd.grad(loss.sum(), trained)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", LOGITS)
def test_losses_of_logits(case, inplace, dtype, default):
    function, options = LOGITS[case]
    expected = of_logits(function, dtype, inplace=inplace, **options)
    with default_dtype(default):
        assert_same(of_logits(function, dtype, inplace=inplace, **options), expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LINEAR)
def test_losses_of_hidden_states(case, dtype, default):
    function, options = LINEAR[case]
    expected = of_hidden(function, dtype, **options)
    with default_dtype(default):
        assert_same(of_hidden(function, dtype, **options), expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_on_both_backends(backend, device, inplace, default):
    def run() -> list[Tensor]:
        return of_logits(adaptive_kl, torch.float32, inplace=inplace, backend=backend)

    expected = run()
    with default_dtype(default):
        assert_same(run(), expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("of", [of_logits, of_hidden])
def test_compiled(of, default):
    """A graph is traced and run under the default of the step as well."""
    function = adaptive_kl if of is of_logits else linear_adaptive_kl
    expected = of(function, torch.float32)
    torch.compiler.reset()
    with default_dtype(default):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_same(of(compiled, torch.float32), expected)
