"""Rows of logits of every kind that the kernels must get right, and launches of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from akl_triton.divergences import AdaptiveKL, Head, MixedKL, Ties
from akl_triton.kernels import launch
from akl_triton.kernels.layout import STATE_WIDTH, STATISTICS
from akl_triton.reference import reference_adaptive_kl
from akl_triton.verify import EPSILON, YARDSTICK, exact, faults, head_faults
from tests.kernels.conftest import INTERPRETER

KINDS = (
    "normal",
    "peaked",
    "zipf",
    "flat",
    "one-hot",
    "all equal",
    "ties",
    "student is teacher",
    # The interpreter rounds scale * x before it subtracts, where compiled kernels have an FMA:
    # large arguments are for those.
    *(() if INTERPRETER else ("large", "late maximum")),
)


def make_rows(
    v_s: int, v_t: int, student: torch.dtype, teacher: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student [kinds, v_s] and teacher [kinds, v_t], a row of every kind."""
    g = torch.Generator().manual_seed(seed)
    v = max(v_s, v_t)
    rank = torch.randperm(v, generator=g).float() + 1
    noise = torch.randn(10, v, generator=g)
    t = {
        "normal": 3 * noise[0],
        "peaked": 1.5 * noise[1] + 12 * (rank == 1),
        "zipf": -1.1 * rank.log(),
        "flat": 0.01 * noise[3],
        "one-hot": torch.where(rank == v // 2 + 1, 30.0, 0.0),
        "all equal": torch.zeros(v),
        "ties": torch.randint(-6, 3, (v,), generator=g).float(),
        "student is teacher": 2 * noise[7],
        "large": 1e4 * torch.tanh(noise[8]),
        # The first block, which sets the reference of the sums, is far below the rest.
        "late maximum": noise[9] + 40.0 * (torch.arange(v) >= v // 2),
    }
    rows_t = torch.stack([t[kind] for kind in KINDS]).to(teacher)
    perturbed = rows_t.float() + torch.randn(len(KINDS), v, generator=g)
    equal = KINDS.index("student is teacher")
    perturbed[equal] = rows_t[equal].float()
    return perturbed[:, :v_s].to(student).contiguous(), rows_t[:, :v_t].contiguous()


class Output(NamedTuple):
    """The tensors that the kernels wrote."""

    loss: Tensor  # [N]
    stats: Tensor  # [N, statistics], without that of labels, of which there are none
    gradient: Tensor  # [N, V_s]


def run(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    upstream: Tensor | None = None,
    mu: float = 0.5,
    temperature: float = 1.0,
    head: Head = "exclusive",
    ties: Ties = "stable",
    weight: float | None = None,
    in_one_launch: bool = False,
    statistics: bool = True,
    **maps: Any,
) -> Output:
    """Forward and backward of [N, V] logits through the launchers, into outputs full of NaN.

    Without `statistics` only the sums that the loss needs are computed."""
    n, device = student.shape[0], student.device
    if upstream is None:
        upstream = torch.ones(1, device=device).expand(n)
    loss = torch.full((n,), torch.nan, device=device)
    stats = torch.full((n, len(STATISTICS)), torch.nan, device=device)
    state = torch.full((n, STATE_WIDTH), torch.nan, device=device)
    gradient = torch.full(student.shape, torch.nan, dtype=student.dtype, device=device)
    written = gradient[None] if in_one_launch else None
    launch.forward(
        student[None],
        teacher[None],
        valid,
        None,
        loss,
        None if in_one_launch else state,
        stats if statistics else None,
        mu=mu,
        temperature=temperature,
        inclusive=head == "inclusive",
        stable=ties == "stable",
        weight=weight,
        gradient=written,
        upstream=upstream if in_one_launch else None,
        **maps,
    )
    if not in_one_launch:
        launch.backward(
            gradient[None],
            student[None],
            teacher[None],
            valid,
            None,
            state,
            upstream,
            temperature=temperature,
            weight=weight,
            **maps,
        )
    return Output(loss, stats[:, :-1], gradient)


def assert_right(
    output: Output,
    student: Tensor,
    teacher: Tensor,
    *,
    upstream: Tensor | None = None,
    mu: float = 0.5,
    head: Head = "exclusive",
    ties: Ties = "stable",
    weight: float | None = None,
    **maps: Any,
) -> None:
    """Compare loss, statistics and gradient with the oracle, by the rules of akl_triton.verify."""
    loss, stats, gradient = (x.cpu() for x in output)
    student, teacher = student.cpu(), teacher.cpu()
    claims = dict(zip(STATISTICS[:-1], stats.unbind(1), strict=True))
    divergence = MixedKL(weight) if weight is not None else AdaptiveKL(mu, head, ties)
    if weight is None:
        of_head = {name: claims[name] for name in ("head_size", "head_mass", "forward_weight")}
        rule: dict[str, Any] = {"mu": mu, "head": head, "ties": ties, **maps}
        assert_none(head_faults(student, teacher, **of_head, **rule))
    else:
        assert torch.equal(claims["forward_weight"], torch.full_like(loss, weight))
    of = exact(
        divergence,
        student,
        teacher,
        size=claims["head_size"],
        forward_weight=claims["forward_weight"],
        gap=claims["gap"],
        **maps,
    )
    # (The interpreter truncates to bf16 where hardware rounds.)
    roundings = 1.0 if INTERPRETER else 0.5
    assert_none(faults(loss, gradient, of, upstream=upstream, roundings=roundings))
    sums = reference_adaptive_kl(student, teacher, weight=0.5, **maps)
    # The sums of a row of large logits are as exact as the loss they make.
    of_loss = YARDSTICK * (of.fp32.loss - of.oracle.loss).abs()
    of_sides = ("student_entropy", "teacher_entropy", "top1_agreement")
    for name in ("forward_kl", "reverse_kl", "gap", *of_sides):
        correct = getattr(sums, name)
        off = (claims[name] - correct).abs()
        # An entropy is the difference of two numbers that may be log2 of SUM_LIMIT.
        epsilon = 4.0 * EPSILON if name in of_sides else EPSILON
        allowed = epsilon * correct.abs().clamp(min=1.0) + of_loss
        assert (off <= allowed).all(), f"{name} is off by {off.tolist()}"


def assert_none(found: list[str]) -> None:
    assert not found, "\n".join(found) + f"\nkinds: {', '.join(KINDS)}"
