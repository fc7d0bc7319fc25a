"""The two backends as one fixture: a test must pass with either."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn; where there is no GPU, the kernels' compiled PTX runs on the CPU."""
    name: str = request.param
    if name == "torch" or torch.cuda.is_available():
        yield name
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels are tested in tests/kernels")
    pytest.importorskip("triton")
    from bench.lab import ptxcpu

    with ptxcpu.active(arch=90):
        yield name


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device on which tensors of that backend are."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
