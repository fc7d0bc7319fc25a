"""Rows of logits of every kind that the kernels must get right, and the yardstick for right.

A result is right if it is no further from the float64 oracle than the same computation in PyTorch's
fp32, its gradient rounded to the dtype of the student, plus an epsilon; and if its head is the
oracle's by the rule of akl_triton.verify.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from akl_triton.kernels import launch
from akl_triton.reference import Head, Ties, mapped_logits, reference_adaptive_kl
from akl_triton.verify import at_head, head_faults
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
# What fp32 can lose where PyTorch happens to lose nothing: a few roundings of a probability.
EPSILON = 1e-6


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
    """What the kernels wrote."""

    loss: Tensor  # [N]
    stats: Tensor  # [N, 6]
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

    Without `statistics` only the sums that the loss needs are made."""
    n, device = student.shape[0], student.device
    if upstream is None:
        upstream = torch.ones(1, device=device).expand(n)
    loss = torch.full((n,), torch.nan, device=device)
    stats = torch.full((n, 6), torch.nan, device=device)
    state = torch.full((n, 8), torch.nan, device=device)
    gradient = torch.full(student.shape, torch.nan, dtype=student.dtype, device=device)
    written = gradient[None] if in_one_launch else None
    launch.forward(
        student[None],
        teacher[None],
        valid,
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
            state,
            upstream,
            temperature=temperature,
            reverse=True,
            **maps,
        )
    return Output(loss, stats, gradient)


def assert_right(
    output: Output,
    student: Tensor,
    teacher: Tensor,
    *,
    upstream: Tensor | None = None,
    mu: float = 0.5,
    temperature: float = 1.0,
    head: Head = "exclusive",
    ties: Ties = "stable",
    weight: float | None = None,
    **maps: Any,
) -> None:
    """Loss, statistics and gradient against the oracle, by the rule above."""
    loss, stats, gradient = (x.cpu() for x in output)
    student, teacher = student.cpu(), teacher.cpu()
    if weight is None:
        rule: dict[str, Any] = {"mu": mu, "temperature": temperature, "head": head, "ties": ties}
        rule |= maps
        faults = head_faults(
            student,
            teacher,
            head_size=stats[:, 4],
            head_mass=stats[:, 3],
            forward_weight=stats[:, 2],
            **rule,
        )
        assert not faults, faults
        w = at_head(student, teacher, stats[:, 4], **rule).exact.forward_weight
        # Where p and q differ by no more than rounding, any weight is as good; ours is the test's.
        w = torch.where(stats[:, 5] < 1e-5, stats[:, 2].double(), w)
    else:
        w = torch.full((len(loss),), weight, dtype=torch.float64)
        assert torch.equal(stats[:, 2], w.float())
    forward, reverse = (
        reference_adaptive_kl(student, teacher, temperature=temperature, weight=fixed, **maps)
        for fixed in (1.0, 0.0)
    )
    exact_loss = w * forward.forward_kl + (1 - w) * forward.reverse_kl
    exact_gradient = w[:, None] * forward.grad + (1 - w[:, None]) * reverse.grad
    torch_loss, torch_gradient, p, q = _in_fp32(student, teacher, temperature, w.float(), **maps)

    scale = torch.ones(len(loss)) if upstream is None else upstream.cpu()
    exact_gradient = exact_gradient * scale[:, None]
    torch_gradient = (torch_gradient * scale[:, None]).to(student.dtype)
    magnitude = exact_loss.abs().clamp(min=1.0)
    _assert_no_further("loss", loss[:, None], torch_loss[:, None], exact_loss, EPSILON * magnitude)
    for name, column, exact in (
        ("forward_kl", 0, forward.forward_kl),
        ("reverse_kl", 1, forward.reverse_kl),
        ("gap", 5, forward.gap),
    ):
        allowed = EPSILON * exact.abs().clamp(min=1.0)
        off = (stats[:, column] - exact).abs()
        # The sums of a row of large logits are as exact as the loss they make.
        allowed = allowed + 2 * (torch_loss - exact_loss).abs()
        assert (off <= allowed).all(), f"{name}: {_rows(off > allowed)} off by {off.max():.1e}"
    # One rounding to the gradient's dtype, and a few of the two terms that may cancel.
    terms = torch.maximum(p, q).amax(1).double() * (1 + forward.reverse_kl) / temperature
    terms = terms * maps.get("student_logit_scale", 1.0)
    # (The interpreter truncates to bf16 where hardware rounds.)
    roundings = 1.0 if INTERPRETER else 0.5
    rounding = roundings * torch.finfo(student.dtype).eps * exact_gradient.abs().amax(1)
    allowed = rounding + EPSILON * terms * scale.abs() + torch.finfo(student.dtype).tiny
    _assert_no_further("gradient", gradient, torch_gradient, exact_gradient, allowed)


def _assert_no_further(
    name: str, ours: Tensor, theirs: Tensor, exact: Tensor, epsilon: Tensor
) -> None:
    """Maximal and RMS error of every row: ours within twice PyTorch's, plus epsilon [N]."""
    exact = exact.reshape(ours.shape)
    for measure, size in (
        ("max", lambda e: e.abs().amax(1)),
        ("rms", lambda e: e.square().mean(1).sqrt()),
    ):
        off, allowed = size(ours.double() - exact), 2 * size(theirs.double() - exact) + epsilon
        wrong = ~(off <= allowed)
        assert not wrong.any(), (
            f"{name}, {measure} error: {_rows(wrong)}: {off[wrong].tolist()}, "
            f"allowed {allowed[wrong].tolist()}"
        )


def _rows(wrong: Tensor) -> str:
    rows = wrong.nonzero().flatten().tolist()
    return "rows " + ", ".join(
        f"{i} ({KINDS[i]})" if len(wrong) == len(KINDS) else str(i) for i in rows
    )


def _in_fp32(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    w: Tensor,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The computation in PyTorch: (loss [N], gradient [N, V_s], p, q), all fp32."""
    s = student.detach().float().clone().requires_grad_()
    v = max(s.shape[1], teacher.shape[1])

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, v - x.shape[1]), value=-torch.inf) / temperature

    t = mapped_logits(teacher.float(), teacher_softcap, teacher_logit_scale)
    log_p = torch.log_softmax(padded(t), dim=-1)
    log_q = torch.log_softmax(
        padded(mapped_logits(s, student_softcap, student_logit_scale)), dim=-1
    )
    kept = log_p.isfinite() & log_q.isfinite()
    p, q = log_p.exp(), log_q.exp()
    u = torch.where(kept, log_p, 0.0) - torch.where(kept, log_q, 0.0)
    loss = w * (p * u).sum(-1) - (1 - w) * (q * u).sum(-1)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), gradient, p.detach(), q.detach()
