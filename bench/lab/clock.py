"""Clocks that say how long a call takes on a GPU, or on this CPU.

A time on a GPU is that between two CUDA events around a call, enqueued behind a kernel that waits,
so that what the host does before the launch is not in it.  The calls rotate through inputs that
together are CACHES times the L2, and what a call needs is prepared a whole turn ahead: no input is
warm.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

# The multiple of the L2 that is touched between two uses of the same logits.
CACHES = 4
SECONDS_PER_CASE = 0.15
REPEATS = (5, 50)  # at least, at most
LONGEST_WAIT = 0.02  # seconds in which the host can enqueue a call behind the waiting kernel
WAIT_CYCLES = 2_000_000_000  # a second at the fastest clock of any GPU


def copies_for(input_bytes: int, cache_bytes: int) -> int:
    """The number of copies of these inputs that make up CACHES times the cache."""
    return max(1, math.ceil(CACHES * cache_bytes / input_bytes))


class Times(NamedTuple):
    """The times in milliseconds."""

    median: float
    percentile_20: float
    percentile_80: float
    repeats: int
    host: float


class Clock(Protocol):
    def time(self, call: Callable[[], Any]) -> None: ...
    def milliseconds(self) -> list[float]: ...


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class CudaClock:
    """Times on the GPU, by events, behind a kernel that waits until the host has enqueued all."""

    def __init__(self, host: float):
        self._cycles = int(WAIT_CYCLES * min(2 * host, LONGEST_WAIT))
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Callable[[], Any]) -> None:
        start, end = _event(), _event()
        torch.cuda._sleep(self._cycles)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        self._events.append((start, end))

    def milliseconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in self._events]


class WallClock:
    """Times on the CPU."""

    def __init__(self) -> None:
        self._milliseconds: list[float] = []

    def time(self, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        self._milliseconds.append(1e3 * (time.perf_counter() - start))

    def milliseconds(self) -> list[float]:
        return self._milliseconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rotate(
    prepare: Callable[[int], Any], run: Callable[[Any], Any], pairs: int, repeats: int, clock: Clock
) -> None:
    """Time the calls, each on the inputs that were prepared for its pair of logits a whole turn
    before."""
    ready = deque(prepare(i) for i in range(pairs))
    for repeat in range(repeats):
        state = ready.popleft()
        clock.time(functools.partial(run, state))
        del state  # else two of them would be in memory where there is one pair
        ready.append(prepare(repeat % pairs))


def time_calls(
    prepare: Callable[[int], Any], run: Callable[[Any], Any], pairs: int, device: torch.device
) -> Times:
    """Make two calls to compile and to estimate, then time as many as SECONDS_PER_CASE allows."""
    seconds = host = 0.0
    for _ in range(2):
        state = prepare(0)
        synchronize(device)
        start = time.perf_counter()
        run(state)
        host = time.perf_counter() - start
        synchronize(device)
        seconds = time.perf_counter() - start
        del state
    repeats = min(max(math.ceil(SECONDS_PER_CASE / seconds), REPEATS[0]), REPEATS[1])
    clock: Clock = CudaClock(host) if device.type == "cuda" else WallClock()
    rotate(prepare, run, pairs, repeats, clock)
    return summarise(clock.milliseconds(), 1e3 * host)


def summarise(milliseconds: Sequence[float], host: float) -> Times:
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    median = statistics.median(milliseconds)
    return Times(median, fifths[0], fifths[-1], len(milliseconds), host)


def times_in_turn(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of each in every one of `rounds` rounds of all of them. Call each once before."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(device)
            started = clock()
            step()
            synchronize(device)
            seconds[name].append(clock() - started)
    return seconds


def least_times(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, float]:
    """The least seconds of each over `rounds` rounds of all of them, after one that is not
    counted."""
    for step in steps.values():
        step()
    return {name: min(of_step) for name, of_step in times_in_turn(steps, rounds, device).items()}
