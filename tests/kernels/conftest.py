"""The kernels run in one of three modes, the best that the machine has:

gpu           a real GPU
ptx           the compiled PTX, executed on the CPU by bench.lab.ptxcpu
interpreter   Triton's interpreter, with TRITON_INTERPRET=1 in the environment
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from bench.lab import ptxcpu

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
MODE = "interpreter" if INTERPRETER else "gpu" if torch.cuda.is_available() else "ptx"


@pytest.fixture
def mode() -> str:
    return MODE


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The device of the kernels of a test."""
    if MODE == "ptx":
        with ptxcpu.active(arch=90):
            yield torch.device("cpu")
    else:
        yield torch.device("cuda" if MODE == "gpu" else "cpu")


def pytest_report_header() -> str:
    return f"kernels run in mode: {MODE}"
