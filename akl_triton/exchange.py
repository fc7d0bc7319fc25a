"""How the messages of `BackendOfShards` travel: by all-gathers, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# Its name since PyTorch 2.13, which warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
FAILED = (
    "group: the exchange with the other ranks has failed or timed out. All ranks of the group have "
    "to call the loss as often as each other: look for the first error in the output of the other "
    "ranks, and for a branch that not all of them take"
)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def all_gather(message: Tensor, group: str) -> Callable[[], Tensor]:
    """Begin to gather [...] of every rank, and give what waits for [R, ...]."""
    process_group = group_of(group)
    message = message.contiguous()
    everyone = message.new_empty(process_group.size(), *message.shape)
    try:
        work: Any = _all_gather(
            everyone.view(-1), message.view(-1), group=process_group, async_op=True
        )
    except RuntimeError as error:
        raise RuntimeError(FAILED) from error

    def arrived() -> Tensor:
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(FAILED) from error
        return everyone

    return arrived


class Flight:
    """Steps that are under way: what is computed next needs what is being exchanged."""

    def __init__(self, steps: Generator[Tensor, Tensor, None], group: str) -> None:
        self.steps, self.group = steps, group
        self.arrived = all_gather(next(steps), group)

    def advance(self) -> bool:
        """Wait for the exchange, and go on to the next one, if there is one."""
        try:
            message = self.steps.send(self.arrived())
        except StopIteration:
            return False
        self.arrived = all_gather(message, self.group)
        return True


def run(steps: Generator[Tensor, Tensor, None], group: str) -> None:
    flight = Flight(steps, group)
    while flight.advance():
        pass
