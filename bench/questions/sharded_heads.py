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
from bench.inputs.lockstep import run_ranks
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
MOST_ERROR = 1e-6  # of a loss, where that is less than 1, and of a gradient, of its largest entry


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
    """The faults of all rules of heads and ties, the largest errors, and the most exchanges; of the
    PyTorch backend those of the first rules."""
    sides = student.to(getattr(torch, dtype)), teacher.to(getattr(torch, dtype))
    wanted = RULES if backend == "triton" else RULES[:1]
    rules = [of_rule(*sides, backend, temperature, ranks, *rule) for rule in wanted]
    largest = {name: max(rule[name] for rule in rules) for name in rules[0] if name != "faults"}
    return {
        "backend": backend,
        "dtype": dtype,
        "temperature": temperature,
        "ranks": ranks,
        "faults": [fault for rule in rules for fault in rule["faults"]],
        **largest,
    }


def of_rule(
    student: Tensor,
    teacher: Tensor,
    backend: str,
    temperature: float,
    ranks: int,
    head: Any,
    ties: Any,
) -> dict[str, Any]:
    divergence = AdaptiveKL(head=head, ties=ties)
    widths = [len(part) for part in torch.arange(student.shape[1]).tensor_split(ranks)]
    upstream = torch.ones(len(student))
    rule = Rule(divergence, temperature)

    def run(with_stats: bool) -> Any:
        kernels = ptxcpu.active(arch=90) if backend == "triton" else contextlib.nullcontext()
        with kernels:
            return run_ranks(
                student, teacher, widths, rule,
                backend=backend, upstream=upstream, with_stats=with_stats,
            )  # fmt: skip

    found = run(with_stats=True)
    of_all = found.results[0]
    stats = dict(zip(STATISTICS, of_all.stats.unbind(1), strict=True))
    claims = {name: stats[name] for name in ("head_size", "head_mass", "forward_weight")}
    lines = head_faults(student, teacher, temperature=temperature, **vars(divergence), **claims)
    of = exact(
        divergence, student, teacher, temperature=temperature, size=stats["head_size"],
        forward_weight=stats["forward_weight"], gap=stats["gap"],
    )  # fmt: skip
    gradient = torch.cat(found.gradients, dim=-1)
    lines += faults(of_all.loss, gradient, of)
    if any(not torch.equal(result.loss, of_all.loss) for result in found.results):
        lines.append("the ranks have other losses")
    loss, slope = of.oracle.loss, of.oracle.grad
    off = (gradient.double() - slope).abs().amax(1) / slope.abs().amax(1).clamp(min=1e-30)
    without = run(with_stats=False)
    return {
        "faults": lines,
        "loss_error": float(
            ((of_all.loss.double() - loss).abs() / loss.abs().clamp(min=1.0)).max()
        ),
        "gradient_error": float(off.max()),
        "exchanges": MEETING + without.rounds,
        "bytes": without.bytes_of_row,
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
        "vocabulary is sharded: of the kernels the largest of both rules of the head and both of "
        "ties. Faults are "
        "those of heads, losses and gradients by akl_triton.verify; errors are of the loss, where "
        "it is below 1, and of the gradient, of a row's largest entry (bf16 logits have bf16 "
        "gradients). Exchanges are those of a batch, with the first, and bytes what a rank sends "
        "for a row.\n\n" + table(headings, rows)
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
