"""AKL_AUTOTUNE=1: the launch is chosen by timing, in place of the table.

All candidates are timed at the first call with its sizes, dtypes and compile-time options; later
calls take the fastest. Timed are as many rows as fill the device a few times over, and only those
are copied where the gradient overwrites the student.
"""

import os
from collections.abc import Callable

import torch
from triton.runtime import driver

from .launch_table import Launch, candidates

# Rows that are timed, for each multiprocessor: a few times as many as it holds.
ROWS_PER_PROCESSOR = 8

_chosen: dict[tuple, Launch] = {}


def is_autotuning() -> bool:
    """Whether the launch is chosen by timing; read at every call, never at import."""
    return os.environ.get("AKL_AUTOTUNE") == "1"


def tuned_launch(
    kernel: str,  # its name in the launch table
    run: Callable[[int, Launch], None],  # launch the kernel over the first of the rows
    rows: int,
    overwritten: torch.Tensor | None,  # [outer, inner, V] logits, if the kernel writes over them
    *key: object,  # what the time depends on
) -> Launch:
    """The fastest of the kernel's candidates."""
    device = driver.active.get_current_device()
    properties = driver.active.utils.get_device_properties(device)
    timed = min(rows, ROWS_PER_PROCESSOR * properties["multiprocessor_count"])
    # Few rows may want another launch than many; how many exactly does not matter.
    key = (kernel, device, timed.bit_length(), *key)
    if key not in _chosen:
        part = _first_rows(overwritten, timed)
        saved = None if part is None else part.clone()

        def milliseconds(launch: Launch) -> float:
            def call() -> None:
                if saved is not None:
                    part.copy_(saved)
                run(timed, launch)

            return driver.active.get_benchmarker()(call, quantiles=(0.5,))[0]

        _chosen[key] = min(candidates(kernel), key=milliseconds)
        if saved is not None:
            part.copy_(saved)
    return _chosen[key]


def _first_rows(logits: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """The first rows of [outer, inner, V] logits, and less than `inner` others."""
    if logits is None:
        return None
    inner = logits.shape[1]
    return logits[: -(-rows // inner), : min(rows, inner)]
