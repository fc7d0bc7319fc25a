"""AKL_AUTOTUNE=1: the launches that are tried until one is chosen leave no trace in the results."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import adaptive_kl
from akl_triton.kernels.launch_table import CANDIDATES, Launch, launch_for
from tests.kernels.conftest import INTERPRETER

pytestmark = pytest.mark.skipif(INTERPRETER, reason="the interpreter tunes nothing")

V = 700
# The candidates are few, as every one of them is compiled; with either width a row has full blocks.
TRIED = (Launch(128, 1), Launch(128, 2), Launch(256, 2))
# name: (in place, the candidates of the forward, those of the backward)
CHOICES = {
    "timed": (True, slice(0, 2), slice(0, 1)),
    "wider in the backward": (False, slice(0, 1), slice(2, 3)),
    "wider in the forward": (False, slice(2, 3), slice(0, 1)),
}

# Triton caches its timings in the kernel, so that this needs a process of its own.
SCRIPT = """
import contextlib
import torch
from akl_triton import adaptive_kl
from akl_triton.kernels import launch
from akl_triton.kernels.launch_table import Launch
from bench.lab import ptxcpu

launch.CANDIDATES = {tried}

on_gpu = torch.cuda.is_available()
student, teacher = (x.cuda() if on_gpu else x for x in torch.load("logits.pt"))
student.requires_grad_()
kernels = launch.tuned_forward(), launch.tuned_backward()
candidates = kernels[0].configs


def run(inplace, *choices):
    for kernel, choice in zip(kernels, choices):
        kernel.configs = candidates[choice]
    logits = student * 1
    loss = adaptive_kl(logits, teacher, reduction="none", inplace=inplace, backend="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach().cpu(), gradient.cpu(), [len(kernel.cache) for kernel in kernels]


def outcome(choices):
    try:
        return run(*choices)
    except ptxcpu.PtxError as error:
        return str(error)


with contextlib.nullcontext() if on_gpu else ptxcpu.active(arch=90):
    torch.save({{name: outcome(choices) for name, choices in {choices}.items()}}, "outcomes.pt")
"""


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    """(student, teacher) with -inf in the first block of either width, in that of the wider alone,
    or nowhere."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, V, generator=generator)
    student[0, 5] = teacher[0, 20] = -torch.inf
    student[1, 150] = teacher[1, 150] = -torch.inf
    return student, teacher


@pytest.fixture(scope="module")
def outcomes(logits: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("autotune")
    torch.save(logits, folder / "logits.pt")
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tried=TRIED, choices=CHOICES)],
        cwd=folder,
        env={**os.environ, "AKL_AUTOTUNE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    return torch.load(folder / "outcomes.pt")


def assert_right(outcome: Any, logits: tuple[Tensor, Tensor], device: torch.device) -> None:
    """Compare the results with those of the table's launches."""
    assert not isinstance(outcome, str), outcome
    student, teacher = (x.to(device) for x in logits)
    student.requires_grad_()
    loss = adaptive_kl(student, teacher, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    for result, expected in zip(outcome[:2], (loss.detach(), gradient), strict=True):
        torch.testing.assert_close(result, expected.cpu(), rtol=1e-5, atol=1e-6)


def test_logits_survive_the_timing(
    outcomes: Any, logits: tuple[Tensor, Tensor], device: torch.device
) -> None:
    """Every candidate that is timed in place overwrites the logits."""
    assert_right(outcomes["timed"], logits, device)
    assert outcomes["timed"][2] == [1, 0]  # with one candidate there is nothing to time


@pytest.mark.parametrize("wider", ["backward", "forward"])
def test_blocks_of_forward_and_backward_may_differ(
    wider: str, outcomes: Any, logits: tuple[Tensor, Tensor], device: torch.device
) -> None:
    """Forward and backward are tuned independently."""
    assert_right(outcomes[f"wider in the {wider}"], logits, device)


def test_candidates_are_launches_of_their_own() -> None:
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    assert launch_for(151_936) in CANDIDATES
