"""`python -m bench compiled`: the PyTorch backend and torch.compile of the plain formula, on a CPU.

What is compiled is a loss as one would write it: both log-softmaxes in fp32, and a line or two.
The two sides of a ratio take turns in one process, so that what else runs here meets both. Their
least times are compared, forward and backward together, in one thread. With more (`--threads`) the
ratio says as much of the machine: a process on another core holds up what is compiled at its
barriers, and our threads, which have none, wait for each other at Python's lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from akl_triton import forward_kl, jensen_shannon, reverse_kl
from bench.inputs.machine import cpu
from bench.lab.clock import least_times
from bench.report.tables import table

Loss = Callable[[Tensor, Tensor], Tensor]


def plain_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (x.float().log_softmax(-1) for x in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def plain_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (x.float().log_softmax(-1) for x in (student, teacher))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def plain_jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (x.float().log_softmax(-1) for x in (student, teacher))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1).mean() / 2.0


LOSSES: dict[str, tuple[Loss, Loss]] = {  # ours, and the plain formula
    "forward_kl": (partial(forward_kl, backend="torch"), plain_forward_kl),
    "reverse_kl": (partial(reverse_kl, backend="torch"), plain_reverse_kl),
    "jensen_shannon": (partial(jensen_shannon, backend="torch"), plain_jensen_shannon),
}


def collect(
    rows: int = 256,
    vocabulary: int = 32_000,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    rounds: int = 25,
    threads: int = 1,
) -> dict[str, Any]:
    """Seconds of every loss, ours and compiled."""
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(2, rows, vocabulary, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cases = [
            {"dtype": dtype, "loss": name, **seconds_of(name, logits, dtype, rounds)}
            for dtype in dtypes
            for name in LOSSES
        ]
    finally:
        torch.set_num_threads(before)
    return {
        "cpu": cpu(),
        "threads": threads,
        "rows": rows,
        "vocabulary": vocabulary,
        "rounds": rounds,
        "cases": cases,
    }


def seconds_of(name: str, logits: Tensor, dtype: str, rounds: int) -> dict[str, float]:
    student, teacher = logits.to(getattr(torch, dtype))
    ours, plain = LOSSES[name]
    # Not dynamic, or the second dtype would be compiled for any size.
    compiled = torch.compile(plain, dynamic=False)
    steps = {
        "ours": step_of(ours, student, teacher),
        "compiled": step_of(compiled, student, teacher),
    }
    return least_times(steps, rounds, student.device)


def step_of(loss: Loss, student: Tensor, teacher: Tensor) -> Callable[[], None]:
    leaf = student.detach().clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        loss(leaf, teacher).backward()  # type: ignore[no-untyped-call]

    return step


def markdown(data: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"N = {data['rows']}, V = {data['vocabulary']:,}, T = 1, threads: {data['threads']} of "
            f"{data['cpu']}. Forward and backward, the least of {data['rounds']} rounds in turn.",
            table(
                ("dtype", "loss", "ours, ms", "plain formula compiled, ms", "ratio"),
                [
                    (
                        *(case["dtype"], case["loss"]),
                        *(f"{1e3 * case[which]:.1f}" for which in ("ours", "compiled")),
                        f"{case['ours'] / case['compiled']:.2f}",
                    )
                    for case in data["cases"]
                ],
                texts=2,
            ),
        ]
    )
