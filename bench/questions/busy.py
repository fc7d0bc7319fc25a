"""`python -m bench busy`: does the time of the PyTorch backend fall off a cliff on this CPU?

    neighbours   all threads compared with one, alone and with a busy process on every core but one
    slices       slices of sequences compared with the same rows made contiguous

The two sides of a ratio take turns in one process, so that what else runs here meets both. Their
medians are compared, forward and backward together.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from akl_triton import adaptive_kl
from bench.report.tables import table

SLICED_VOCABULARY = 500
# Slices of sequences of so many tokens.
SLICES = {
    "[N, 2, 500][:, :1]": (2, slice(None, 1)),
    "[N, 3, 500][:, :2]": (3, slice(None, 2)),
    "[N, 3, 500][:, 1:]": (3, slice(1, None)),
}


def collect(
    rows: int = 252, vocabulary: int = 49_152, sequences: int = 1000, rounds: int = 7
) -> dict[str, Any]:
    """Seconds of both sides of every ratio."""
    compared = [
        *of_threads(rows, vocabulary, rounds),
        *of_slices(sequences, rounds),
    ]
    return {"rows": rows, "vocabulary": vocabulary, "compared": compared}


def markdown(data: dict[str, Any]) -> str:
    return table(
        ("compared", "ms", "with, ms", "ratio"),
        [
            (
                one["what"],
                f"{1e3 * one['with']:.1f}",
                f"{1e3 * one['seconds']:.1f}",
                f"{one['seconds'] / one['with']:.2f}",
            )
            for one in data["compared"]
        ],
    )


def of_threads(rows: int, vocabulary: int, rounds: int) -> Iterator[dict[str, Any]]:
    """All of PyTorch's threads compared with one."""
    threads = torch.get_num_threads()
    step = step_of(*torch.randn(2, rows, vocabulary))

    def with_threads(count: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(count)
            step()

        return run

    count = max((os.cpu_count() or 1) - 1, 1)
    try:
        for busy in (0, count):
            with neighbours(busy):
                one, all_of_them = alternate(with_threads(1), with_threads(threads), rounds)
            what = f"{threads} threads with 1, {busy} busy neighbours"
            yield {"what": what, "with": one, "seconds": all_of_them}
    finally:
        torch.set_num_threads(threads)


def of_slices(sequences: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Slices of sequences compared with their rows made contiguous."""
    for name, (length, of) in SLICES.items():
        both = torch.randn(2, sequences, length, SLICED_VOCABULARY)
        student, teacher = (x[:, of] for x in both)
        contiguous = step_of(student.contiguous(), teacher.contiguous())
        copied, sliced = alternate(contiguous, step_of(student, teacher), rounds)
        yield {"what": f"{name} with its rows contiguous", "with": copied, "seconds": sliced}


def step_of(student: Tensor, teacher: Tensor) -> Callable[[], None]:
    leaf = student.detach().requires_grad_()

    def step() -> None:
        leaf.grad = None
        adaptive_kl(leaf, teacher, backend="torch").backward()  # type: ignore[no-untyped-call]

    return step


def alternate(
    one: Callable[[], None], other: Callable[[], None], rounds: int
) -> tuple[float, float]:
    """Median seconds of both, after a call of each that is not timed."""
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for step, of_step in zip((one, other), seconds, strict=True):
            started = time.perf_counter()
            step()
            of_step.append(time.perf_counter() - started)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that compute without end."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
