"""When is a head right? When it is the float64 oracle's for some mu' within 2e-6 of mu.

A cumulative mass may hit mu to within rounding; no computation can be asked to decide better than
that, and none is allowed to be further off. The weight and the mass must then be those of the head
that was taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from akl_triton.reference import (
    Head,
    Ties,
    head_members,
    head_size,
    mapped_logits,
    shared_vocabulary,
)

MU_SLACK = 2e-6
# Relative error allowed in a sum of fp32 probabilities; the weight's error is this over the gap.
MASS_ERROR = 4e-6


@dataclass
class AcceptableHeads:
    """The oracle's heads for every mu' in mu (1 +- 2e-6), row by row."""

    p: Tensor  # [N, V] float64
    distance: Tensor  # [N, V] |p - q|
    teacher: Tensor  # [N, V] float64
    order: Tensor  # [N, V] int64
    ties: Ties
    min_size: Tensor  # [N] int64
    max_size: Tensor  # [N] int64

    def members_at(self, size: Tensor) -> Tensor:
        """[N, V] the oracle's head of `size` tokens."""
        return head_members(self.teacher, self.order, size.long(), self.ties)

    def head_mass_at(self, size: Tensor) -> Tensor:
        return (self.members_at(size) * self.p).sum(-1)

    def forward_weight_at(self, size: Tensor) -> Tensor:
        gap = self.distance.sum(-1)
        g_head = (self.members_at(size) * self.distance).sum(-1)
        return torch.where(gap == 0.0, 0.5, g_head / gap)


def acceptable_heads(
    student: Tensor,
    teacher: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    head: Head = "exclusive",
    ties: Ties = "stable",
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> AcceptableHeads:
    student, teacher = shared_vocabulary(student, teacher)
    t = mapped_logits(teacher, teacher_softcap, teacher_logit_scale)
    s = mapped_logits(student, student_softcap, student_logit_scale)
    p = torch.softmax(t / temperature, dim=-1)
    q = torch.softmax(s / temperature, dim=-1)
    order = teacher.argsort(dim=-1, descending=True, stable=True)
    return AcceptableHeads(
        p=p,
        distance=(p - q).abs(),
        teacher=teacher,
        order=order,
        ties=ties,
        min_size=head_size(p, order, mu * (1.0 - MU_SLACK), head),
        max_size=head_size(p, order, mu * (1.0 + MU_SLACK), head),
    )


def assert_head_matches(
    student: Tensor,
    teacher: Tensor,
    *,
    head_size: Tensor,
    head_mass: Tensor,
    forward_weight: Tensor,
    mu: float = 0.5,
    temperature: float = 1.0,
    head: Head = "exclusive",
    ties: Ties = "stable",
    mass_error: float = MASS_ERROR,
    **maps: Any,
) -> None:
    """Every finite row's claimed head is acceptable; its mass and weight are those of that head.

    head_size, head_mass, forward_weight: [N], any float dtype. Rows without a softmax (NaN, +inf,
    or all -inf on a side) must claim NaN in all three.
    """
    accepted = acceptable_heads(
        student, teacher, mu=mu, temperature=temperature, head=head, ties=ties, **maps
    )
    size, mass, w = (x.detach().double().cpu() for x in (head_size, head_mass, forward_weight))
    gap = accepted.distance.sum(-1)
    sound = ~gap.isnan()
    for name, claim in (("head_size", size), ("head_mass", mass), ("forward_weight", w)):
        assert claim[~sound].isnan().all(), f"{name} of a row without a softmax is not NaN"
        assert not claim[sound].isnan().any(), f"{name} of a sound row is NaN"

    inside = (accepted.min_size <= size) & (size <= accepted.max_size)
    inside &= size == size.round()
    wrong = (~inside & sound).nonzero().flatten().tolist()
    assert not wrong, "; ".join(
        f"row {i}: head_size {size[i]:.0f} is not in "
        f"[{accepted.min_size[i]}, {accepted.max_size[i]}]"
        for i in wrong[:4]
    )

    taken = torch.where(sound, size, 1.0)
    mass_off = (mass - accepted.head_mass_at(taken)).abs()[sound]
    assert (mass_off <= mass_error).all(), f"head_mass is off by {mass_off.max():.2e}"
    # A gap near 0 is itself rounding, and so is its split.
    slack = mass_error * (1.0 + 1.0 / gap.clamp(min=1e-300))
    weight_off = ((w - accepted.forward_weight_at(taken)).abs() / slack)[sound]
    assert (weight_off <= 1.0).all(), (
        f"forward_weight is off by {weight_off.max():.1f} times a rounding of {mass_error:.0e}/gap"
    )
