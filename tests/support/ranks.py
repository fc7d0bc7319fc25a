"""Processes of a gloo group, started once for all tests that need them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

WORLD = 4
PATIENCE = timedelta(seconds=60)


class Failed(NamedTuple):
    """What a rank raised."""

    error: str  # its type
    text: str
    trace: str


class Ranks:
    """Processes, each of which waits for functions of a module to call."""

    def __init__(self, world: int = WORLD) -> None:
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(group, *arguments) on the first `size` ranks, which are the group; what each
        of them returns, or `Failed`."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function, arguments))
        results = []
        for pipe in self.pipes[:size]:
            assert pipe.poll(2 * PATIENCE.total_seconds()), "a rank does not answer"
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(Failed("EOFError", "the process has ended", ""))
        return results

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same, where no rank may raise."""
        results = self.call(size, function, *arguments)
        for result in results:
            assert not isinstance(result, Failed), result.trace
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    groups = {size: dist.new_group(range(size), timeout=PATIENCE) for size in range(1, world + 1)}
    while True:
        size, function, arguments = pipe.recv()
        try:
            result = function(groups[size], *arguments)
        except Exception as error:
            result = Failed(type(error).__name__, str(error), traceback.format_exc())
        pipe.send(result)
