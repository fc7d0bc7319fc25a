"""The collectives that a process takes part in, and the bytes that it hands to them.

PyTorch's profiler records whatever Gloo executes, however it was asked for: by torch.distributed,
by its functional form, by a DTensor, or inside of a custom operator, where a dispatch mode sees
nothing. The bytes are those of the tensors handed over. How many of them travel how often is the
algorithm's business, and another one with NCCL: around a ring of n processes, an all_reduce sends
2 (n - 1) / n times as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

_OF_GLOO = "gloo:"


@dataclass(frozen=True, slots=True)
class Collective:
    """One call of a collective by this process."""

    name: str  # Gloo's: all_reduce, all_gather, scatter
    bytes: int  # of the tensors that this process hands over: none where it only receives


@contextmanager
def record_collectives() -> Iterator[list[Collective]]:
    """A list of the collectives that run inside of the block, filled when it is left."""
    found: list[Collective] = []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        yield found
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = _with_children(recorded.profiler.kineto_results.experimental_event_tree())
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.name.startswith(_OF_GLOO):
            # An argument that is no tensor is None.
            tensors = [x for x in event.extra_fields.inputs if x is not None]
            handed = sum(math.prod(x.sizes) * x.dtype.itemsize for x in tensors)
            found.append(Collective(event.name.removeprefix(_OF_GLOO), handed))


def _with_children(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _with_children(event.children)
