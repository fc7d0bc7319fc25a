"""`python -m bench growth`: how cost grows with the rows N and with the vocabulary V.

Cost per vocabulary position should not grow with either, nor should the state that is kept for the
backward pass, a constant of the row; peak memory should be that of the gradient. Kernels are
compiled for sm_90 and executed by bench/lab/ptxcpu, in bf16. A kernel is one program per row, so N
changes nothing but the number of programs: every N is run, with one row repeated, to show it. For
other V, real logits are resampled (`bench.inputs.real_logits.resampled`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from akl_triton import adaptive_kl, mixed_kl
from akl_triton.cli.bench import COLOURS, MIB, make_logits, peak_memory
from akl_triton.reference import authors_adaptive_kl
from bench.inputs.real_logits import real_logits, resampled
from bench.lab import ptxcpu
from bench.lab.memory import saved_bytes
from bench.questions.traffic import ARCH, Loss, per_position, two_launches

VOCABULARIES = tuple(2**i for i in range(10, 19))  # 1,024 to 262,144
FLAT_WITHIN = 0.05
ROWS_OF_V = 10
LARGEST_ROWS = 65_536
# Each V with the N that are run at it.
ROWS_AT = {
    1_024: (1, 16, 256, 4_096, 65_536),
    49_152: (1, 4, 16, 64, 256),
}
SMALL_V = 1_024
MEMORY_ROWS = (1, 64, 1_024, 4_096, 16_384, 65_536)
AUTHORS_AT_MOST = 2**24  # logits, whose temporaries are half a GiB
SAVED_AT = ((4, 1_024), (64, 1_024), (4, 49_152))

Step = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Step] = {
    "kernels": functools.partial(adaptive_kl, backend="triton"),
    "PyTorch backend": functools.partial(adaptive_kl, backend="torch"),
    "authors": authors_adaptive_kl,
}


def cost(student: Tensor, teacher: Tensor, loss: Loss = adaptive_kl) -> dict[str, float]:
    """The bytes and PTX instructions of forward and backward, per position."""
    both = per_position(two_launches(loss, student, teacher)["both"], student)
    return {
        "bytes": both["bytes_read"] + both["bytes_written"],
        "instructions": both["instructions"],
    }


def over_rows(largest: int) -> list[dict[str, Any]]:
    """The cost of one row, repeated."""
    student, teacher = real_logits(1)
    found = []
    for v, all_rows in ROWS_AT.items():
        row = [x.bfloat16() for x in resampled(student, teacher, v, v)]
        for n in (n for n in all_rows if n <= largest):
            s, t = (x.expand(n, v).contiguous() for x in row)
            found.append({"vocabulary": v, "rows": n, **cost(s, t)})
    return found


def over_vocabularies(vocabularies: Sequence[int]) -> list[dict[str, Any]]:
    """The cost of two sweeps (a fixed weight), which V alone changes, and that with the scans for
    the head."""
    student, teacher = real_logits(ROWS_OF_V)
    found = []
    for v in vocabularies:
        s, t = (x.bfloat16() for x in resampled(student, teacher, v, v))
        fixed = cost(s, t, mixed_kl)
        found.append({"vocabulary": v, "rows": len(s), "fixed": fixed, "adaptive": cost(s, t)})
    return found


def flat_from(found: Sequence[dict[str, Any]], loss: str, what: str) -> int:
    """The smallest V from which the cost stays within 5 % of that of the largest."""
    last: float = found[-1][loss][what]
    uneven: list[int] = [
        f["vocabulary"] for f in found if abs(f[loss][what] / last - 1) > FLAT_WITHIN
    ]
    sizes: list[int] = [f["vocabulary"] for f in found]
    return min(v for v in sizes if v > max(uneven, default=0))


def saved_state() -> list[dict[str, Any]]:
    """The fp32 numbers that are kept for the backward pass of a row."""
    found = []
    for n, v in SAVED_AT:
        student, teacher = make_logits(n, v, torch.device("cpu"), torch.bfloat16)
        entry: dict[str, Any] = {"rows": n, "vocabulary": v}
        with ptxcpu.active(arch=ARCH):
            for name, loss in LOSSES.items():
                entry[name] = saved_bytes(loss, student, teacher) / 4 / n
        found.append(entry)
    return found


def peak_memories(largest: int) -> list[dict[str, Any]]:
    """The bytes beyond the two inputs at the peak of forward and backward, at V = SMALL_V."""
    found = []
    for n in (n for n in MEMORY_ROWS if n <= largest):
        student, teacher = make_logits(n, SMALL_V, torch.device("cpu"), torch.bfloat16)
        entry: dict[str, Any] = {"rows": n, "vocabulary": SMALL_V, "gradient": student.nbytes}
        with ptxcpu.active(arch=ARCH):
            for name, loss in LOSSES.items():
                if name != "authors" or student.numel() <= AUTHORS_AT_MOST:
                    entry[name] = _peak(loss, student, teacher)
        found.append(entry)
    return found


def _peak(loss: Step, student: Tensor, teacher: Tensor) -> int:
    def step() -> None:
        loss(student, teacher).backward()  # type: ignore[no-untyped-call]

    student.grad = None
    return peak_memory(step, student.device)


def collect(
    vocabularies: Sequence[int] = VOCABULARIES, largest_rows: int = LARGEST_ROWS
) -> dict[str, Any]:
    """All tables; `largest_rows` bounds N."""
    return {
        "arch": f"sm_{ARCH}",
        "over_rows": over_rows(largest_rows),
        "over_vocabularies": over_vocabularies(sorted(set(vocabularies))),
        "saved_state": saved_state(),
        "peak_memory": peak_memories(largest_rows),
    }


def markdown(data: dict[str, Any]) -> str:
    """Four tables: over N, over V, saved state, peak memory."""
    of_v = data["over_vocabularies"]
    flat = {
        (loss, what): f"{flat_from(of_v, loss, what):,}"
        for loss in ("fixed", "adaptive")
        for what in ("bytes", "instructions")
    }
    return "\n".join(
        [
            "Cost per vocabulary position of forward + backward in bf16 at T = 1; kernels compiled "
            f"for {data['arch']}, executed on a CPU.",
            "",
            "Over N. A kernel is one program per row, so one row is repeated N times:",
            "",
            "| V | N | bytes | instructions |",
            "| ---: | ---: | ---: | ---: |",
            *(
                f"| {f['vocabulary']:,} | {f['rows']:,} | {f['bytes']:.2f} "
                f"| {f['instructions']:.2f} |"
                for f in data["over_rows"]
            ),
            "",
            f"Over V, {of_v[0]['rows']} real rows resampled (synthetic). With a fixed weight there "
            "are two sweeps and no head. The adaptive weight adds the search for the head, which "
            "depends on the logits. Short rows show the work that is done once a row: the "
            "statistics read the first block twice, and every lane of the gradient loads the "
            "row's numbers.",
            "",
            "| V | fixed weight: bytes | instructions | adaptive: bytes | instructions |",
            "| ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {f['vocabulary']:,} | {f['fixed']['bytes']:.2f} "
                f"| {f['fixed']['instructions']:.1f} | {f['adaptive']['bytes']:.2f} "
                f"| {f['adaptive']['instructions']:.1f} |"
                for f in of_v
            ),
            "| within 5 % of the last from | " + " | ".join(flat[key] for key in flat) + " |",
            "",
            "Kept for the backward beyond the two inputs, in fp32 numbers per row:",
            "",
            f"| N | V | {' | '.join(LOSSES)} |",
            "| ---: | ---: |" + " ---: |" * len(LOSSES),
            *(
                f"| {f['rows']:,} | {f['vocabulary']:,} | "
                + " | ".join(f"{f[name]:,.0f}" for name in LOSSES)
                + " |"
                for f in data["saved_state"]
            ),
            "",
            f"Peak memory beyond the two inputs, V = {SMALL_V:,}, in MiB; the gradient is an "
            "output, and included (the authors' code is left out where it takes gigabytes):",
            "",
            f"| N | gradient | {' | '.join(LOSSES)} |",
            "| ---: | ---: |" + " ---: |" * len(LOSSES),
            *(
                f"| {f['rows']:,} | {f['gradient'] / MIB:.2f} | "
                + " | ".join(f"{f[name] / MIB:.2f}" if name in f else "-" for name in LOSSES)
                + " |"
                for f in data["peak_memory"]
            ),
        ]
    )


def plot(data: dict[str, Any], path: os.PathLike[str]) -> None:
    """Bytes per position against V, and peak memory against N."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    of_v, memory = data["over_vocabularies"], data["peak_memory"]
    for name, colour in (("fixed", "#009E73"), ("adaptive", COLOURS["akl_triton"])):
        left.plot(
            [f["vocabulary"] for f in of_v],
            [f[name]["bytes"] for f in of_v],
            marker="o",
            color=colour,
            label=f"{name} weight",
        )
    left.set_title("bytes per vocabulary position", fontsize=10, loc="left")
    left.set_xlabel("V")
    left.set_ylim(bottom=0)
    for name, colour in zip(
        LOSSES, (COLOURS["akl_triton"], "#56B4E9", COLOURS["authors"]), strict=True
    ):
        measured = [f for f in memory if name in f]
        right.plot(
            [f["rows"] for f in measured],
            [f[name] / MIB for f in measured],
            marker="o",
            color=colour,
            label=name,
        )
    right.set_title(f"peak memory, MiB, V = {SMALL_V:,}", fontsize=10, loc="left")
    right.set_xlabel("N")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle("forward + backward, bf16", fontsize=10)
    figure.savefig(path, dpi=150)
