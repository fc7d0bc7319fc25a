"""Threads that take the rows of a CPU between them, each with one of PyTorch's own threads.

PyTorch splits every operator over its OpenMP threads, which meet at a barrier when it is done. A
loss is hundreds of short operators, and where another process takes one of the cores, every barrier
waits until the scheduler gives it back. Rows need no barrier: each thread takes the next run of
them when it is done with the last, so that a slow core costs no more than its own share.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TypeAlias, TypeVar

import torch

_Item = TypeVar("_Item")
_Space = TypeVar("_Space")
_Task: TypeAlias = Callable[[], None]


def share_out(
    work: Callable[[_Item, _Space], None], items: Sequence[_Item], spaces: Sequence[_Space]
) -> None:
    """work(item, space) for every item, in as many threads as there are spaces.

    Autograd is off there. An exception of `work` ends the other threads after their item, and is
    raised here.
    """
    left = iter(items)  # which threads may share: `next` of a list is atomic

    def task(space: _Space) -> _Task:
        def drain() -> None:
            for item in left:
                work(item, space)

        return drain

    futures = _workers.submit([task(space) for space in spaces])
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        for _ in left:
            pass
        wait(futures)
        raise


class _Workers:
    """A pool as large as the largest request so far; its threads wait until the process ends.

    Daemons, unlike those of concurrent.futures, which takes no tasks once the main thread is done,
    although another may still train.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[None], _Task]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._count = 0

    def submit(self, tasks: Sequence[_Task]) -> list[Future[None]]:
        with self._starting:
            while self._count < len(tasks):
                threading.Thread(target=self._serve, name="akl_triton", daemon=True).start()
                self._count += 1
        futures: list[Future[None]] = [Future() for _ in tasks]
        for pair in zip(futures, tasks, strict=True):
            self._tasks.put(pair)
        return futures

    def _serve(self) -> None:
        _take_one_thread()
        # Tensors of inference mode may be written only in it, and it is no obstacle to the others.
        with torch.inference_mode():
            while True:
                _complete(*self._tasks.get())


def _complete(future: Future[None], task: _Task) -> None:
    try:
        task()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


_counting_threads = threading.Lock()


def _take_one_thread() -> None:
    """Have PyTorch compute with one thread whatever this thread asks for.

    torch.set_num_threads sets that, and also what threads that start later begin with. To put the
    latter back takes a thread of its own, whose own number nobody needs."""
    with _counting_threads:
        of_later_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(of_later_threads,))
        restore.start()
        restore.join()


def _forget() -> None:
    """A forked process has none of its parent's threads, but may have its locks as they were."""
    global _workers, _counting_threads
    _workers, _counting_threads = _Workers(), threading.Lock()


_workers = _Workers()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
