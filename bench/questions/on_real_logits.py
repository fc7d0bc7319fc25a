"""`python -m bench on_real_logits`: the PyTorch backend and the authors' code, on real logits.

Time and memory of forward and backward are measured on this CPU (medians, in turn). Heads are
compared row by row with those of the authors' sort and with the float64 oracle, for the PyTorch
backend and for the compiled kernels, whose PTX is executed on this CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from akl_triton import adaptive_kl
from akl_triton.cli.bench import Cost, measure
from akl_triton.reference import authors_adaptive_kl, reference_adaptive_kl
from akl_triton.verify import MU_SLACK
from bench.inputs.machine import cpu
from bench.inputs.real_logits import real_logits
from bench.lab import ptxcpu
from bench.report.tables import table

MU = 0.5
REPEATS = 3  # of a round
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "authors": authors_adaptive_kl,
    "PyTorch backend": adaptive_kl,
}


def authors_head_size(teacher: Tensor) -> Tensor:
    """The number of tokens in the head by the authors' rule and in their arithmetic: fp32 sort and
    cumsum."""
    p = torch.softmax(teacher.float(), dim=-1).sort(dim=-1, descending=True).values
    return (p.cumsum(-1) <= MU).sum(-1).clamp(min=1)


def costs(student: Tensor, teacher: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """The time and temporaries of both, which take turns so that they meet the same
    disturbances."""
    student = student.clone().requires_grad_()
    measured: dict[str, list[Cost]] = {name: [] for name in LOSSES}
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            measured[name].append(measure(loss, student, teacher, REPEATS))
    gradient = student.numel() * student.element_size() / 2**20  # an output, and no temporary
    return {
        name: {
            "milliseconds": statistics.median(milliseconds for milliseconds, _ in of_loss),
            "temporaries_mib": statistics.median(mib for _, mib in of_loss) - gradient,
        }
        for name, of_loss in measured.items()
    }


def heads(student: Tensor, teacher: Tensor) -> dict[str, dict[str, int]]:
    """The number of rows that have the authors' head, the oracle's, and neither of the two.

    In the rounding band, where mu (1 +- verify.MU_SLACK) have different heads, any head of the band
    is right.
    """
    sizes = {}
    _, stats = adaptive_kl(student, teacher, mu=MU, return_stats=True, backend="torch")
    sizes["PyTorch backend"] = stats.head_size
    with ptxcpu.active(arch=90):
        _, stats = adaptive_kl(student, teacher, mu=MU, return_stats=True, backend="triton")
    sizes["compiled kernels"] = stats.head_size
    low, exact, high = (
        reference_adaptive_kl(student, teacher, mu=mu).head_size
        for mu in (MU * (1 - MU_SLACK), MU, MU * (1 + MU_SLACK))
    )
    authors = authors_head_size(teacher)
    in_band = low != high
    return {
        name: {
            "rows": len(size),
            "authors": int((size == authors).sum()),
            "oracle": int((size == exact).sum()),
            "in_band": int(in_band.sum()),
            "wrong": int(
                (((size != authors) & ~in_band) | (size < low) | (size > high)).sum(),
            ),
        }
        for name, size in sizes.items()
    }


def collect(rows: int = 256, rounds: int = 5) -> dict[str, Any]:
    """The costs, and the heads, in fp32 and in bf16."""
    student, teacher = real_logits(rows)
    return {
        "rows": rows,
        "vocabulary": student.shape[1],
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "cases": [
            {
                "dtype": str(dtype).removeprefix("torch."),
                "costs": costs(student.to(dtype), teacher.to(dtype), rounds),
                "heads": heads(student.to(dtype), teacher.to(dtype)),
            }
            for dtype in (torch.float32, torch.bfloat16)
        ],
    }


def markdown(data: dict[str, Any]) -> str:
    """Two tables: costs, and heads."""
    return "\n\n".join(
        [
            f"N = {data['rows']}, V = {data['vocabulary']:,}, T = 1, {data['threads']} threads "
            f"of {data['cpu']}. Forward and backward; the gradient is no temporary. "
            "Temporaries are those of one thread: each thread of the PyTorch backend has its own.",
            table(
                ("dtype", "loss", "ms", "MiB of temporaries"),
                [
                    (
                        *(case["dtype"], name),
                        *(f"{cost['milliseconds']:,.0f}", f"{cost['temporaries_mib']:,.1f}"),
                    )
                    for case in data["cases"]
                    for name, cost in case["costs"].items()
                ],
                texts=2,
            ),
            "Rows whose head is the authors', the oracle's, in the rounding band, and wrong:",
            table(
                ("dtype", "heads of", "rows", "authors'", "oracle's", "in the band", "wrong"),
                [
                    (case["dtype"], name, *(f"{count}" for count in of_rows.values()))
                    for case in data["cases"]
                    for name, of_rows in case["heads"].items()
                ],
                texts=2,
            ),
        ]
    )


def failures(data: dict[str, Any]) -> list[str]:
    """Heads that are neither the authors' nor within the rounding of the boundary."""
    return [
        f"{of_rows['wrong']} heads of the {name} in {case['dtype']}"
        for case in data["cases"]
        for name, of_rows in case["heads"].items()
        if of_rows["wrong"]
    ]
