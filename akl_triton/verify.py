"""The one rule of what is right, for `akl-triton check`, the tests and the benchmarks.

A head is right if it is the float64 oracle's for some mu' in mu (1 +- MU_SLACK): a cumulative mass
may equal mu to within rounding, and no computation can be asked to decide better than that. Weight
and mass must then be those of the oracle with the head that was taken.

Loss and gradient of a row are right if they are no further from the oracle than YARDSTICK times the
error of the same formulas in fp32, which are the oracle's own code at that dtype, plus an epsilon.
The fp32 gradient is first rounded to the dtype of the student, as it has to be stored. A
computation that does better can be held to a stricter rule by the arguments of `faults`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergences import AdaptiveKL, Divergence
from .kernels.layout import ABSENT
from .reference import (
    DivergenceResult,
    Head,
    ReferenceResult,
    mapped_logits,
    reference_adaptive_kl,
    reference_cross_entropy,
    reference_divergence,
    reference_sparse,
)
from .reference import head_size as size_of_head
from .sparse import SparseTeacher

MU_SLACK = 2e-6
# Relative error allowed in a sum of fp32 probabilities; the weight's error is this over the gap.
MASS_ERROR = 4e-6
YARDSTICK = 2.0
# The error that fp32 may have where the yardstick happens to have none: a few roundings.
EPSILON = 1e-6
# Below this gap the weight of a row is rounding: any is as good as another.
NO_GAP = 1e-5


class TakenHead(NamedTuple):
    """The oracle's view of heads that were taken, one entry per row."""

    exact: ReferenceResult  # with the head that was taken, or the nearest right one
    least: Tensor  # [N] int64, the fewest tokens that a right head has
    most: Tensor  # [N] int64, the most
    wrong: Tensor  # [N] bool, whether the size that was taken is not among them


def at_head(
    student: Tensor,
    teacher: Tensor,
    size: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    head: Head = "exclusive",
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    **options: Any,
) -> TakenHead:
    """The oracle with the heads of `size` [N] tokens that a computation took.

    Takes the options of `reference_adaptive_kl`, except `weight`. A row without a softmax has no
    head, and none that is wrong.
    """
    rule: dict[str, Any] = {
        "temperature": temperature,
        "head": head,
        "teacher_softcap": teacher_softcap,
        "teacher_logit_scale": teacher_logit_scale,
        **options,
    }
    t = teacher.double()
    p = torch.softmax(mapped_logits(t, teacher_softcap, teacher_logit_scale) / temperature, dim=-1)
    order = t.argsort(dim=-1, descending=True, stable=True)
    least, most = (size_of_head(p, order, mu * (1.0 + f * MU_SLACK), head) for f in (-1, 1))
    taken = size.double().nan_to_num(1.0)
    nearest = taken.round().long().clamp(least, most)
    exact = reference_adaptive_kl(student, teacher, size=nearest, **rule)
    wrong = ~((least <= size) & (size <= most) & (size == size.round())) & ~exact.gap.isnan()
    return TakenHead(exact, least, most, wrong)


