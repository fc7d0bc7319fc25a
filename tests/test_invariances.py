"""Properties that hold for all logits, drawn by hypothesis, on the PyTorch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import adaptive_kl
from tests.support.near import assert_near

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

integer_logits = st.integers(2, 24).flatmap(
    lambda v: st.tuples(*[st.lists(st.integers(-6, 6), min_size=v, max_size=v)] * 2)
)


def loss_and_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = adaptive_kl(student, teacher, backend="torch", **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@settings(max_examples=40, deadline=None)
@given(integer_logits, st.randoms(use_true_random=False), st.sampled_from([0.3, 0.5, 0.9]))
def test_average_ties_do_not_depend_on_the_order(rows, random, mu):
    student, teacher = (torch.tensor([row], dtype=torch.float32) for row in rows)
    order = list(range(student.shape[1]))
    random.shuffle(order)
    loss, grad = loss_and_gradient(student, teacher, mu=mu, ties="average")
    permuted_loss, permuted_grad = loss_and_gradient(
        student[:, order], teacher[:, order], mu=mu, ties="average"
    )
    assert_near(permuted_loss, loss)
    assert_near(permuted_grad, grad[:, order])


@settings(max_examples=40, deadline=None)
@given(integer_logits, st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_constants_added_to_the_logits_do_not_matter(rows, of_student, of_teacher):
    """Small integers are exact in fp32, so nothing else changes."""
    student, teacher = (torch.tensor([row], dtype=torch.float32) for row in rows)
    loss, grad = loss_and_gradient(student, teacher)
    moved_loss, moved_grad = loss_and_gradient(student + of_student, teacher + of_teacher)
    assert_near(moved_loss, loss)
    assert_near(moved_grad, grad)


@settings(max_examples=40, deadline=None)
@given(integer_logits, st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_temperature_divides_the_logits(rows, temperature):
    student, teacher = (torch.tensor([row], dtype=torch.float32) for row in rows)
    loss, grad = loss_and_gradient(student, teacher, temperature=temperature)
    divided_loss, divided_grad = loss_and_gradient(student / temperature, teacher / temperature)
    assert_near(loss, divided_loss)
    assert_near(grad, divided_grad / temperature)
    assert loss >= -1e-6
