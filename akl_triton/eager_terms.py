"""Divergences that are sums of terms in the PyTorch backend, and what is mixed with them.

The terms themselves, a function of an entry for each member, are in terms.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import terms
from .divergences import TERMS, DecoupledKL, LKHybrid, Rule, SumOfTerms
from .eager_chunks import (
    HUGE,
    LARGEST,
    LOG2_E,
    SMALLEST,
    STEEP,
    Chunk,
    at_rate,
    rate_of,
    softcap_slope,
    sync_is_free,
    wanted_by_any,
)
from .eager_kls import Sums
from .terms import LARGEST_DIFFERENCE, LARGEST_LOG, LARGEST_U


class Entries(NamedTuple):
    """What the terms of R rows are made of, for a run of the vocabulary; fp32."""

    p: Tensor  # each [R, W]
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    u: Tensor  # ln p - ln q
    no_student: Tensor | None  # bool, where the student's logit is -inf; None: nowhere
    no_teacher: Tensor | None


class TermsSlope(NamedTuple):
    """Row constants of dloss/dstudent = rate (weight g - q pull) of a sum of terms."""

    z_t: Tensor  # each [R, 1] fp32: the sums of the chunk's p and q
    z_s: Tensor
    pull: Tensor  # weight times the sum of g, less what the cross-entropy adds to q
    share: Tensor  # of the forward KL that is mixed with the terms, in g already; 0 where none is
    careful: Tensor  # 1 where entries are held, and those at -inf are told apart


def terms_divergence(
    chunk: Chunk, student: Tensor, teacher: Tensor, rule: Rule, q_weight: float
) -> tuple[list[Entries], Tensor, TermsSlope, Tensor]:
    """The entries of R rows, their loss [R, 1], what their gradient needs, and g [R, V_s].

    q_weight is that of `kl_divergence`."""
    z_t, z_s = chunk.p.sum(-1, keepdim=True), chunk.q.sum(-1, keepdim=True)
    entries = entries_of(chunk, student, teacher, z_t, z_s, rule)
    x, g = sums_of_terms(entries, student.shape[-1], rule)
    total = g.sum(-1, keepdim=True)
    # A broken side may hide behind entries that are dropped because of the other.
    broken = (z_t + z_s).isnan()
    loss = (x + total).nan_to_num(LARGEST, LARGEST).clamp(min=0.0)  # no phi is less than 0
    loss = loss.masked_fill(broken, torch.nan)
    total = total.nan_to_num(0.0, LARGEST, -LARGEST).masked_fill(broken, torch.nan)
    share = _forward_share(loss, rule)
    if isinstance(rule.divergence, _MIXED):
        forward_kl, kept = _forward_kl(entries)
        if entries[0].no_student is None and chunk.p.shape[-1] == chunk.d.shape[-1]:
            forward_kl = forward_kl.clamp(min=0.0)  # as no token is dropped
        rest = _rest(share, rule)
        loss = share * forward_kl + rest * loss
        total = rest * total - share * kept
        mix_forward_kl(g, entries, share, rule)
    careful = entries[0].no_student is not None or not bool((loss < HUGE).all())
    pull = rule.divergence_weight * total - q_weight
    slope = TermsSlope(z_t, z_s, pull, share, torch.full_like(loss, careful))
    return entries, loss, slope, g


def entries_of(
    chunk: Chunk,
    student: Tensor,
    teacher: Tensor,
    z_t: Tensor,
    z_s: Tensor,
    rule: Rule,
    careful: bool | None = None,
) -> list[Entries]:
    """The entries of R rows that both sides have, then those that one has alone, if any.

    `careful` says whether a logit may be -inf or beyond what is held; None: to be found out. They
    take the place of the chunk, whose p and q become probabilities."""
    per_logit, shared = 1.0 / rule.temperature, chunk.d.shape[-1]
    p, q = chunk.p.div_(z_t), chunk.q.div_(z_s)
    # From the quotient, u stays accurate where p is close to q.
    u = torch.add((z_s / z_t).log(), chunk.d, alpha=per_logit, out=chunk.d)
    log_p, log_q = chunk.x, chunk.y
    for log, z in ((log_p, z_t), (log_q, z_s)):
        torch.add(-z.log(), log, alpha=per_logit, out=log)
    if careful is None:
        careful = (
            not sync_is_free(u)
            or rate_of(rule) > STEEP
            or not bool((torch.linalg.vector_norm(u, dim=-1) < HUGE).all())
        )
    no_student = no_teacher = None
    if careful:
        no_student, no_teacher = (x[:, :shared] == -torch.inf for x in (student, teacher))
        # Where both sides are too far below their maximum for fp32, u is NaN, and p and q are 0.
        u.nan_to_num_(nan=0.0, posinf=LARGEST_U, neginf=-LARGEST_U).clamp_(-LARGEST_U, LARGEST_U)
        u.masked_fill_(no_student, LARGEST_U).masked_fill_(no_teacher, -LARGEST_U)
        u.masked_fill_(no_student & no_teacher, 0.0)
    if careful or p.shape[-1] != q.shape[-1]:
        for log in (log_p, log_q):
            log.clamp_(min=-LARGEST_LOG)
    p_both, q_both = p[:, :shared], q[:, :shared]
    logs = log_p[:, :shared], log_q[:, :shared]
    entries = [Entries(p_both, q_both, *logs, u, no_student, no_teacher)]
    for mass, log, logits in ((p, log_p, teacher), (q, log_q, student)):
        if mass.shape[-1] > shared:
            alone = [x[:, shared:] for x in (mass, log, logits)]
            entries.append(_one_sided(*alone, of_teacher=mass is p))
    return entries


def _one_sided(mass: Tensor, log: Tensor, logits: Tensor, *, of_teacher: bool) -> Entries:
    """Entries that only one side has."""
    forbidden = logits == -torch.inf
    no_mass, no_log = torch.zeros_like(mass), torch.full_like(mass, -LARGEST_LOG)
    u = torch.full_like(mass, LARGEST_U if of_teacher else -LARGEST_U).masked_fill_(forbidden, 0.0)
    nowhere = torch.ones_like(forbidden)
    if of_teacher:
        return Entries(mass, no_mass, log, no_log, u, nowhere, forbidden)
    return Entries(no_mass, mass, no_log, log, u, forbidden, nowhere)


def sums_of_terms(entries: list[Entries], v_s: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """(sum of x [R, 1], g [R, V_s]), where entries whose limit is infinite are dropped."""
    divergence = rule.divergence
    if isinstance(divergence, DecoupledKL):
        return _spread(entries[0], v_s, divergence)
    assert isinstance(divergence, SumOfTerms)
    own = TERMS.get(divergence.name)
    function = terms.TERMS[divergence.terms] if own is None else own.torch
    if function is None:
        raise ValueError(
            f"backend: expected 'triton', as {divergence.name} was registered without torch="
        )
    parts = []
    for *given, no_student, no_teacher in entries:
        x, g = function(*given, *divergence.numbers)
        for mask, finite in zip((no_student, no_teacher), divergence.limits, strict=True):
            if not finite and mask is not None:
                x, g = x.masked_fill(mask, 0.0), g.masked_fill(mask, 0.0)
        parts.append((x.sum(-1, keepdim=True), g))
    of_x, of_g = zip(*parts, strict=True)
    # Of the entries that the teacher has alone, g is 0.
    g = of_g[0] if of_g[0].shape[-1] == v_s else torch.cat(of_g, dim=-1)
    return torch.cat(of_x, dim=-1).sum(-1, keepdim=True), g


def _spread(entry: Entries, v_s: int, divergence: DecoupledKL) -> tuple[Tensor, Tensor]:
    """(beta / 2 Var_w(u) [R, 1], g [R, V_s]), w proportional to p^kappa; g sums to 0."""
    _, _, log_p, _, u, no_student, no_teacher = entry
    w = torch.mul(log_p, divergence.kappa * LOG2_E).exp2_()
    for mask in (no_student, no_teacher):
        if mask is not None:
            w.masked_fill_(mask, 0.0)
    w.div_(w.sum(-1, keepdim=True).clamp(min=SMALLEST))
    u = u.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    centred = u.sub_((w * u).sum(-1, keepdim=True))
    # Again: what w lacks of a sum of 1 counts as many times as u is far from 0.
    centred.sub_((w * centred).sum(-1, keepdim=True))
    w.mul_(centred)
    spread = (w * centred).sum(-1, keepdim=True) * (0.5 * divergence.beta)
    return spread, F.pad(w.mul_(-divergence.beta), (0, v_s - w.shape[-1]))


# The divergences with which a share of the forward KL is mixed.
_MIXED = LKHybrid, DecoupledKL


def _forward_share(loss: Tensor, rule: Rule) -> Tensor:
    """The weight of the forward KL, where `loss` is that of the terms [R, 1]."""
    divergence = rule.divergence
    if isinstance(divergence, LKHybrid):
        return torch.exp((loss - 1.0) * divergence.eta)
    return torch.full_like(loss, divergence.alpha if isinstance(divergence, DecoupledKL) else 0.0)


def _rest(share: Tensor, rule: Rule) -> Tensor | float:
    """The weight of the terms where `share` is that of the forward KL."""
    return 1.0 - share if isinstance(rule.divergence, LKHybrid) else 1.0


def _forward_kl(entries: list[Entries]) -> tuple[Tensor, Tensor]:
    """Forward KL [R, 1], and the teacher's mass of the entries that it does not drop."""
    p, _, _, _, u, no_student, _ = entries[0]
    if no_student is not None:  # where the teacher's logit is -inf, p is 0
        p = p.masked_fill(no_student, 0.0)
    return (p * u).sum(-1, keepdim=True), p.sum(-1, keepdim=True)


