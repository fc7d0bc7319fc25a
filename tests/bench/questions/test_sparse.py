"""The errors of pairs are those of their gradients, and the kernels cost what they may."""

from __future__ import annotations

import pytest
import torch

from akl_triton import ForwardKL, teacher_pairs
from bench.lab.compile import NVIDIA
from bench.questions import sparse
from bench.store import load


def test_errors_are_those_of_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    teacher = 2.0 * torch.randn(6, 400, generator=g)
    student = teacher + 0.5 * torch.randn(6, 400, generator=g)
    case = sparse.errors(student, teacher, 16)
    found = case["gradient_errors"]["forward_kl"]
    p, q = teacher.softmax(-1), student.softmax(-1)
    dense = q - p
    pairs = teacher_pairs(teacher, 16)
    top = torch.zeros_like(p, dtype=torch.bool).scatter_(1, pairs.ids.long(), True)
    outside = ~top * q * (1.0 - (p * ~top).sum(-1, True) / (q * ~top).sum(-1, True))
    exact = torch.where(top, dense, outside)
    assert found["bucket"] == pytest.approx(float((exact - dense).norm() / dense.norm()), rel=1e-3)
    assert found["bucket and the student's k"] < found["bucket"] < found["renormalise"]
    assert set(case["gradient_errors"]["adaptive_kl"]) == set(sparse.KINDS) - {"zero"}
    assert sparse.gradient(student, teacher, ForwardKL()).allclose(dense, atol=1e-6)


def test_the_kernels_are_within_their_costs() -> None:
    case = sparse.kernels("sm_90", 64)
    assert sum(case["instructions"].values()) <= sparse.MOST_INSTRUCTIONS
    assert case["stack_bytes"] == 0


def test_what_is_stored_is_as_it_must_be() -> None:
    data = load("sparse")["data"]
    assert sparse.failures(data) == []
    data["traffic"]["asked"] = 7.0
    dear = next(case for case in data["kernels"] if case["target"] in NVIDIA)
    dear["instructions"]["pairs_kernel"] = 9.0
    dear["stack_bytes"] = 16
    assert len(sparse.failures(data)) == 3