def head_faults(
    student: Tensor,
    teacher: Tensor,
    *,
    head_size: Tensor,
    head_mass: Tensor,
    forward_weight: Tensor,
    mass_error: float = MASS_ERROR,
    **options: Any,
) -> list[str]:
    """A line for each fault of the heads that a computation claims; none if they are right.

    Args:
        student, teacher: logits [N, V_s] and [N, V_t].
        head_size, head_mass, forward_weight: [N], any float dtype. Rows without a softmax (NaN,
            +inf, or all -inf on a side) must claim NaN in all three.
        mass_error: error allowed in a mass; in a weight, where it is divided by the gap.
        options: those of `at_head`.
    """
    size, mass, w = (x.detach().double().cpu() for x in (head_size, head_mass, forward_weight))
    exact, least, most, wrong = at_head(student, teacher, size, **options)
    sound = ~exact.gap.isnan()
    faults = []
    for name, claim in (("head_size", size), ("head_mass", mass), ("forward_weight", w)):
        if not claim[~sound].isnan().all():
            faults.append(f"{name} of a row without a softmax is not NaN")
        if claim[sound].isnan().any():
            faults.append(f"{name} of a sound row is NaN")
    faults += [
        f"row {i}: head_size {size[i]:g} is not in [{least[i]}, {most[i]}]"
        for i in wrong.nonzero().flatten().tolist()[:4]
    ]
    mass_off = (mass - exact.head_mass).abs()[sound]
    if not (mass_off <= mass_error).all():
        faults.append(f"head_mass is off by {mass_off.max():.2e}")
    # A gap near 0 is itself rounding, and so is its split.
    slack = mass_error * (1.0 + 1.0 / exact.gap.clamp(min=1e-300))
    weight_off = ((w - exact.forward_weight).abs() / slack)[sound]
    if not (weight_off <= 1.0).all():
        worst = weight_off.max()
        faults.append(
            f"forward_weight is off by {worst:.1f} times a rounding of {mass_error:g}/gap"
        )
    return faults


def head_faults_of_pairs(
    divergence: AdaptiveKL,
    student: Tensor,
    teacher: SparseTeacher,
    *,
    head_size: Tensor,
    head_mass: Tensor,
    forward_weight: Tensor,
    gap: Tensor,
    **maps: Any,
) -> list[str]:
    """`head_faults` of a teacher that is pairs, [N, k], whose rows all have a softmax.

    Args:
        head_size, head_mass, forward_weight, gap: [N], as claimed.
        maps: softcap and scale of the student.
    """
    size, mass, w = (x.detach().double().cpu() for x in (head_size, head_mass, forward_weight))
    named = teacher.ids != ABSENT
    p = teacher.entries().double().softmax(-1)[:, :-1]
    order = teacher.log_probs.double().argsort(dim=-1, descending=True, stable=True)
    least, most = (
        size_of_head(p, order, divergence.mu * (1.0 + f * MU_SLACK), divergence.head).minimum(
            named.sum(-1)
        )
        for f in (-1, 1)
    )
    faults = [
        f"row {i}: head_size {size[i]:g} is not in [{least[i]}, {most[i]}]"
        for i in (~((least <= size) & (size <= most))).nonzero().flatten().tolist()[:4]
    ]
    exact = reference_sparse(
        student,
        teacher.ids.where(named, -1),
        teacher.log_probs,
        teacher.log_tail,
        temperature=teacher.temperature,
        size=size.nan_to_num(1.0).long().clamp(least, most),
        ties=divergence.ties,
        **maps,
    )
    slack = MASS_ERROR * (1.0 + 1.0 / gap.double().cpu().clamp(min=1e-300))
    off = (mass - exact.head_mass).abs() > MASS_ERROR
    off |= (w - exact.forward_weight).abs() > slack
    faults += [
        f"row {i}: head_mass {mass[i]:.7f} or forward_weight {w[i]:.7f} is not "
        f"{exact.head_mass[i]:.7f}, {exact.forward_weight[i]:.7f}"
        for i in off.nonzero().flatten().tolist()[:4]
    ]
    return faults


class Exact(NamedTuple):
    """The oracle of any divergence, and its formulas in fp32; one entry per row."""

    oracle: DivergenceResult  # float64
    fp32: DivergenceResult


