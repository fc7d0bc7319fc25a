"""The time of the host for a call, in few rounds."""

from __future__ import annotations

import os

import pytest
import torch

from akl_triton import adaptive_kl
from bench.lab.compile import dry_run
from bench.questions import host

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is launched in the interpreter"
)


def test_every_call_takes_longer_than_nothing() -> None:
    data = host.collect(rounds=2)
    microseconds = data["microseconds"]
    least = microseconds.pop("an autograd.Function that computes nothing")
    assert 0.0 < least < min(microseconds.values())
    assert "forward" in host.markdown(data | {"microseconds": microseconds})


def test_a_step_trains_and_executes_nothing() -> None:
    """What the stubbed kernels leave is not a gradient, but autograd has been there."""
    with dry_run("sm_90"):
        student, teacher = torch.randn(2, 3, 50)
        leaf = student.requires_grad_()
        host.trained(leaf, adaptive_kl(leaf, teacher, backend="triton"))
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape
