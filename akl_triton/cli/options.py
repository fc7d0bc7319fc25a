"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import torch

from akl_triton.cli import UsageError


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a CUDA device where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[name]:
        raise UsageError(f"--device {name}: PyTorch sees no such device here")
    return torch.device(name)


def output_folder(name: str) -> Path:
    """The folder for results, made before any work is done for nothing."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {name}: {error.strerror}") from error
    return folder
