"""Compare the installed kernels with the float64 oracle on this machine.

Each case runs the loss, its backward and the gradient in place; a fused loss is given heads whose
logits are those of the case, and its gradients are those of its two passes. What is right is the
rule of akl_triton.verify; the errors that are printed are for information.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import akl_triton
from akl_triton import AdaptiveKL, Divergence, DivergenceStats, SparseTeacher
from akl_triton.backend import resolve_backend
from akl_triton.cli import UsageError
from akl_triton.cli.options import resolve_device
from akl_triton.divergences import FAMILY
from akl_triton.sparse import teacher_pairs
from akl_triton.verify import (
    Exact,
    exact,
    exact_of_pairs,
    faults,
    head_faults,
    head_faults_of_pairs,
)

PRODUCT_LIMIT = 2e-4  # of sum_j |x_j y_j|: a library's fp32 product over a whole vocabulary
IGNORED = -100
CHUNK_ROWS = 2  # of a fused loss: several chunks
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

ROWS = 8
# The interpreter runs every kernel in Python: there, rows are few and short.
INTERPRETED_ROWS, INTERPRETED_VOCABULARY = 3, 4099

Edit = Callable[[Tensor, Tensor, Tensor], None]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    vocabulary: int = 32000
    longer_by: int = 0  # tokens that only the teacher has
    student_dtype: torch.dtype = BF16
    teacher_dtype: torch.dtype = BF16
    divergence: Divergence = dataclasses.field(default_factory=AdaptiveKL)
    linear: bool = False  # whether the loss is that of hidden states
    pairs: int = 0  # of which the teacher is made, if not of all its logits
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    edit: Edit | None = None  # changes (student, teacher, labels) in place


class Inputs(NamedTuple):
    student: Tensor  # [N, V_s]
    teacher: Tensor | SparseTeacher  # [N, V_t], or pairs
    labels: Tensor  # [N]
    upstream: Tensor  # [N]


class Result(NamedTuple):
    loss_error: float  # of 1 + |loss|
    gradient_error: float  # beyond the rounding of its dtype
    faults: list[str]


def _same(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    student.copy_(teacher)


def _all_equal(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    teacher.fill_(1.0)


def _one_hot(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    teacher.fill_(-100.0)
    teacher[:, teacher.shape[1] // 3] = 100.0


def _forbid(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    teacher[:, 1::7] = -torch.inf
    student[:, 2::5] = -torch.inf


def _ignore(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    labels[::2] = IGNORED
    student[::2] = torch.nan
    teacher[::2] = torch.inf


def _ignore_one(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    labels[1] = IGNORED


def _ignore_all(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    labels.fill_(IGNORED)


def _break_one(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    student[1, 3] = torch.nan


CASES = (
    *(Case("bf16", v) for v in (1, 2, 31, 1024, 32000, 49152, 50257, 128256)),
    Case("teacher has more tokens", 151936, longer_by=128),
    Case("fp32", 50257, student_dtype=FP32, teacher_dtype=FP32),
    Case("fp16", 50257, student_dtype=FP16, teacher_dtype=FP16),
    Case("fp32 teacher", teacher_dtype=FP32),
    Case("fp32 student", student_dtype=FP32, teacher_dtype=FP16),
    *(Case(f"T = {t}", options={"temperature": t}) for t in (0.5, 2.0, 4.0)),
    *(Case(f"mu = {mu}", divergence=AdaptiveKL(mu)) for mu in (0.01, 0.9, 0.999)),
    Case("inclusive head", divergence=AdaptiveKL(head="inclusive")),
    Case("ties averaged", divergence=AdaptiveKL(ties="average"), options={"temperature": 2.0}),
    Case("both of these", divergence=AdaptiveKL(head="inclusive", ties="average")),
    Case("softcap of 30", options={"student_softcap": 30.0, "teacher_softcap": 30.0}),
    Case("logit scales", options={"student_logit_scale": 0.5, "teacher_logit_scale": 2.0}),
    Case("kd_ratio = 0.5", 50257, options={"kd_ratio": 0.5}),
    Case("kd_ratio, hidden states", options={"kd_ratio": 0.5, "temperature": 2.0}, linear=True),
    Case("all teacher logits equal", edit=_all_equal),
    Case("one-hot teacher", edit=_one_hot),
    Case("student = teacher", edit=_same),
    Case("-inf on either side", edit=_forbid),
    Case("ignored rows hold NaN", edit=_ignore),
    Case("all rows ignored", edit=_ignore_all),
    Case("one row holds NaN", edit=_break_one),
    Case("hidden states", 128256, linear=True, edit=_ignore_one),
    Case("hidden states", student_dtype=FP32, teacher_dtype=FP32, linear=True),
    Case("teacher of 64 pairs", 50257, pairs=64, edit=_ignore_one),
    Case("64 pairs, hidden states", pairs=64, linear=True),
    Case(
        "64 pairs of another loss",
        pairs=64,
        divergence=FAMILY["jensen_shannon"](),
        options={"temperature": 2.0, "kd_ratio": 0.5},
    ),
    *(
        Case(name, divergence=kind(), edit=_forbid)
        for name, kind in FAMILY.items()
        if kind is not AdaptiveKL
    ),
)


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    device = resolve_device(arguments.device)
    try:
        backend = resolve_backend(arguments.backend, device.type)
    except ValueError as error:
        raise UsageError(str(error)) from error
    started = time.perf_counter()
    table = Table(
        title=f"{backend} backend on {device}, against the float64 oracle",
        caption="loss error: of 1 + |loss|; grad error: beyond the rounding of its dtype",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    # In a narrow terminal the names give way, for they alone may wrap.
    table.add_column("", no_wrap=True)
    table.add_column("case")
    table.add_column("dtype", no_wrap=True)
    for column in ("V", "loss\nerror", "grad\nerror", "faults"):
        table.add_column(column, justify="right", no_wrap=True)
    failed, found = 0, []
    for case in track(CASES, "Checking", console=console, transient=True):
        student, teacher, labels = make_inputs(case)
        result = compare(case, student.to(device), teacher.to(device), labels, backend)
        failed += bool(result.faults)
        table.add_row(
            "[bold red]FAILED" if result.faults else "[green]ok",
            case.name,
            "/".join(dict.fromkeys(SHORT[x.dtype] for x in (student, teacher))),
            f"{teacher.shape[1]:,}",
            f"{result.loss_error:.0e}",
            f"{result.gradient_error:.0e}",
            str(len(result.faults)),
        )
        found += [f"{case.name}: {fault}" for fault in result.faults]
    console.print(table)
    for fault in found:
        console.print(fault, markup=False)
    console.print(
        f"{len(CASES) - failed} of {len(CASES)} cases agree, {time.perf_counter() - started:.0f} s"
    )
    return 1 if failed else 0


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits [N, V] that fall off as a language model's do, labels [N]."""
    rows, vocabulary = ROWS, case.vocabulary
    if _interpreted():
        rows, vocabulary = INTERPRETED_ROWS, min(vocabulary, INTERPRETED_VOCABULARY)
    generator = torch.Generator().manual_seed(vocabulary)
    rank = torch.rand(rows, vocabulary + case.longer_by, generator=generator).argsort(-1) + 1.0
    noise = torch.randn(2, *rank.shape, generator=generator)
    teacher = noise[0] - 2.0 * rank.log()
    student = (teacher + noise[1])[:, :vocabulary].to(case.student_dtype)
    teacher = teacher.to(case.teacher_dtype)
    labels = torch.arange(rows) * (vocabulary - 1) // rows
    if case.edit:
        case.edit(student, teacher, labels)
    return student, teacher, labels


