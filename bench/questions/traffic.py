"""`python -m bench traffic`: the bytes and instructions of the compiled kernels on real logits.

The kernels are compiled for sm_90 and their PTX is executed on this CPU, which counts (see
bench/lab/ptxcpu). All figures are per vocabulary position, one (teacher, student) pair of logits,
unless they say "row". There is no cache in this count: it leaves out what the L2 saves.

    bytes          what the lanes ask for
    sectors        bytes of the distinct 32-byte sectors of each request
    compulsory     bytes of the distinct sectors that a launch touches: each read and written once
    instructions   dynamic PTX instructions of one lane: 32 x those of the warps, over positions
    scans          readings of the teacher's row for the boundary, in rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from akl_triton import adaptive_kl, mixed_kl
from bench.inputs.real_logits import TEXTS, real_logits, resampled
from bench.lab import ptxcpu

ARCH = 90
REAL_VOCABULARY = 49_152
# (V of the student, V of the teacher); the logits are resampled from real ones.
SYNTHETIC = ((32_000, 32_000), (50_257, 50_257), (128_256, 128_256), (151_936, 152_064))
ROWS = 80
SYNTHETIC_ROWS = 20
TEMPERATURES = (1.0, 2.0, 4.0)

Totals = dict[str, float]
Loss = Callable[..., Tensor]


def totals(counters: ptxcpu.Counters) -> Totals:
    """The sum of the counts of all kernels."""

    def add(name: str) -> int:
        return sum(int(of_kernel.get(name, 0)) for of_kernel in counters.values())

    return {
        "bytes_read": add("gld_bytes"),
        "bytes_written": add("gst_bytes"),
        "sectors_read": add("gld_sectors") * 32,
        "sectors_written": add("gst_sectors") * 32,
        "compulsory_read": add("footprint_read"),
        "compulsory_written": add("footprint_write"),
        "instructions": add("warp_instr") * 32,
        "barriers": add("barriers"),
        "divergent_blocks": add("div_blocks"),
        "launches": add("launches"),
    }


def two_launches(loss: Loss, student: Tensor, teacher: Tensor, **options: Any) -> dict[str, Totals]:
    """The counts of the forward, of the backward and of both."""
    leaf = student.detach().requires_grad_()
    with ptxcpu.active(arch=ARCH) as counters:
        value = loss(leaf, teacher, **options, backend="triton")
        forward = totals(counters)
        counters.reset()
        value.backward()  # type: ignore[no-untyped-call]
        backward = totals(counters)
    both = {name: forward[name] + backward[name] for name in forward}
    return {"forward": forward, "backward": backward, "both": both}


def one_launch(loss: Loss, student: Tensor, teacher: Tensor, **options: Any) -> Totals:
    """The counts of the forward that also computes the gradient, in place."""
    consumed = student.detach().requires_grad_().clone()
    with ptxcpu.active(arch=ARCH) as counters:
        # The backward finds the factor 1 and reads no row.
        value = loss(consumed, teacher, **options, inplace=True, backend="triton")
        value.backward()  # type: ignore[no-untyped-call]
        return totals(counters)


def per_position(counts: Totals, student: Tensor) -> Totals:
    """The counts over vocabulary positions; barriers and divergence over rows."""
    rows, positions = student.shape[0], student.numel()
    of_rows = ("barriers", "divergent_blocks", "launches")
    return {
        name: count / (rows if name in of_rows else positions) for name, count in counts.items()
    }


def scans(student: Tensor, teacher: Tensor, temperature: float) -> dict[str, list[float]]:
    """The part of the teacher's row that is read for the boundary, row by row, in rows.

    It is what the adaptive forward reads beyond the forward of a fixed weight that is asked for the
    gap, which makes the same sweeps except those for the head. "boundary" is that of
    ties="average"; "cut" is what ties="stable" adds, including the second look that the divergence
    takes at the block of the cut.
    """
    row_bytes = teacher.shape[1] * teacher.element_size()
    found: dict[str, list[float]] = {"boundary": [], "cut": []}
    with ptxcpu.active(arch=ARCH) as counters:

        def read(loss: Loss, row: int, **options: Any) -> float:
            counters.reset()
            rows = student[row : row + 1], teacher[row : row + 1]
            loss(*rows, temperature=temperature, backend="triton", **options)
            return totals(counters)["bytes_read"]

        for row in range(len(student)):
            fixed = read(mixed_kl, row, return_stats=True)
            average = read(adaptive_kl, row, ties="average")
            stable = read(adaptive_kl, row, ties="stable")
            found["boundary"].append((average - fixed) / row_bytes)
            found["cut"].append((stable - average) / row_bytes)
    return found


def summarise(of_rows: dict[str, list[float]]) -> dict[str, float]:
    boundary, cut = np.array(of_rows["boundary"]), np.array(of_rows["cut"])
    both = boundary + cut
    return {
        "mean": both.mean(),
        "p99": np.percentile(both, 99),
        "max": both.max(),
        "boundary_mean": boundary.mean(),
        "cut_mean": cut.mean(),
        "rows_without": (boundary < 0.5).mean(),
    }


def case(student: Tensor, teacher: Tensor, temperature: float, synthetic: bool) -> dict[str, Any]:
    """All figures of one pair of logits at one temperature."""
    of_phase = {
        **two_launches(adaptive_kl, student, teacher, temperature=temperature),
        "with_gradient": one_launch(adaptive_kl, student, teacher, temperature=temperature),
    }
    return {
        "vocabulary_student": student.shape[1],
        "vocabulary_teacher": teacher.shape[1],
        "dtype": str(student.dtype).removeprefix("torch."),
        "temperature": temperature,
        "rows": len(student),
        "synthetic": synthetic,
        **{phase: per_position(counts, student) for phase, counts in of_phase.items()},
        "scans": summarise(scans(student, teacher, temperature)),
    }


def cases(rows: int, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """(student, teacher, synthetic)"""
    student, teacher = real_logits(rows, texts)
    for dtype in (torch.bfloat16, torch.float32):
        yield student.to(dtype), teacher.to(dtype), False
    some = slice(None, None, max(1, rows // SYNTHETIC_ROWS))
    for v_s, v_t in SYNTHETIC:
        s, t = resampled(student[some], teacher[some], v_s, v_t)
        yield s.bfloat16(), t.bfloat16(), True


def collect(
    rows: int = ROWS,
    temperatures: Sequence[float] = TEMPERATURES,
    texts: Sequence[str] = TEXTS,
) -> dict[str, Any]:
    """All cases: real logits in bf16 and fp32, and resampled ones of other vocabularies."""
    return {
        "arch": f"sm_{ARCH}",
        "texts": list(texts),
        "cases": [
            case(student, teacher, temperature, synthetic)
            for student, teacher, synthetic in cases(rows, texts)
            for temperature in temperatures
        ],
    }


COLUMNS = (
    "V",
    "dtype",
    "T",
    "bytes: forward",
    "backward",
    "both",
    "both in sectors",
    "compulsory",
    "in one launch",
    "instructions: forward",
    "backward",
    "in one launch",
    "scans: mean",
    "p99",
    "max",
    "of the mean, the cut",
    "rows with none",
    "barriers",
    "divergent blocks",
)


def markdown(data: dict[str, Any]) -> str:
    """Two tables: real logits, and synthetic ones."""
    of_kind = {kind: [c for c in data["cases"] if c["synthetic"] == kind] for kind in (False, True)}
    real, synthetic = of_kind[False], of_kind[True]
    return "\n".join(
        [
            f"Real logits: SmolLM2-135M and its 12-layer copy, {real[0]['rows']} rows spread over "
            f"{', '.join(data['texts'])}; compiled for {data['arch']}, executed on a CPU.",
            "",
            *_table(real),
            "",
            f"Synthetic logits of other vocabularies, {synthetic[0]['rows']} of the same rows "
            "resampled (`bench.inputs.real_logits.resampled`).",
            "",
            *_table(synthetic),
            "",
            "The figures per vocabulary position are the bytes read and written, without a cache; "
            + "those of the 32-byte sectors of each request; those of every sector once a launch "
            + "(compulsory); and the PTX instructions of a lane. Those per row are the scans of "
            + "the teacher's row for the boundary, and the barriers and divergent basic blocks of "
            + "forward and backward.",
        ]
    )


def _table(cases: list[dict[str, Any]]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " ---: |" * len(COLUMNS)]
    for c in cases:
        both, one, found = c["both"], c["with_gradient"], c["scans"]
        v_s, v_t = c["vocabulary_student"], c["vocabulary_teacher"]
        cells = [
            f"{v_s:,}" if v_s == v_t else f"{v_s:,} / {v_t:,}",
            c["dtype"],
            f"{c['temperature']:g}",
            *(f"{_moved(c[phase], 'bytes'):.1f}" for phase in ("forward", "backward", "both")),
            f"{_moved(both, 'sectors'):.1f}",
            f"{_moved(both, 'compulsory'):.1f}",
            f"{_moved(one, 'bytes'):.1f}",
            *(f"{c[phase]['instructions']:.1f}" for phase in ("forward", "backward")),
            f"{one['instructions']:.1f}",
            f"{found['mean']:.2f}",
            f"{found['p99']:.1f}",
            f"{found['max']:.1f}",
            f"{found['cut_mean']:.2f}",
            f"{100 * found['rows_without']:.0f} %",
            f"{both['barriers']:.0f}",
            f"{both['divergent_blocks']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _moved(counts: Totals, kind: str) -> float:
    return counts[f"{kind}_read"] + counts[f"{kind}_written"]
