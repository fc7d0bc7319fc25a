"""The one rule of what is right, for `akl-triton check`, the tests and the benchmarks.

A head is right if it is the float64 oracle's for some mu' in mu (1 +- MU_SLACK): a cumulative mass
may equal mu to within rounding, and no computation can be asked to decide better than that. Loss,
gradient, weight and mass must then be those of the oracle with the head that was taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Head, ReferenceResult, head_size, mapped_logits, reference_adaptive_kl

MU_SLACK = 2e-6
# Relative error allowed in a sum of fp32 probabilities; the weight's error is this over the gap.
MASS_ERROR = 4e-6


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
    least, most = (head_size(p, order, mu * (1.0 + f * MU_SLACK), head) for f in (-1, 1))
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