def compare(case: Case, student: Tensor, teacher: Tensor, labels: Tensor, backend: str) -> Result:
    """The worst over the rows of one case: forward, backward, and the gradient in place."""
    upstream = torch.linspace(-1.0, 2.0, len(labels))
    evaluate = through_heads if case.linear else on_logits
    known: Tensor | SparseTeacher = teacher.cpu()
    if case.pairs:  # on the CPU, as another device may choose others of equal logits
        known = teacher_pairs(teacher.cpu(), case.pairs, case.options.get("temperature", 1.0))
    given = known.to(student.device)
    outcome = evaluate(case, student, given, labels.to(student.device), upstream, backend)
    return judge(case, Inputs(student.cpu(), known, labels, upstream), outcome)


def judge(case: Case, inputs: Inputs, outcome: Outcome) -> Result:
    """The rows that count against the oracle, and the others against 0."""
    valid = inputs.labels != IGNORED
    student, labels, upstream = (x[valid] for x in (inputs.student, inputs.labels, inputs.upstream))
    loss, stats = outcome.loss.cpu(), outcome.stats
    claims = {name: column.cpu()[valid] for name, column in stats._asdict().items()}
    found = []
    for name, rows in (("loss", loss[:, None]), *(("gradient", g) for _, g in outcome.gradients)):
        if (rows.cpu()[~valid] != 0).any():
            found.append(f"{name}: not exactly 0 where a token is ignored")
    if not valid.any():
        return Result(0.0, 0.0, found)
    of, of_head = of_oracle(case, student, inputs.teacher, valid, labels, claims)
    found += of_head
    found += faults(loss[valid], None, of)
    roundings = 1.0 if _interpreted() else 0.5  # the interpreter truncates
    for up, gradient in outcome.gradients:
        gradient = gradient.cpu()[valid]
        found += faults(None, gradient, of, upstream=up.cpu()[valid], roundings=roundings)
    rounding = torch.finfo(student.dtype).eps
    scale = 1.0 + of.oracle.loss.abs()
    loss_error = worst((loss[valid] / scale)[:, None], (of.oracle.loss / scale)[:, None], 0.0)
    gradient_error = 0.0
    for up, gradient in outcome.gradients:
        exact_gradient = up.cpu()[valid, None] * of.oracle.grad
        error = worst(gradient.cpu()[valid], exact_gradient, rounding * exact_gradient.abs())
        gradient_error = max(gradient_error, error)
    if outcome.hidden_gradient is not None:
        # The product over the vocabulary is a library's.
        exact_gradient = upstream[:, None] * of.oracle.grad
        rows = valid.nonzero().flatten()
        size = student.abs().max().item()
        weight = student.double().t() / size
        stored = max(rounding, PRODUCT_LIMIT) * (exact_gradient.abs() @ weight.abs())
        actual = outcome.hidden_gradient.cpu()[valid][:, rows] / size
        if worst(actual, exact_gradient @ weight, stored) > 0.0:
            found.append("gradient of the hidden states: further off than a product in fp32")
    return Result(loss_error, gradient_error, found)


