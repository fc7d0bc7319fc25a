"""The student on the entries of a teacher that is k pairs, in the PyTorch backend: see pairs.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Rule
from .eager_chunks import (
    LARGEST,
    LOG2_E,
    Chunk,
    Rows,
    below_maximum,
    mapped,
    rate_of,
    softcap_slope,
)
from .eager_kls import entropy_of
from .eager_labels import CrossEntropy, row_cross_entropy, tokens_of
from .kernels.layout import ABSENT, LARGEST_LOGIT
from .rows import PairState


class Entries(NamedTuple):
    """What `entries_of_pairs` makes of R rows."""

    log_q: Tensor  # [R, k + 1]
    state: tuple[Tensor, ...]  # each [R, 1]
    of_student: tuple[Tensor, ...]  # each [R, 1], as in layout.OF_STUDENT, and the largest logit


class _Pairs(NamedTuple):
    """Where the pairs of R rows stand."""

    named: Tensor  # [R, k] whether there is a pair
    known: Tensor  # [R, k] whether it is a token
    token: Tensor  # [R, k] int64; where it is not known that of the first pair, or the last token


def entries_of_pairs(
    student: Tensor,
    ids: Tensor,
    teacher: Tensor,
    cross_entropy: CrossEntropy | None,
    rows: Rows,
    rule: Rule,
    spaces: Tensor,
    with_stats: bool,
) -> Entries:
    """R rows of student [R, V], ids [R, k] and teacher [R, k + 1], by a rule that is rescaled."""
    pairs = _pairs(ids, student.shape[-1])
    y, q, spare = spaces[:, : student.shape[0], : student.shape[-1]].unbind()
    max_s = below_maximum(student, None, rule.student_map, out=y)
    torch.mul(y, LOG2_E / rule.temperature, out=q).exp2_()
    z = q.sum(-1, keepdim=True)
    repeated = (ids[:, 1:] == ids[:, :-1]) & pairs.named[:, 1:]
    faults = repeated.any(-1, keepdim=True) | (pairs.named & ~pairs.known).any(-1, keepdim=True)
    z = z.masked_fill(faults, torch.nan)

    entropy = agreement = torch.zeros_like(z)
    if with_stats:
        entropy = entropy_of(q, z, out=spare)
        of_pairs = teacher[:, :-1]
        tops = (of_pairs == of_pairs.amax(-1, keepdim=True)) & pairs.known
        agree = tops & (student.gather(-1, pairs.token) == max_s)
        agreement = agree.any(-1, keepdim=True).float() + 0.0 * z
    chunk = Chunk(y, q, q, y, y, spare[None])
    of_labels, z_1 = row_cross_entropy(chunk, student, max_s, cross_entropy, rows, rule)

    log_z = z.log()
    log_q = y.gather(-1, pairs.token).div_(rule.temperature).sub_(log_z)
    log_q = log_q.masked_fill(~pairs.known, -torch.inf) + 0.0 * z
    z_rest = torch.zeros_like(z)
    if rule.rest:
        some = pairs.known[:, :1]
        q.scatter_(-1, pairs.token, q.gather(-1, pairs.token).masked_fill_(some, 0.0))
        z_rest = q.sum(-1, keepdim=True) + 0.0 * z
    log_rest = z_rest.log()
    return Entries(
        torch.cat([log_q, log_rest - log_z], dim=-1),
        (max_s, torch.where(z_rest == 0.0, log_z, log_rest) * LOG2_E, z_1, z, z_rest),
        (entropy, agreement, of_labels if cross_entropy else torch.zeros_like(z), max_s),
    )


def gradient_of_pairs(
    of_pairs: Tensor,
    of_label: Tensor | None,
    student: Tensor,
    ids: Tensor,
    state: Tensor,
    cross_entropy: CrossEntropy | None,
    rows: Rows,
    rule: Rule,
    spaces: Tensor,
) -> Tensor:
    """[R, V], of what `entries_of_pairs` was given and of_pairs [R, k + 1], of_label [R, 1]."""
    pairs = _pairs(ids, student.shape[-1])
    y, ds = spaces[:2, : student.shape[0], : student.shape[-1]].unbind()
    max_s, log2_rest, z_1 = state[:, :3, None].unbind(1)
    below_maximum(student, max_s, rule.student_map, out=y)
    rate = rate_of(rule)
    torch.mul(y, LOG2_E / rule.temperature, out=ds).sub_(log2_rest).exp2_()
    ds.mul_(of_pairs[:, -1:]).mul_(rate)
    own, some = of_pairs[:, :-1] * rate, pairs.known[:, :1]
    own = torch.where(pairs.known, own, own[:, :1].where(some, ds.gather(-1, pairs.token)))
    ds.scatter_(-1, pairs.token, own)
    if cross_entropy is not None and of_label is not None:
        of_label = of_label * (cross_entropy.unit * rule.student_map.scale)
        softmax = y.mul_(LOG2_E * cross_entropy.unit).exp2_()
        ds.addcmul_(softmax, of_label / z_1)
        token, known = tokens_of(cross_entropy.labels, rows, student.shape[-1])
        # Where the label is no token at all, z_1 is NaN.
        ds.scatter_add_(-1, token, -of_label.where(known, 0.0))
    ds.clamp_(-LARGEST, LARGEST)
    return ds.mul_(softcap_slope(student, rule.student_map)) if rule.student_map.softcap else ds


def pair_masses(state: PairState, rule: Rule) -> Tensor:
    """`backend.ShardSweeps.pair_masses`."""
    max_s, _, z_1, z, z_rest = state.of_pairs[:, :5].double().unbind(1)
    base, base_1 = _maxima(max_s, rule)
    masses = torch.stack((base + z.log2(), base + z_rest.log2(), base_1 + z_1.log2()), 1)
    nothing = state.of_student[:, LARGEST_LOGIT, None] == -torch.inf
    return masses.masked_fill(nothing, -torch.inf)


def set_pair_masses(state: PairState, masses: Tensor, rule: Rule) -> None:
    """`backend.ShardSweeps.set_pair_masses`."""
    max_s = state.of_pairs[:, 0].double()
    max_s = max_s.masked_fill(max_s == -torch.inf, 0.0)  # any will do
    lse, lse_rest, lse_1 = masses.unbind(1)
    base, base_1 = _maxima(max_s, rule)
    lse_rest = lse_rest.where(lse_rest != -torch.inf, lse) - base
    # Which is 1 and more, but where any will do.
    z_1 = (lse_1 - base_1).exp2().clamp(min=1.0)
    state.of_pairs.zero_()[:, :3] = torch.stack((max_s, lse_rest, z_1), 1)


def _maxima(max_s: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The largest logits [N] fp64 in bits, at T and at T = 1, as `below_maximum` takes them off."""
    if rule.student_map.softcap is not None:
        max_s = max_s.float()
    logit = mapped(max_s, rule.student_map).double() * LOG2_E
    return logit / rule.temperature, logit


def _pairs(ids: Tensor, vocabulary: int) -> _Pairs:
    named, known = ids != ABSENT, ids < vocabulary
    first = ids[:, :1].clamp(max=vocabulary - 1)
    return _Pairs(named, known, torch.where(known, ids, first).long())
