"""`python -m bench.on_real_logits`: the PyTorch backend beside the authors' code, on real logits.

Prints time and memory of forward and backward on this CPU (medians, measured in turn), and compares
the heads: row by row with those of the authors' sort, and with the float64 oracle, for the PyTorch
backend and for the compiled kernels (their PTX, executed on this CPU).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from akl_triton import adaptive_kl
from akl_triton.cli.bench import Cost, measure
from akl_triton.reference import authors_adaptive_kl, reference_adaptive_kl
from bench import ptxcpu
from bench.real_logits import real_logits

MU = 0.5
MU_SLACK = 2e-6  # how far rounding may move the boundary


def authors_head_size(teacher: Tensor) -> Tensor:
    """Tokens in the head by the authors' rule and in their arithmetic: fp32 sort and cumsum."""
    p = torch.softmax(teacher.float(), dim=-1).sort(dim=-1, descending=True).values
    return (p.cumsum(-1) <= MU).sum(-1).clamp(min=1)


def compare_costs(student: Tensor, teacher: Tensor, rounds: int) -> None:
    """Time and temporaries, the two taking turns so that both meet the same disturbances."""
    student = student.clone().requires_grad_()
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "authors": authors_adaptive_kl,
        "PyTorch backend": adaptive_kl,
    }
    costs: dict[str, list[Cost]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            costs[name].append(measure(loss, student, teacher, repeats=3))
    gradient = student.numel() * student.element_size() / 2**20
    milliseconds, temporaries = {}, {}
    for name, measured in costs.items():
        milliseconds[name] = statistics.median(m for m, _ in measured)
        temporaries[name] = statistics.median(mib for _, mib in measured) - gradient
        print(
            f"  {name:16} {milliseconds[name]:7.0f} ms, {temporaries[name]:6.1f} MiB of temporaries"
        )
    times = milliseconds["authors"] / milliseconds["PyTorch backend"]
    share = temporaries["PyTorch backend"] / temporaries["authors"]
    print(f"  {times:.1f} times faster, {share:.3f} of the temporaries")


def compare_heads(student: Tensor, teacher: Tensor) -> int:
    """Rows whose head is neither the authors' nor within the rounding of the boundary."""
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
    wrong = 0
    for name, size in sizes.items():
        in_band = low != high
        off = (size != authors) & ~in_band
        outside = (size < low) | (size > high)
        wrong += int(off.sum()) + int(outside.sum())
        print(
            f"  {name:16} {len(size)} heads: {int((size == authors).sum())} the authors', "
            f"{int((size == exact).sum())} the oracle's, {int(in_band.sum())} in the rounding "
            f"band, {int((off | outside).sum())} wrong"
        )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    student, teacher = real_logits(arguments.rows)
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        s, t = student.to(dtype), teacher.to(dtype)
        print(
            f"N = {len(s)}, V = {s.shape[1]:,}, {dtype}, T = 1, {torch.get_num_threads()} threads"
        )
        compare_costs(s, t, arguments.rounds)
        wrong += compare_heads(s, t)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