def mix_forward_kl(g: Tensor, entries: list[Entries], share: Tensor, rule: Rule) -> None:
    """g of the terms [R, V_s] becomes that of the mixture with a share of the forward KL."""
    if not isinstance(rule.divergence, _MIXED):
        return
    p, *_, no_student, _ = entries[0]
    p = p if no_student is None else p.masked_fill(no_student, 0.0)
    g.mul_(_rest(share, rule))
    g[:, : p.shape[-1]].sub_(p * share)


def terms_stats(entries: list[Entries], loss: Tensor, share: Tensor, rule: Rule) -> Sums:
    """The statistics that need neither a head nor a weight; the others are NaN."""
    forward_kl, reverse_kl, gap = (torch.zeros_like(loss) for _ in range(3))
    for p, q, _, _, u, no_student, no_teacher in entries:
        for mask in (no_student, no_teacher):
            if mask is not None:
                u = u.masked_fill(mask, 0.0)
        forward_kl += (p * u).sum(-1, keepdim=True)
        reverse_kl -= (q * u).sum(-1, keepdim=True)
        gap += (p - q).abs_().sum(-1, keepdim=True)
    for x in (forward_kl, reverse_kl, gap):
        x.masked_fill_(loss.isnan(), torch.nan)
    nan = torch.full_like(gap, torch.nan)
    w = share if isinstance(rule.divergence, _MIXED) else nan
    return Sums(forward_kl, reverse_kl, w, nan, nan, gap)


def terms_gradient(
    chunk: Chunk, slope: TermsSlope, g: Tensor, student: Tensor, rule: Rule
) -> Tensor:
    """dloss/dstudent [R, V_s] of a sum of terms, in place of g."""
    if rule.divergence_weight != 1.0:
        g.mul_(rule.divergence_weight)
    g.addcmul_(chunk.q, slope.pull, value=-1.0)
    if rule.student_map.softcap is not None:
        g.mul_(softcap_slope(student, rule.student_map, out=chunk.spare[2, :, : g.shape[-1]]))
    return at_rate(g, rule, held=wanted_by_any(slope.careful))
