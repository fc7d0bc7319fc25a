"""The memory that a graph keeps for its backward pass, for graphs where it is known."""

from __future__ import annotations

import torch

from bench.lab.memory import saved_bytes

X = 4 * 8 * 4  # bytes of an fp32 [4, 8] tensor


def test_saved_bytes_of_known_graphs() -> None:
    student, teacher = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8)
    assert saved_bytes(lambda s, t: s * t, student, teacher) == 0  # the inputs themselves
    assert saved_bytes(lambda s, t: s.exp(), student, teacher) == X
    assert saved_bytes(lambda s, t: s.exp().exp(), student, teacher) == 2 * X
