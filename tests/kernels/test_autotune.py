"""AKL_AUTOTUNE=1: the launches that are tried until one is chosen leave no trace in the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import driver

from akl_triton import adaptive_kl
from akl_triton.kernels import launch, tuning
from akl_triton.kernels.launch_table import TABLE, Launch, candidates, launch_for
from akl_triton.kernels.tuning import tuned_launch
from tests.kernels.conftest import INTERPRETER

pytestmark = pytest.mark.skipif(INTERPRETER, reason="the interpreter tunes nothing")

V = 700
N = 11  # of which the instrument's one multiprocessor times 8
# The candidates are few, as every one of them is compiled; with either width a row has full blocks.
NARROW, OTHER, WIDE = Launch(128, 32, 128), Launch(128, 64, 128), Launch(256, 64, 128)


@pytest.fixture
def logits(device: torch.device) -> tuple[Tensor, Tensor]:
    """(student, teacher) with -inf in the first block of either width, in that of the wider alone,
    or nowhere."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, N, V, generator=generator)
    student[0, 5] = teacher[0, 20] = -torch.inf
    student[1, 150] = teacher[1, 150] = -torch.inf
    return student.to(device), teacher.clone().to(device)  # both start on a 16-byte boundary


Results = tuple[Tensor, Tensor]


def loss_and_gradient(logits: tuple[Tensor, Tensor], **options: Any) -> Results:
    student, teacher = logits
    student = student.clone().requires_grad_()
    result = adaptive_kl(student * 1, teacher, reduction="none", backend="triton", **options)
    loss = result[0] if options.get("return_stats") else result
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def tune(
    monkeypatch: pytest.MonkeyPatch, forward: tuple[Launch, ...], backward: tuple[Launch, ...]
) -> list[tuple[str, int]]:
    """Have calls choose between these launches by timing; the (kernel, rows) that are timed."""
    timed: list[tuple[str, int]] = []
    of_kernel = {"gradient": backward}

    def recorded(kernel: str, run: Any, rows: int, *rest: object) -> Launch:
        def record(rows: int, launch: Launch) -> None:
            timed.append((kernel, rows))
            run(rows, launch)

        return tuned_launch(kernel, record, rows, *rest)

    monkeypatch.setenv("AKL_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "candidates", lambda kernel: of_kernel.get(kernel, forward))
    monkeypatch.setattr(launch, "tuned_launch", recorded)
    return timed


def assert_close(results: Results, expected: Results) -> None:
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["one outer row", "many outer rows"])
def test_logits_survive_the_timing(
    layout: str, logits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate that is timed in place overwrites the logits of the rows that it is timed on,
    of which there are no more than fill the device."""
    if layout == "many outer rows":  # 3 of every 4 rows, which no view of two dimensions can have
        student, teacher = (x[:8].view(2, 4, V)[:, :3].repeat(2, 1, 1) for x in logits)
        logits = student, teacher
    expected = loss_and_gradient(logits, inplace=True)
    timed = tune(monkeypatch, (NARROW, OTHER), (NARROW,))
    assert_close(loss_and_gradient(logits, inplace=True), expected)
    processors = driver.active.utils.get_device_properties(0)["multiprocessor_count"]
    most = tuning.ROWS_PER_PROCESSOR * processors
    assert set(timed) == {("head or statistics", min(most, expected[0].numel()))}
    assert len(timed) >= 2


class NoKernel:
    """A kernel that is launched, and does nothing."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda **arguments: None


def test_a_choice_is_kept_for_its_options_and_sizes(
    logits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = tune(monkeypatch, (NARROW, OTHER), (NARROW,))
    monkeypatch.setattr(launch, "forward_kernel", NoKernel())

    def timings(student: Tensor, teacher: Tensor, **options: Any) -> int:
        before = len(timed)
        loss_and_gradient((student, teacher), inplace=True, **options)
        return len(timed) - before

    student, teacher = logits
    once = timings(student, teacher)
    assert once > 0
    assert timings(student, teacher) == timings(*logits, mu=0.3, temperature=2.0) == 0
    assert timings(student[:10], teacher[:10]) == 0
    off_the_boundary = torch.empty(teacher.numel() + 1, device=teacher.device)[1:].view(N, V)
    others: tuple[tuple[Tensor, Tensor, dict[str, Any]], ...] = (
        (student, teacher, {"ties": "average"}),
        (student, teacher, {"return_stats": True}),
        (student, teacher, {"student_softcap": 30.0}),
        (student.bfloat16(), teacher.bfloat16(), {}),
        (student[:, 1:], teacher[:, 1:], {}),
        (student, teacher[:, 1:], {}),
        (student, off_the_boundary, {}),
        (student[:2], teacher[:2], {}),
    )
    for *pair, options in others:
        assert timings(*pair, **options) == once, options
        assert timings(*pair, **options) == 0, options


@pytest.mark.parametrize("wider", ["backward", "forward"])
def test_blocks_of_forward_and_backward_may_differ(
    wider: str, logits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward are tuned independently."""
    expected = loss_and_gradient(logits)
    widths = ((NARROW,), (WIDE,))
    tune(monkeypatch, *(widths if wider == "backward" else reversed(widths)))
    assert_close(loss_and_gradient(logits), expected)


@pytest.mark.parametrize("kernel", TABLE)
def test_candidates_are_launches_of_their_own(kernel: str) -> None:
    tried = candidates(kernel)
    assert len(set(tried)) == len(tried)
    assert {launch_for(kernel, v) for v in (32_000, 151_936)} <= set(tried)
    for block, threads, registers in tried:
        assert block // threads in (4, 8)
        assert registers * threads <= 65_536
