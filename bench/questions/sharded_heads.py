"""`python -m bench sharded_heads`: heads over shards of the vocabulary: are all right, and what
does it take?

All ranks are in this process (bench/inputs/lockstep.py): what they compute and send is what those
of a group do. The logits are real (bench/inputs/real_logits.py); the kernels are executed from
their PTX on this CPU. Right is what akl_triton.verify says, of one process in float64.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor

from akl_triton import AdaptiveKL
from akl_triton.divergences import Rule
from akl_triton.kernels.layout import STATISTICS
from akl_triton.verify import exact, faults, head_faults
from bench.inputs.lockstep import Ranks, run_ranks
from bench.inputs.real_logits import real_logits
from bench.lab import ptxcpu
from bench.report.tables import table

RANKS = (2, 4)
TEMPERATURES = (1.0, 2.0, 4.0)
DTYPES = ("bfloat16", "float32")
BACKENDS = ("triton", "torch")
RULES = tuple(itertools.product(("exclusive", "inclusive"), ("stable", "average")))
MEETING = 1  # exchange before all others, of what the ranks were called with
# The most exchanges that a batch may take, by dtype and temperature, and bytes a row and rank.
MOST_EXCHANGES = {("bfloat16", 1.0): 5, ("bfloat16", 2.0): 5, ("bfloat16", 4.0): 6}
MOST_EVER = {"bfloat16": 11, "float32": 16}
MOST_BYTES = 300.0
# Relative: of a loss above 1, and in fp32 of what the entries of a gradient are differences of.
MOST_ERROR = 1e-6


def collect(rows: int = 256) -> dict[str, Any]:
    """A case for each backend, dtype, temperature and number of ranks."""
    student, teacher = real_logits(rows)
    cases = itertools.product(BACKENDS, DTYPES, TEMPERATURES, RANKS)
    return {
        "rows": rows,
        "vocabulary": student.shape[1],
        "cases": [of_case(student, teacher, *case) for case in cases],
    }


def of_case(
    student: Tensor, teacher: Tensor, backend: str, dtype: str, temperature: float, ranks: int
) -> dict[str, Any]:
    """The faults of the heads by all rules, of the PyTorch backend by the first; and by the first
    rules those of loss and gradient, their largest errors, and what is exchanged."""
    sides = student.to(getattr(torch, dtype)), teacher.to(getattr(torch, dtype))
    lines: list[str] = []
    first: dict[str, Any] = {}
    for head, ties in RULES if backend == "triton" else RULES[:1]:
        divergence = AdaptiveKL(head=head, ties=ties)  # type: ignore[arg-type]
        found = on_ranks(*sides, divergence, backend, temperature, ranks)
        lines += faults_of_heads(*sides, divergence, temperature, found)
        if not first:
            first = of_loss(*sides, divergence, temperature, found)
            lines += first.pop("faults")
            alone = on_ranks(*sides, divergence, backend, temperature, ranks, with_stats=False)
            first |= {"exchanges": MEETING + alone.rounds, "bytes": alone.bytes_of_row}
    return {
        "backend": backend,
        "dtype": dtype,
        "temperature": temperature,
        "ranks": ranks,
        "faults": lines,
        **first,
    }


def on_ranks(
    student: Tensor,
    teacher: Tensor,
    divergence: AdaptiveKL,
    backend: str,
    temperature: float,
    ranks: int,
    with_stats: bool = True,
) -> Ranks:
    widths = [len(part) for part in torch.arange(student.shape[1]).tensor_split(ranks)]
    kernels = ptxcpu.active(arch=90) if backend == "triton" else contextlib.nullcontext()
    with kernels:
        return run_ranks(
            student,
            teacher,
            widths,
            Rule(divergence, temperature),
            backend=backend,
            upstream=torch.ones(len(student)),
            with_stats=with_stats,
        )


def stats_of(found: Ranks) -> dict[str, Tensor]:
    return dict(zip(STATISTICS, found.results[0].stats.unbind(1), strict=True))


def faults_of_heads(
    student: Tensor, teacher: Tensor, divergence: AdaptiveKL, temperature: float, found: Ranks
) -> list[str]:
    stats = stats_of(found)
    claims: dict[str, Any] = {
        name: stats[name] for name in ("head_size", "head_mass", "forward_weight")
    }
    lines = head_faults(student, teacher, temperature=temperature, **vars(divergence), **claims)
    if any(not torch.equal(x.loss, found.results[0].loss) for x in found.results):
        lines.append("the ranks have other losses")
    return [f"{divergence}: {line}" for line in lines]


def of_loss(
    student: Tensor, teacher: Tensor, divergence: AdaptiveKL, temperature: float, found: Ranks
) -> dict[str, Any]:
    """The faults of loss and gradient, and their largest errors."""
    stats, loss = stats_of(found), found.results[0].loss
    of_head: dict[str, Any] = {name: stats[name] for name in ("forward_weight", "gap")}
    of_head["size"] = stats["head_size"]
    of = exact(divergence, student, teacher, temperature=temperature, **of_head)
    gradient = torch.cat(found.gradients, dim=-1)
    right, slope = of.oracle.loss, of.oracle.grad
    off = (gradient.double() - slope).abs().amax(1) / of.oracle.terms
    return {
        "faults": faults(loss, gradient, of),
        "loss_error": float(((loss.double() - right).abs() / right.abs().clamp(min=1.0)).max()),
        "gradient_error": float(off.max()),
    }


def markdown(data: dict[str, Any]) -> str:
    rows = [
        (
            case["backend"],
            case["dtype"],
            f"{case['temperature']:g}",
            f"{case['ranks']}",
            f"{len(case['faults'])}",
            f"{case['loss_error']:.1e}",
            f"{case['gradient_error']:.1e}",
            f"{case['exchanges']}",
            f"{case['bytes']:.0f}",
        )
        for case in data["cases"]
    ]
    headings = (
        *("backend", "logits", "T", "ranks", "faults", "loss", "gradient"),
        *("exchanges", "bytes"),
    )
    return (
        f"Adaptive KL of {data['rows']} rows of real logits, V = {data['vocabulary']:,}, whose "
        "vocabulary is sharded. Faults are those of losses, gradients and heads by "
        "akl_triton.verify, of the kernels with both rules of the head and both of ties. Errors "
        "are relative, of losses above 1, and of the largest of what the entries of a row's "
        "gradient are differences of (that of bf16 logits is bf16). Exchanges are those of a "
        "batch, with the first, and bytes what a rank sends for a row.\n\n" + table(headings, rows)
    )


def failures(data: dict[str, Any]) -> list[str]:
    found = []
    for case in data["cases"]:
        name = f"{case['backend']}, {case['dtype']}, T = {case['temperature']:g}, {case['ranks']}"
        found += [f"{name}: {fault}" for fault in case["faults"]]
        most = MOST_EXCHANGES.get((case["dtype"], case["temperature"]), MOST_EVER[case["dtype"]])
        if case["exchanges"] > most:
            found.append(f"{name}: {case['exchanges']} exchanges, more than {most}")
        if case["dtype"] == "bfloat16" and case["bytes"] > MOST_BYTES:
            found.append(f"{name}: {case['bytes']:.0f} bytes a row, more than {MOST_BYTES:.0f}")
        if case["loss_error"] > MOST_ERROR:
            found.append(f"{name}: a loss is off by {case['loss_error']:.1e}")
        if case["dtype"] == "float32" and case["gradient_error"] > MOST_ERROR:
            found.append(f"{name}: a gradient is off by {case['gradient_error']:.1e}")
    return found
