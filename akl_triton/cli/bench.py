"""The authors' computation against ours on this machine: time and peak memory over V."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from akl_triton import adaptive_kl
from akl_triton.cli.options import output_folder, resolve_device
from akl_triton.reference import authors_adaptive_kl

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "authors": authors_adaptive_kl,
    "akl_triton": adaptive_kl,
}
COLOURS = {"authors": "#D55E00", "akl_triton": "#0072B2"}
MIB = 2**20


class Cost(NamedTuple):
    """The cost of forward and backward; the memory is allocated on top of the two inputs."""

    milliseconds: float
    mebibytes: float


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    device = resolve_device(arguments.device)
    folder = output_folder(arguments.output)
    dtype = getattr(torch, arguments.dtype)
    costs: dict[int, dict[str, Cost]] = {}
    for vocabulary in track(
        sorted(set(arguments.vocab)), "Measuring", console=console, transient=True
    ):
        student, teacher = make_logits(arguments.rows, vocabulary, device, dtype)
        costs[vocabulary] = {
            name: measure(loss, student, teacher, arguments.repeats)
            for name, loss in LOSSES.items()
        }
    title = (
        f"forward + backward, {arguments.rows} rows, {arguments.dtype} on {device}, "
        f"median of {arguments.repeats}"
    )
    console.print(tabulate(costs, title))
    plot(costs, title, folder / "akl_bench.png")
    console.print(f"{folder / 'akl_bench.png'} written")
    return 0


def make_logits(
    rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits whose probabilities fall off as the square of the rank."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(rows, vocabulary, generator=generator).argsort(-1) + 1.0
    teacher = torch.randn(rows, vocabulary, generator=generator) - 2.0 * rank.log()
    student = teacher + torch.randn(rows, vocabulary, generator=generator)
    return student.to(device, dtype).requires_grad_(), teacher.to(device, dtype)


def measure(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, repeats: int
) -> Cost:
    def step() -> None:
        student.grad = None
        loss(student, teacher).backward()  # type: ignore[no-untyped-call]

    step()  # compiles, and fills the caches
    seconds = []
    for _ in range(repeats):
        synchronize(student.device)
        started = time.perf_counter()
        step()
        synchronize(student.device)
        seconds.append(time.perf_counter() - started)
    student.grad = None
    return Cost(1e3 * statistics.median(seconds), peak_memory(step, student.device) / MIB)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes that `step` holds at a time on top of what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # A profiler sees every allocation, those inside a custom op too; a dispatch mode does not.
    with (
        one_thread(),
        no_native_stderr(),
        torch.autograd.profiler.profile(profile_memory=True) as profiler,
    ):
        step()
    assert profiler.kineto_results is not None
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For meters that see what their own thread does, and not the others that may share it out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def no_native_stderr() -> Iterator[None]:
    """Some builds of PyTorch's profiler write a line to stderr at either end."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def tabulate(costs: dict[int, dict[str, Cost]], title: str) -> Table:
    table = Table(
        title=title, caption="memory: peak of one thread on top of the inputs, with the gradient"
    )
    table.add_column("V", justify="right")
    for column in ("authors, ms", "ours, ms", "times faster"):
        table.add_column(column, justify="right")
    for column in ("authors, MiB", "ours, MiB", "times less"):
        table.add_column(column, justify="right")
    for vocabulary, of_loss in costs.items():
        theirs, ours = of_loss["authors"], of_loss["akl_triton"]
        table.add_row(
            f"{vocabulary:,}",
            f"{theirs.milliseconds:,.1f}",
            f"{ours.milliseconds:,.1f}",
            f"{theirs.milliseconds / ours.milliseconds:.1f}",
            f"{theirs.mebibytes:,.1f}",
            f"{ours.mebibytes:,.1f}",
            f"{theirs.mebibytes / ours.mebibytes:.1f}",
        )
    return table


def plot(costs: dict[int, dict[str, Cost]], title: str, path: os.PathLike[str]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {"milliseconds": "time, ms", "mebibytes": "peak memory, MiB"}
    for axes, (field, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in LOSSES:
            values = [getattr(of_loss[name], field) for of_loss in costs.values()]
            axes.plot(list(costs), values, marker="o", color=COLOURS[name], label=name)
        axes.set_xlabel("vocabulary")
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
