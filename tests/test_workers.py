"""The threads of the PyTorch backend on a CPU share out the rows, and nobody waits at a barrier."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import adaptive_kl, workers

SHAPES = [(40, 5000), (3, 5000), (1, 5000), (700, 300)]


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outcome(student: Tensor, teacher: Tensor, **options: Any) -> list[Tensor]:
    x = student.detach().clone().requires_grad_()
    loss, stats = adaptive_kl(x * 1, teacher, reduction="none", return_stats=True, **options)
    return [loss, *stats, *torch.autograd.grad(loss.sum(), x)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(shape: tuple[int, int], inplace: bool) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(shape, generator=g) for _ in range(2))
    labels = torch.arange(shape[0]) % 3 - 1
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(outcome(student, teacher, labels=labels, ignore_index=1, inplace=inplace))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


def test_no_operator_of_a_row_is_split_over_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item runs where PyTorch may take one thread, so that there is no barrier to wait at."""
    seen: set[tuple[bool, int]] = set()
    share_out = workers.share_out

    def watched(work: Any, items: Any, spaces: Any) -> None:
        def watch(item: Any, space: Any) -> None:
            on_main = threading.current_thread() is threading.main_thread()
            seen.add((on_main, torch.get_num_threads()))
            work(item, space)

        share_out(watch, items, spaces)

    monkeypatch.setattr(workers, "share_out", watched)
    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(0)
    outcome(*(torch.randn(64, 5000, generator=g) for _ in range(2)))
    assert seen == {(False, 1)}
    assert torch.get_num_threads() == 2


def test_threads_that_start_later_have_all_of_pytorchs() -> None:
    torch.set_num_threads(2)
    workers.share_out(lambda item, space: None, range(4), range(2))
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


def test_every_item_once_and_a_space_for_every_thread() -> None:
    done: list[tuple[int, str]] = []
    workers.share_out(lambda item, space: done.append((item, space)), range(100), ["a", "b", "c"])
    assert sorted(item for item, _ in done) == list(range(100))
    assert {space for _, space in done} <= {"a", "b", "c"}


def test_an_error_is_the_callers() -> None:
    done: list[int] = []

    def work(item: int, space: None) -> None:
        done.append(item)
        if item == 3:
            raise KeyError("three")
        time.sleep(1e-3)  # on a busy machine, the other thread may be done before this one fails

    with pytest.raises(KeyError, match="three"):
        workers.share_out(work, range(10**4), [None, None])
    assert len(done) < 10**4
    workers.share_out(work, range(3), [None, None])  # the threads are still there


def test_from_several_threads_at_once() -> None:
    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 48, 3000, generator=g) for _ in range(4)]
    expected = [outcome(*pair) for pair in inputs]
    found: dict[int, list[Tensor]] = {}

    def call(i: int) -> None:
        found[i] = outcome(*inputs[i])

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for i, results in enumerate(expected):
        torch.testing.assert_close(found[i], results, rtol=0, atol=0, equal_nan=True)


def test_without_autograd_and_within_inference_mode() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 5000, generator=g) for _ in range(2))
    expected = adaptive_kl(student, teacher)
    with torch.inference_mode():
        assert torch.equal(adaptive_kl(student, teacher), expected)
        consumed = student.clone()
    assert torch.equal(adaptive_kl(consumed, teacher), expected)


def _in_a_child(results: Any, student: Tensor, teacher: Tensor) -> None:
    torch.set_num_threads(2)
    results.put(adaptive_kl(student, teacher).item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_starts_its_own() -> None:
    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 5000, generator=g) for _ in range(2))
    expected = adaptive_kl(student, teacher).item()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_a_child, args=(results, student, teacher))
    child.start()
    try:
        assert results.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()