def exact(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    *,
    forward_weight: Tensor | None = None,
    size: Tensor | None = None,
    gap: Tensor | None = None,
    labels: Tensor | None = None,
    kd_ratio: float = 1.0,
    **maps: Any,
) -> Exact:
    """The loss of logits [N, V_s] and [N, V_t] and its gradient.

    Args:
        labels, kd_ratio: [N] tokens, for a divergence that needs them, and with whose cross-entropy
            it is mixed.
        size, forward_weight, gap: of adaptive KL, the statistics of the computation that is
            compared: w is that of the head it took, or where there is no gap its own.
        maps: temperature, softcaps and logit scales.
    """
    if kd_ratio < 1.0:
        assert labels is not None
        of = exact(
            divergence,
            student,
            teacher,
            labels=labels,
            forward_weight=forward_weight,
            size=size,
            gap=gap,
            **maps,
        )
        student_maps = {name: maps[name] for name in maps if name.startswith("student_")}
        return Exact(
            *(
                _mixed(
                    kd_ratio,
                    part,
                    reference_cross_entropy(student, labels, dtype=part.loss.dtype, **student_maps),
                )
                for part in of
            )
        )
    if not isinstance(divergence, AdaptiveKL):
        numbers = vars(divergence)
        return Exact(
            *(
                reference_divergence(
                    student, teacher, divergence.name, labels=labels, dtype=dtype, **numbers, **maps
                )
                for dtype in (torch.float64, torch.float32)
            )
        )
    rule = {"mu": divergence.mu, "head": divergence.head, "ties": divergence.ties, **maps}
    if size is None or forward_weight is None or gap is None:
        weight = reference_adaptive_kl(student, teacher, **rule).forward_weight
    else:
        weight = at_head(student, teacher, size, **rule).exact.forward_weight
        weight = torch.where(gap < NO_GAP, forward_weight.double(), weight)
    results = (
        reference_adaptive_kl(student, teacher, weight=weight, dtype=dtype, **maps)
        for dtype in (torch.float64, torch.float32)
    )
    return Exact(*(DivergenceResult(r.loss, r.grad, r.terms) for r in results))


def exact_of_pairs(
    divergence: Divergence,
    student: Tensor,
    teacher: SparseTeacher,
    *,
    forward_weight: Tensor | None = None,
    head_size: Tensor | None = None,
    gap: Tensor | None = None,
    labels: Tensor | None = None,
    kd_ratio: float = 1.0,
    **maps: Any,
) -> Exact:
    """`exact` of a teacher that is pairs, [N, k], with the softcap and scale of the student."""
    rule: dict[str, Any] = {
        "outside": teacher.outside,
        "temperature": teacher.temperature,
        **vars(divergence),
        **maps,
    }
    ids = teacher.ids.masked_fill(teacher.ids == ABSENT, -1)
    pairs = ids, teacher.log_probs, teacher.log_tail, divergence.name
    if isinstance(divergence, AdaptiveKL):
        known = None if head_size is None else head_size.double().nan_to_num(1.0).long()
        w = reference_sparse(student, *pairs, size=known, **rule).forward_weight
        if forward_weight is not None and gap is not None:
            w = torch.where(gap < NO_GAP, forward_weight.double(), w)
        rule["weight"] = w
    parts = []
    for dtype in (torch.float64, torch.float32):
        loss, grad, terms, *_ = reference_sparse(student, *pairs, dtype=dtype, **rule)
        part = DivergenceResult(loss, grad, terms)
        if labels is not None:
            of_labels = reference_cross_entropy(student, labels, dtype=dtype, **maps)
            part = _mixed(kd_ratio, part, of_labels)
        parts.append(part)
    return Exact(*parts)


def _mixed(ratio: float, a: DivergenceResult, b: DivergenceResult) -> DivergenceResult:
    """ratio a + (1 - ratio) b"""
    return DivergenceResult(*(ratio * x + (1.0 - ratio) * y for x, y in zip(a, b, strict=True)))


