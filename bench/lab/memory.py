"""The memory that a computation holds: for its backward pass, and at its peak on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> int:
    """The bytes that the autograd graph keeps for the backward pass, beyond the two inputs."""
    inputs = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = loss(student, teacher)  # alive, so that no storage's address is used again
    del graph
    return sum(kept.values())


def peak_beyond_inputs(
    prepare: Callable[[int], Any], run: Callable[[Any], Any], device: torch.device
) -> int | None:
    """The most bytes that PyTorch holds during a call beyond those before it; None on a CPU."""
    if device.type != "cuda":
        return None
    state = prepare(0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run(state)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
