"""AKL_AUTOTUNE=1: what is tried until a launch is chosen leaves no trace in the results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from akl_triton import adaptive_kl
from akl_triton.kernels.launch_table import CANDIDATES, Launch, launch_for
from tests.kernels.conftest import INTERPRETER

pytestmark = pytest.mark.skipif(INTERPRETER, reason="the interpreter tunes nothing")

V = 700
# Two that the table would not choose: few, as every one of them is compiled.
TRIED = (Launch(256, 1), Launch(512, 2))

# The variable is read when the kernels are imported: a process of its own.
SCRIPT = """
import contextlib, sys
import torch
from akl_triton import adaptive_kl
from akl_triton.kernels import launch_table
from akl_triton.kernels.launch_table import Launch
from bench import ptxcpu

launch_table.CANDIDATES = {tried}
from akl_triton.kernels import pipeline

on_gpu = torch.cuda.is_available()
student, teacher = (x.cuda() if on_gpu else x for x in torch.load("logits.pt"))
with contextlib.nullcontext() if on_gpu else ptxcpu.active(arch=90):
    student.requires_grad_()
    loss = adaptive_kl(student, teacher, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    consumed = student * 1
    loss_in_place = adaptive_kl(
        consumed, teacher, reduction="none", inplace=True, backend="triton"
    )
    (gradient_in_place,) = torch.autograd.grad(loss_in_place.sum(), consumed)
results = loss.detach(), gradient, loss_in_place.detach(), gradient_in_place
chosen = [
    [config.kwargs["BLOCK"] for config in kernel.cache.values()]
    for kernel in (pipeline._forward, pipeline._backward)
]
torch.save(([x.cpu() for x in results], chosen), "results.pt")
"""


def test_results_are_those_of_the_table(device: torch.device, tmp_path: Path) -> None:
    """Out of place, and in place, where every candidate that is timed overwrites the logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, V, generator=generator)
    torch.save((student, teacher), tmp_path / "logits.pt")
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tried=TRIED)],
        cwd=tmp_path,
        env={**os.environ, "AKL_AUTOTUNE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    results, chosen = torch.load(tmp_path / "results.pt")

    blocks = {launch.BLOCK for launch in TRIED}
    assert launch_for(V).BLOCK not in blocks
    for of_kernel in chosen:
        assert of_kernel and set(of_kernel) <= blocks
    student, teacher = student.to(device).requires_grad_(), teacher.to(device)
    loss = adaptive_kl(student, teacher, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    for name, result, expected in zip(
        ("loss", "gradient", "loss in place", "gradient in place"),
        results,
        (loss.detach(), gradient) * 2,
        strict=True,
    ):
        torch.testing.assert_close(
            result, expected.cpu(), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text
        )


def test_candidates_are_launches_of_their_own() -> None:
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    assert launch_for(151_936) in CANDIDATES
