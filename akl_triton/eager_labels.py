"""The label of a row in the PyTorch backend: its cross-entropy, and `DKD`, which tells it apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import Rule
from .eager_chunks import LOG2_E, Chunk, Rows, below_maximum, rescaled, softcap_slope, wanted_by_any
from .rows import LogitMap
from .terms import LARGEST_U


class CrossEntropy(NamedTuple):
    """What is asked for besides the divergence: its own loss, times a weight."""

    labels: Tensor  # [N] int32 or int64
    weight: float
    unit: float  # nats at T = 1 that a unit of the rescaled logits is
    is_of_q: bool  # whether its softmax, at T = 1, is q


def cross_entropy_of(labels: Tensor | None, rule: Rule) -> CrossEntropy | None:
    """The cross-entropy that the rule, not rescaled yet, asks for."""
    if labels is None or not rule.label_weight:
        return None
    unit = rule.temperature / rescaled(rule).temperature
    return CrossEntropy(labels, rule.label_weight, unit, rule.temperature == 1.0)


def row_cross_entropy(
    chunk: Chunk,
    student: Tensor,
    max_s: Tensor,
    cross_entropy: CrossEntropy | None,
    rows: Rows,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy at T = 1 and the denominator of its softmax, each [R, 1]; NaN and 1 without."""
    if cross_entropy is None:
        return torch.full_like(max_s, torch.nan), torch.ones_like(max_s)
    token, known = tokens_of(cross_entropy.labels, rows, student.shape[-1])
    of_label = torch.empty_like(max_s)
    below_maximum(student.gather(-1, token), max_s, rule.student_map, out=of_label)
    z_1 = softmax_of_labels(chunk, student, max_s, cross_entropy, rule).sum(-1, keepdim=True)
    loss = z_1.log() - of_label * cross_entropy.unit
    return loss.masked_fill(~known, torch.nan), z_1.masked_fill(~known, torch.nan)


def softmax_of_labels(
    chunk: Chunk, student: Tensor, max_s: Tensor, cross_entropy: CrossEntropy, rule: Rule
) -> Tensor:
    """exp(s - max s) at T = 1 [R, V_s], where that is not the chunk's q in chunk.spare[-1]."""
    if cross_entropy.is_of_q:
        return chunk.q
    space = chunk.spare[-1, :, : student.shape[-1]]
    below_maximum(student, max_s, rule.student_map, out=space)
    return space.mul_(LOG2_E * cross_entropy.unit).exp2_()


def tokens_of(labels: Tensor, rows: Rows, vocabulary: int) -> tuple[Tensor, Tensor]:
    """[R, 1] int64 tokens, and whether they are tokens of the student."""
    token = labels[rows, None].long()
    known = (token >= 0) & (token < vocabulary)
    return token.where(known, 0), known


def add_label_gradient(
    gradient: Tensor,
    chunk: Chunk,
    student: Tensor,
    max_s: Tensor,
    z_1: Tensor,
    cross_entropy: CrossEntropy,
    rows: Rows,
    rule: Rule,
) -> None:
    """Add weight (softmax(s) - [j = label]) by the logits, T = 1; in place.

    Where that softmax is q, the gradient of the divergence has the first term already."""
    rate = cross_entropy.weight * cross_entropy.unit * rule.student_map.scale
    token, known = tokens_of(cross_entropy.labels, rows, student.shape[-1])
    of_label = torch.full_like(max_s, -rate)
    if rule.student_map.softcap is not None:
        of_label *= softcap_slope(student.gather(-1, token), rule.student_map)
    if not cross_entropy.is_of_q:
        softmax = softmax_of_labels(chunk, student, max_s, cross_entropy, rule).div_(z_1)
        if rule.student_map.softcap is not None:
            softmax.mul_(softcap_slope(student, rule.student_map))
        gradient.add_(softmax, alpha=rate)
    gradient.scatter_add_(-1, token, of_label)
    if wanted_by_any(~known):
        gradient.masked_fill_(~known, torch.nan)


