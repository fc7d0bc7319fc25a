"""Rows so long that the launch table gives them a launch of their own, of more threads a row."""

from __future__ import annotations

import pytest
import torch

from akl_triton import AdaptiveKL, ForwardKL, JensenShannon, distillation_loss
from akl_triton.divergences import Divergence
from akl_triton.kernels.launch_table import LARGEST_OF_TWO, launch_for
from akl_triton.verify import exact, faults
from bench.lab import ptxcpu
from tests.kernels.conftest import MODE
from tests.kernels.rows import KINDS, make_rows

pytestmark = pytest.mark.skipif(MODE == "interpreter", reason="it would take minutes")

V = LARGEST_OF_TWO + 9_004  # a turn of each loop, blocks that fill none, and a part of one


def test_the_launch_is_another() -> None:
    assert launch_for("terms", V) != launch_for("terms", LARGEST_OF_TWO)


@pytest.mark.parametrize("divergence", [AdaptiveKL(), ForwardKL(), JensenShannon()], ids=str)
def test_long_rows(divergence: Divergence, device: torch.device) -> None:
    """In one launch and in two, right and, where warps can be made to wait, without a race."""
    some = [KINDS.index(kind) for kind in ("zipf", "ties", "flat", "late maximum")]
    student, teacher = (x[some] for x in make_rows(V, V, torch.bfloat16, torch.bfloat16))
    of = exact(divergence, student, teacher)
    upstream = torch.linspace(-1.0, 2.0, len(some))

    def results(inplace: bool) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = student.to(device).requires_grad_()
        logits = leaf * 1 if inplace else leaf
        loss = distillation_loss(
            logits,
            teacher.to(device),
            divergence=divergence,
            reduction="none",
            inplace=inplace,
            backend="triton",
        )
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(device))
        return loss.detach().cpu(), gradient.cpu()

    for inplace in (False, True):
        loss, gradient = results(inplace)
        found = faults(loss, gradient, of, upstream=upstream)
        assert not found, "\n".join(found)
    if MODE == "ptx":
        with ptxcpu.active(arch=90, sched=1):
            again = results(inplace=True)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], gradient)
