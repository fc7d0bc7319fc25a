"""Rows at any address: far apart, off 16-byte boundaries, in slices, on top of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from akl_triton.kernels import launch
from akl_triton.kernels.layout import STATE_WIDTH
from bench.lab.ptxcpu import virtual_tensor
from tests.kernels.rows import KINDS, assert_right, make_rows, run

OPTIONS: dict[str, Any] = {
    "mu": 0.5,
    "temperature": 1.0,
    "inclusive": False,
    "stable": True,
    "weight": None,
}


def test_offsets_beyond_int32(device: torch.device, mode: str) -> None:
    """Rows 2^31 + 16 elements apart, in all three tensors."""
    v, stride = 3000, 2**31 + 16
    student, teacher = make_rows(v, v, torch.bfloat16, torch.bfloat16)
    student, teacher = student[:2].to(device), teacher[:2].to(device)

    def apart(x: torch.Tensor) -> torch.Tensor:
        shape = (stride + v,)
        on_gpu = device.type == "cuda"
        far = (
            torch.empty(shape, dtype=x.dtype, device=device)
            if on_gpu
            else virtual_tensor(shape, x.dtype)
        )
        rows = far.as_strided((2, v), (stride, 1))
        rows.copy_(x)
        return rows

    near = run(student, teacher)
    loss, state = (
        torch.full((2,), torch.nan, device=device),
        torch.empty(2, STATE_WIDTH, device=device),
    )
    far_s, far_t, gradient = apart(student), apart(teacher), apart(torch.zeros_like(student))
    launch.forward(far_s[None], far_t[None], None, None, loss, state, None, **OPTIONS)
    ones = torch.ones(2, device=device)
    launch.backward(
        gradient[None],
        far_s[None],
        far_t[None],
        None,
        None,
        state,
        ones,
        temperature=1.0,
        weight=None,
    )
    assert torch.equal(loss, near.loss)
    assert torch.equal(gradient, near.gradient)


@pytest.mark.parametrize("offset_s, offset_t", [(0, 0), (3, 3), (5, 2), (0, 1)])
def test_unaligned_rows(offset_s: int, offset_t: int, device: torch.device) -> None:
    """Views that start anywhere in a wider tensor, at equal and at different places, or one of them
    aligned."""
    v = 5000
    student, teacher = make_rows(v, v, torch.bfloat16, torch.float32, seed=1)

    def inside(x: torch.Tensor, offset: int) -> torch.Tensor:
        wide = torch.full((len(x), v + 19), torch.nan, dtype=x.dtype, device=device)
        rows = wide[:, offset : offset + v]
        rows.copy_(x)
        return rows

    output = run(inside(student, offset_s), inside(teacher, offset_t))
    assert_right(output, student, teacher)


def test_slices_of_sequences(device: torch.device) -> None:
    """[:, 1:] of one tensor against [:, :-1] of another: two strides, nothing copied."""
    v = 3000
    student, teacher = make_rows(v, v, torch.bfloat16, torch.bfloat16, seed=2)
    flat_s, flat_t = student[:8].to(device), teacher[:8].to(device)

    def sequences(x: torch.Tensor, position: int) -> torch.Tensor:
        batch = torch.full((2, 5, v), torch.nan, dtype=x.dtype, device=device)
        part = batch[:, position : position + 4]
        part.copy_(x.view(2, 4, v))
        return part

    s, t = sequences(flat_s, 0), sequences(flat_t, 1)
    loss, state = (
        torch.full((8,), torch.nan, device=device),
        torch.empty(8, STATE_WIDTH, device=device),
    )
    gradient = torch.full((2, 4, v), torch.nan, dtype=s.dtype, device=device)
    launch.forward(s, t, None, None, loss, state, None, **OPTIONS)
    ones = torch.ones(8, device=device)
    launch.backward(gradient, s, t, None, None, state, ones, temperature=1.0, weight=None)
    expected = run(flat_s, flat_t)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(gradient.view(8, v), expected.gradient)


@pytest.mark.parametrize("v", [3000, 5003])
def test_the_gradient_may_overwrite_the_student(v: int, device: torch.device) -> None:
    student, teacher = (x.to(device) for x in make_rows(v, v, torch.bfloat16, torch.bfloat16))
    expected = run(student, teacher)
    n = len(KINDS)
    loss, ones = torch.full((n,), torch.nan, device=device), torch.ones(n, device=device)
    launch.forward(
        student[None],
        teacher[None],
        None,
        None,
        loss,
        None,
        None,
        **OPTIONS,
        gradient=student[None],
        upstream=ones,
    )
    assert torch.equal(loss, expected.loss)
    assert torch.equal(student, expected.gradient)


def test_rescale_leaves_rows_of_factor_one_alone(device: torch.device) -> None:
    rows = torch.randn(3, 3001, device=device).bfloat16()
    factor = torch.tensor([2.0, 1.0, -0.5], device=device)
    expected = (rows.float() * factor[:, None]).bfloat16()
    launch.rescale(rows, factor)
    assert torch.equal(rows, expected)


def test_factors_of_a_tiny_temperature_are_numbers_of_fp32():
    """Triton refuses a float argument that fp32 cannot hold, with an error about packing bytes."""
    maps = launch._maps(1e-30, None, 1e-30, 1e20, 1e20)
    assert all(0.0 < factor <= 2.0**126 for factor in maps.values() if factor is not None)