class Label(NamedTuple):
    """The label's token, which `DKD` tells apart from the others; each [R, 1]."""

    token: Tensor  # int64
    known: Tensor  # bool, whether it is a token of the student
    student: Tensor  # its logits
    teacher: Tensor


def label_apart(
    student: Tensor, teacher: Tensor, labels: Tensor, rows: Rows
) -> tuple[Label, Tensor, Tensor]:
    """The label's token, and copies of both sides [R, V] without it, where it is -inf."""
    token, known = tokens_of(labels, rows, student.shape[-1])

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        logit = x.gather(-1, token.clamp(max=x.shape[-1] - 1))
        others = put(x.clone(), token, torch.full_like(logit, -torch.inf))
        return logit.masked_fill(token >= x.shape[-1], -torch.inf), others

    (logit_s, student), (logit_t, teacher) = split(student), split(teacher)
    return Label(token, known, logit_s, logit_t), student, teacher


def put(x: Tensor, token: Tensor, value: Tensor) -> Tensor:
    """x[r, token[r]] = value[r], where there is such a column; in place."""
    inside = token < x.shape[-1]
    column = token.where(inside, 0)
    return x.scatter_(-1, column, value.to(x.dtype).where(inside, x.gather(-1, column)))


def leave_out(
    chunk: Chunk,
    label: Label,
    no_teacher: Tensor | None = None,
    no_student: Tensor | None = None,
) -> None:
    """Give the label no part in the sums of a chunk.

    A side that has no other token is given this one, so that its sum is not 0, and d a NaN, so that
    it is noticed that no entry is kept."""
    nothing = torch.zeros_like(chunk.q[:, :1])
    no_teacher = nothing if no_teacher is None else no_teacher.float()
    no_student = nothing if no_student is None else no_student.float()
    put(chunk.p, label.token, no_teacher)
    put(chunk.q, label.token, no_student)
    put(chunk.d, label.token, nothing.masked_fill(no_teacher + no_student > 0.0, torch.nan))


def log_odds(
    logit: Tensor, maximum: Tensor, z: Tensor, none: Tensor, of_side: LogitMap, unit: float
) -> Tensor:
    """ln P/(1-P) of the label from its logit and the others' maximum and sum, all [R, 1].

    A unit of the mapped logits is so many nats; `none` is True where there are no others."""
    odds = torch.empty_like(maximum)
    below_maximum(logit, maximum, of_side, out=odds)
    odds = (odds * unit - z.log()).clamp(-LARGEST_U, LARGEST_U)
    forbidden = logit == -torch.inf
    odds = odds.masked_fill(forbidden, -torch.inf).masked_fill(none, torch.inf)
    # NaN in the sum shows nowhere else where the label is forbidden.
    return odds.masked_fill((forbidden & none) | (logit == torch.inf) | z.isnan(), torch.nan)


def target_terms(odds_t: Tensor, odds_s: Tensor) -> tuple[Tensor, Tensor]:
    """KL of label and not label, and its derivative by the log-odds of the student."""
    p, not_p, q = torch.sigmoid(odds_t), torch.sigmoid(-odds_t), torch.sigmoid(odds_s)
    kl = torch.zeros_like(p)
    for mass, sign, kept in ((p, 1.0, odds_s > -torch.inf), (not_p, -1.0, odds_s < torch.inf)):
        u = F.logsigmoid(sign * odds_t) - F.logsigmoid(sign * odds_s)
        kl = kl + torch.where((mass > 0.0) & kept, mass * u, 0.0)
    # As it is 0 at least where nothing is dropped.
    kl = kl.clamp(min=0.0).where(odds_s.isfinite(), kl)
    p, not_p = p * (odds_s > -torch.inf), not_p * (odds_s < torch.inf)
    broken = (odds_t + odds_s).isnan() & ~(odds_t.isinf() & odds_s.isinf())
    return kl.masked_fill(broken, torch.nan), (q * (p + not_p) - p).masked_fill(broken, torch.nan)
