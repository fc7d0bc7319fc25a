"""The way a time is taken: with rotating inputs, behind a kernel that waits, with quantiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.lab import clock as clocks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "pair, cache, pairs", [(100, 50, 2), (201, 50, 1), (199, 50, 2), (9, 0, 1)]
)
def test_pairs_are_four_caches(pair: int, cache: int, pairs: int) -> None:
    assert clocks.copies_for(pair, cache) == pairs


class Recorder:
    """A clock that writes down the calls that it is given."""

    def __init__(self, log: list[str]):
        self.log = log

    def time(self, call: Callable[[], Any]) -> None:
        self.log.append(call())

    def milliseconds(self) -> list[float]:
        return []


def test_calls_rotate() -> None:
    """The state of a timed call was prepared before the calls on all the other pairs."""
    log: list[str] = []

    def prepare(i: int) -> int:
        log.append(f"prepare {i}")
        return i

    clocks.rotate(prepare, lambda i: f"time {i}", 3, 4, Recorder(log))
    assert log == [
        *("prepare 0", "prepare 1", "prepare 2"),
        *("time 0", "prepare 0", "time 1", "prepare 1", "time 2", "prepare 2"),
        *("time 0", "prepare 0"),
    ]


def test_one_state_is_held_where_there_is_one_pair() -> None:
    """The state of a backward is all that its forward has saved."""
    alive = most = 0

    class State:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    clocks.time_calls(lambda _: State(), lambda state: None, 1, CPU)
    assert most == 1


def test_the_gpu_waits_until_all_is_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time leaves out what the host does before a launch."""
    log: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: Event) -> float:
            assert log[-1] == "synchronize"
            return 2.0

    monkeypatch.setattr(clocks, "_event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"wait {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    clock = clocks.CudaClock(host=1e-4)
    clock.time(lambda: log.append("call"))
    assert clock.milliseconds() == [2.0]
    assert log == ["wait 400000", "event", "call", "event", "synchronize"]


def test_statistics() -> None:
    times = clocks.summarise([5.0, 1.0, 2.0, 100.0, 3.0, 4.0], host=0.5)
    assert times == clocks.Times(3.5, 2.0, 5.0, 6, 0.5)


def test_steps_take_turns() -> None:
    """A clock that only the steps move."""
    now = 0.0
    order: list[str] = []

    def step(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds * (1 + len(order))
        order.append(name)

    steps = {"a": lambda: step("a", 1.0), "b": lambda: step("b", 10.0)}
    seconds = clocks.times_in_turn(steps, 2, CPU, lambda: now)
    assert order == ["a", "b", "a", "b"]
    assert seconds == {"a": [1.0, 3.0], "b": [20.0, 40.0]}
