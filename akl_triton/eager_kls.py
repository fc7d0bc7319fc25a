"""The two KLs in the PyTorch backend: their sums, their weights, their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import AdaptiveKL, EntropySwitch, Rule, TwoKL
from .eager_chunks import HUGE, STEEP, Chunk, at_rate, rate_of, softcap_slope, sync_is_free
from .eager_head import head_sums
from .terms import LARGEST_U


class Sums(NamedTuple):
    """The first of STATISTICS, each [R, 1] fp32."""

    forward_kl: Tensor
    reverse_kl: Tensor
    forward_weight: Tensor
    head_mass: Tensor
    head_size: Tensor
    gap: Tensor


class KLSlope(NamedTuple):
    """Row constants of dloss/dstudent = rate (q (a - k (d - center)) - b p), or rate q a_dropped
    where a side is -inf; rate is the student's scale over T."""

    center: Tensor  # each [R, 1] fp32
    k: Tensor
    a: Tensor
    a_dropped: Tensor
    b: Tensor
    careful: Tensor  # 1 where d is in nats, held, and 0 where a side is -inf: see `held_nats`


def held_nats(d: Tensor, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """d over T, held within `LARGEST_U`, and 0 where a side is -inf; gives 0 there, 1 elsewhere."""
    shared = d.shape[-1]
    kept = torch.gt(teacher[:, :shared], -torch.inf, out=torch.empty_like(d))
    kept.mul_(student[:, :shared] > -torch.inf)
    # Where both sides are too far below their maximum for fp32, d is NaN, and p and q are 0.
    d.div_(temperature).nan_to_num_(nan=0.0, posinf=LARGEST_U, neginf=-LARGEST_U)
    d.clamp_(-LARGEST_U, LARGEST_U).mul_(kept)
    return kept


def statistics_of_sides(
    chunk: Chunk, student: Tensor, teacher: Tensor, max_s: Tensor, max_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The entropies of q and p, and whether some token is a most probable one of both; [R, 1]."""
    of_student, of_teacher = (
        entropy_of(masses, masses.sum(-1, keepdim=True), out=chunk.spare[-1])
        for masses in (chunk.q, chunk.p)
    )
    shared = chunk.d.shape[-1]
    agree = (student[:, :shared] == max_s) & (teacher[:, :shared] == max_t)
    agreement = agree.any(-1, keepdim=True).float()
    broken = (of_student + of_teacher).isnan()
    student_entropy, teacher_entropy, agreement = (
        x.masked_fill(broken, torch.nan) for x in (of_student, of_teacher, agreement)
    )
    return student_entropy, teacher_entropy, agreement


def entropy_of(masses: Tensor, z: Tensor, out: Tensor) -> Tensor:
    """[R, 1] of masses [R, V] that sum to z, by way of a work space of at least that width."""
    share = torch.div(masses, z, out=out[:, : masses.shape[-1]])
    torch.special.entr(share, out=share)
    return share.sum(-1, keepdim=True)


def reverse_weight(w: Tensor, rule: Rule) -> Tensor:
    """The weight of the reverse KL where w is that of the forward KL."""
    return torch.ones_like(w) if isinstance(rule.divergence, EntropySwitch) else 1.0 - w


def kl_divergence(
    chunk: Chunk,
    student: Tensor,
    teacher: Tensor,
    max_t: Tensor,
    rule: Rule,
    q_weight: float | Tensor,
    with_stats: bool,
) -> tuple[Sums, KLSlope, Tensor | None]:
    """Sums of R rows, what their gradient needs, and which entries of d are kept.

    To the gradient, q times q_weight is added, as the cross-entropy needs it at T = 1. Without
    statistics a KL of weight 0 is not made, nor the gap where no weight needs it: they are not what
    `Sums` says then, but such a KL is finite where the row is."""
    assert isinstance(rule.divergence, TwoKL)
    weight = rule.divergence.fixed_weight
    d, p, q, _, _, spare = chunk
    distance = spare[0, :, : p.shape[-1]]
    shared, temperature = d.shape[-1], rule.temperature
    p_shared, q_shared = p[:, :shared], q[:, :shared]
    z_t, z_s = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    product = distance[:, :shared]

    def mean(weights: Tensor, z: Tensor, of: Tensor) -> Tensor:
        return torch.mul(weights, of, out=product).sum(-1, keepdim=True) / z

    p_kept = p_shared.sum(-1, keepdim=True) / z_t if shared < p.shape[-1] else z_t / z_t
    q_kept = q_shared.sum(-1, keepdim=True) / z_s if shared < q.shape[-1] else z_s / z_s
    p_d = mean(p_shared, z_t, d) if with_stats or weight != 0.0 else torch.zeros_like(z_t)
    q_d = mean(q_shared, z_s, d) if with_stats or weight != 1.0 else torch.zeros_like(z_s)
    kept, per_nat = None, temperature
    if (
        not sync_is_free(d)
        or rate_of(rule) > STEEP
        or not bool((p_d.abs() + q_d.abs() < HUGE * min(temperature, 1.0)).all())
    ):
        kept, per_nat = held_nats(d, student, teacher, temperature), 1.0
        p_kept, q_kept = mean(p_shared, z_t, kept), mean(q_shared, z_s, kept)
        # Divided before they are summed: only the mean is known to be within what is held.
        p_d, q_d = (
            torch.mul(weights, d, out=product).div_(z).sum(-1, keepdim=True)
            for weights, z in ((p_shared, z_t), (q_shared, z_s))
        )
    # u = d/T - c. From the quotient, c stays accurate where p is close to q.
    c = (z_t / z_s).log()
    forward_kl = p_d / per_nat - c * p_kept
    reverse_kl = c * q_kept - q_d / per_nat
    # Only where a token is dropped can they be less than 0, but for rounding.
    if kept is None and shared == p.shape[-1]:
        forward_kl = forward_kl.clamp(min=0.0)
    if kept is None and shared == q.shape[-1]:
        reverse_kl = reverse_kl.clamp(min=0.0)

    gap = mass = size = torch.full_like(z_t, torch.nan)
    if with_stats or isinstance(rule.divergence, AdaptiveKL):
        # |p - q|, in units of 1/z_t.
        torch.mul(q_shared, z_t / z_s, out=product).sub_(p_shared)
        distance[:, shared:] = p[:, shared:]
        distance.abs_()
        only_student = q[:, shared:].sum(-1, keepdim=True) * (z_t / z_s)
        gap = distance.sum(-1, keepdim=True) + only_student

    if isinstance(rule.divergence, EntropySwitch):
        w = (entropy_of(p, z_t, out=spare[-1]) > rule.divergence.tau).float()
    elif weight is None:
        g_head, mass, size = head_sums(chunk, teacher, max_t, z_t, rule)
        w = torch.where(gap == 0.0, 0.5, g_head / gap).clamp(max=1.0)
    else:
        w = torch.full_like(gap, weight)
    if with_stats:
        w, mass, size = (x.masked_fill(gap.isnan(), torch.nan) for x in (w, mass, size))

    sums = Sums(forward_kl, reverse_kl, w, mass, size, gap / z_t)
    of_forward = rule.divergence_weight * w
    of_reverse = rule.divergence_weight * reverse_weight(w, rule)
    of_q = of_q_dropped = of_forward * p_kept + q_weight
    if kept is not None or shared < q.shape[-1]:  # or else q_kept is 1, and nothing is dropped
        of_q_dropped = of_q - of_reverse * (q_kept + reverse_kl)
        of_q = of_q + of_reverse * (1.0 - q_kept) * (1.0 + c)
    slope = KLSlope(
        center=q_d,
        k=of_reverse / per_nat / z_s,
        a=of_q / z_s,
        a_dropped=of_q_dropped / z_s,
        b=of_forward / z_t,
        careful=torch.full_like(w, kept is not None),
    )
    return sums, slope, kept


def kl_gradient(
    chunk: Chunk, slope: KLSlope, kept: Tensor | None, student: Tensor, rule: Rule
) -> Tensor:
    """dloss/dstudent [R, V_s] of the two KLs. Uses up the chunk."""
    assert isinstance(rule.divergence, TwoKL)
    weight = rule.divergence.fixed_weight
    d, p, q = chunk.d, chunk.p[:, : chunk.d.shape[-1]], chunk.q
    shared = d.shape[-1]
    if rule.student_map.softcap is not None:
        chain = softcap_slope(student, rule.student_map, out=chunk.spare[-1, :, : q.shape[-1]])
        q.mul_(chain)
        p.mul_(chain[:, :shared])
    q_shared = q[:, :shared]
    if weight != 1.0:
        # Both addends of k are of the size of their difference, which is 0 where q is 1.
        d.sub_(slope.center).mul_(q_shared)
    factor = slope.a
    if kept is not None:
        d.mul_(kept)
        p.mul_(kept)
        factor = kept.mul_(slope.a - slope.a_dropped).add_(slope.a_dropped)
    q_shared.mul_(factor)
    if weight != 1.0:
        q_shared.addcmul_(d, slope.k, value=-1.0)
    if weight != 0.0:
        q_shared.addcmul_(p, slope.b, value=-1.0)
    q[:, shared:].mul_(slope.a_dropped)
    return at_rate(q, rule, held=kept is not None)