def of_oracle(
    case: Case,
    student: Tensor,
    teacher: Tensor | SparseTeacher,
    valid: Tensor,
    labels: Tensor,
    claims: dict[str, Any],
) -> tuple[Exact, list[str]]:
    """The oracle of the rows that count, and the faults of their heads."""
    divergence, found = case.divergence, []
    weight, gap = claims["forward_weight"], claims["gap"]
    of_head = {name: claims[name] for name in ("head_size", "head_mass", "forward_weight")}
    maps = {name: value for name, value in case.options.items() if name != "kd_ratio"}
    if isinstance(teacher, Tensor):
        teacher = teacher[valid]
        if isinstance(divergence, AdaptiveKL):
            found = head_faults(student, teacher, **of_head, **vars(divergence), **maps)
        taken = {"size": claims["head_size"], "forward_weight": weight, "gap": gap}
        return exact(divergence, student, teacher, labels=labels, **taken, **case.options), found
    assert teacher.log_tail is not None
    pairs = dataclasses.replace(
        teacher,
        ids=teacher.ids[valid],
        log_probs=teacher.log_probs[valid],
        log_tail=teacher.log_tail[valid],
    )
    maps.pop("temperature", None)  # the pairs have it
    if isinstance(divergence, AdaptiveKL):
        found = head_faults_of_pairs(divergence, student, pairs, **of_head, gap=gap, **maps)
    ratio = case.options.get("kd_ratio", 1.0)
    of_labels = {"labels": labels, "kd_ratio": ratio} if ratio < 1.0 else {}
    taken = {"head_size": claims["head_size"], "forward_weight": weight, "gap": gap}
    return exact_of_pairs(divergence, student, pairs, **taken, **of_labels, **maps), found