def faults(
    loss: Tensor | None,
    gradient: Tensor | None,
    of: Exact,
    *,
    upstream: Tensor | None = None,
    roundings: float = 0.5,
    yardstick: float = YARDSTICK,
    epsilon: float | Tensor = EPSILON,
    terms: Tensor | None = None,
) -> list[str]:
    """A line for each fault of a loss [N] or a gradient [N, V_s]; none if they are right.

    Args:
        upstream: [N], by which the gradient was multiplied.
        roundings: units in the last place by which its dtype may round it otherwise than the fp32
            gradient: 1 where it truncates, 0 where both have to be rounded alike.
        yardstick: how many times the error of the fp32 formulas is allowed.
        epsilon: a number or [N], the error that is allowed on top, relative to the loss, where that
            exceeds 1, and to `terms`.
        terms: [N, V_s], the size of what each entry of the gradient is a difference of. Left out,
            the largest of a row stands for all of its entries.
    """
    found = []
    oracle, fp32 = of
    if loss is not None:
        allowed = epsilon * oracle.loss.abs().clamp(min=1.0)
        found += _further("loss", loss, fp32.loss, oracle.loss, allowed, yardstick)
    if gradient is not None:
        up = torch.ones(len(gradient)) if upstream is None else upstream.detach().cpu()
        exact_gradient = oracle.grad * up.double()[:, None]
        fp32_gradient = (fp32.grad * up.float()[:, None]).to(gradient.dtype)
        if terms is None:
            terms = oracle.terms[:, None].expand_as(exact_gradient)
        allowed = terms * (epsilon * up.double().abs())[:, None]
        if roundings > 0.0:
            resolution = torch.finfo(gradient.dtype)
            largest = exact_gradient.abs().amax(1, keepdim=True)
            allowed = allowed + roundings * resolution.eps * largest + resolution.tiny
        found += _further("gradient", gradient, fp32_gradient, exact_gradient, allowed, yardstick)
    return found


def sum_faults(
    sums: Mapping[str, Tensor],
    student: Tensor,
    teacher: Tensor,
    *,
    yardstick: float = YARDSTICK,
    **maps: Any,
) -> list[str]:
    """A line for each fault of sums [N] of a row, which are right by the rule of the loss.

    Args:
        sums: forward_kl, reverse_kl, gap or an entropy, under the names of `ReferenceResult`.
        yardstick: how many times the error of the fp32 formulas is allowed.
        maps: temperature, softcaps and logit scales.
    """
    oracle, fp32 = (
        reference_adaptive_kl(student, teacher, weight=0.5, dtype=dtype, **maps)
        for dtype in (torch.float64, torch.float32)
    )
    found = []
    for name, ours in sums.items():
        exact = getattr(oracle, name)
        allowed = EPSILON * exact.abs().clamp(min=1.0)
        found += _further(name, ours, getattr(fp32, name), exact, allowed, yardstick)
    return found


def _further(
    name: str, ours: Tensor, fp32: Tensor, exact: Tensor, allowed: Tensor, yardstick: float
) -> list[str]:
    """In the largest and in the root mean square error of every row; what is not finite has to be
    the same."""
    tensors = (x.detach().cpu().double() for x in (ours, fp32, exact, allowed))
    ours, fp32, exact, allowed = (x[:, None] if x.dim() == 1 else x for x in tensors)
    same = (ours.isnan() & exact.isnan()) | (ours.isinf() & (ours == exact))
    ours, fp32, exact = (x.masked_fill(same, 0.0) for x in (ours, fp32, exact))
    allowed = allowed.nan_to_num(0.0, posinf=0.0)
    found = []
    for norm, order in (("largest", math.inf), ("rms", 2.0)):
        root = ours.shape[1] ** 0.5 if order == 2.0 else 1.0
        off, off_in_fp32, slack = (
            torch.linalg.vector_norm(x, order, dim=1) / root
            for x in (ours - exact, fp32 - exact, allowed)
        )
        wrong = ~(off <= yardstick * off_in_fp32 + slack)
        found += [
            f"row {i}: {norm} error of the {name} {off[i]:.2e}, fp32 {off_in_fp32[i]:.2e} and "
            f"{slack[i]:.1e}"
            for i in wrong.nonzero().flatten().tolist()[:4]
        ]
    return found
