"""A record of the allocations and the operators of a computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from akl_triton import workers

# Operators that wait for the device; lift_fresh copies a Python number to it.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::unique",
}


class Trace:
    """The allocations of a block of code and the operators that it calls, at any depth.

    On a CPU every allocation is recorded; all run in one thread, as a profiler sees those of no
    other. On a GPU PyTorch reports only the peak.
    """

    def __init__(self, device: torch.device | None = None):
        self._on_gpu = device is not None and device.type == "cuda"

    def __enter__(self) -> Trace:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        torch.set_num_threads(self._threads)
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        self.operators = {event.name() for event in events}
        changes: list[Any] = [event for event in events if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        self.bytes = [int(event.nbytes()) for event in changes]
        if self._on_gpu:
            self._most = torch.cuda.max_memory_allocated() - self._before

    def allocations(self, at_least: int) -> list[int]:
        return [size for size in self.bytes if size >= at_least]

    def peak(self) -> int:
        """The most bytes that were held at once, beyond those held before."""
        if self._on_gpu:
            return self._most
        held = most = 0
        for change in self.bytes:
            held += change
            most = max(most, held)
        return most


def peak_of_one_thread(function: Callable[[], Any]) -> int:
    """The most bytes that `function` holds at once on a CPU, its result included."""
    with Trace() as trace:
        kept = function()
    del kept
    return trace.peak()


def peak_temporaries(
    function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, threads: int = 64
) -> int:
    """The most bytes that `function` holds at once on a CPU of so many cores.

    They are those of one thread, times the number of threads that share the work.
    """
    used = [1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with monkeypatch.context() as patch:
            patch.setattr(workers, "share_out", lambda work, items, of: used.append(len(of)))
            function()
    finally:
        torch.set_num_threads(before)
    return max(used) * peak_of_one_thread(function)