class Outcome(NamedTuple):
    """The results of a loss for a case, on the device."""

    loss: Tensor  # [N]
    stats: DivergenceStats  # [N] each
    # (upstream [N], gradient [N, V_s] of sum upstream * loss), in each way that there is
    gradients: list[tuple[Tensor, Tensor]]
    hidden_gradient: Tensor | None  # [N, N] of fused losses


def on_logits(
    case: Case,
    student: Tensor,
    teacher: Tensor | SparseTeacher,
    labels: Tensor,
    upstream: Tensor,
    backend: str,
) -> Outcome:
    def evaluate(**options: Any) -> tuple[Any, Tensor]:
        leaf = student.clone().requires_grad_()
        loss_function: Any = akl_triton.distillation_loss  # its options are not known here
        output = loss_function(
            leaf.clone(),  # a leaf cannot be overwritten
            teacher,
            labels,
            divergence=case.divergence,
            reduction="none",
            backend=backend,
            **case.options,
            **options,
        )
        loss = output[0] if isinstance(output, tuple) else output
        loss.backward(upstream.to(student.device))
        assert leaf.grad is not None
        return output, leaf.grad

    (loss, stats), gradient = evaluate(return_stats=True)
    _, gradient_in_place = evaluate(inplace=True)
    return Outcome(
        loss.detach(), stats, [(upstream, gradient), (upstream, gradient_in_place)], None
    )


def through_heads(
    case: Case,
    student: Tensor,
    teacher: Tensor | SparseTeacher,
    labels: Tensor,
    upstream: Tensor,
    backend: str,
) -> Outcome:
    """With hidden states I and weights that are the transposed logits, the products are exact."""
    n, device = len(labels), student.device

    def evaluate(upstream: Tensor, **options: Any) -> tuple[Any, Tensor, Tensor]:
        hidden = torch.eye(n, device=device, dtype=student.dtype).requires_grad_()
        weight = student.t().contiguous().requires_grad_()
        row_bytes = student[0].nbytes
        of_teacher: tuple[Any, ...] = teacher, None
        if isinstance(teacher, Tensor):
            row_bytes += teacher[0].nbytes
            identity = torch.eye(n, device=device, dtype=teacher.dtype)
            of_teacher = identity, teacher.t().contiguous()
        loss_function: Any = akl_triton.linear_distillation_loss
        output = loss_function(
            hidden,
            weight,
            *of_teacher,
            labels,
            divergence=case.divergence,
            chunk_bytes=CHUNK_ROWS * row_bytes,
            backend=backend,
            **case.options,
            **options,
        )
        loss = output[0] if isinstance(output, tuple) else output
        loss.backward(upstream)
        assert hidden.grad is not None and weight.grad is not None
        return output, weight.grad.t(), hidden.grad

    up = upstream.to(device)
    (loss, stats), late, hidden_gradient = evaluate(up, reduction="none", return_stats=True)
    _, of_sum, _ = evaluate(torch.ones((), device=device), reduction="sum")
    return Outcome(
        loss.detach(), stats, [(up, late), (torch.ones_like(up), of_sum)], hidden_gradient
    )


def worst(actual: Tensor, exact: Tensor, allowed: Tensor | float) -> float:
    """Largest error in [N, K] beyond what is allowed."""
    error = (actual - exact).abs() - allowed
    error = torch.where(actual.isnan() & exact.isnan(), 0.0, error).nan_to_num(torch.inf)
    return float(error.max().clamp(min=0.0))
