"""A shard of the vocabulary in the PyTorch backend: `backend.ShardSweeps`, as kernels/shards.py.

Rows are taken a few at a time, in fp64, where no difference of logits is infinite and no normaliser
has a rounding to speak of; what is sent is rounded once. Logarithms of probabilities are in bits,
as those of the kernels are, but for what terms.py is given. What one side of a shard lacks is -inf
there, so that both have W columns, and one at least.

Nothing of a row is told apart by its size: what the kernels sum in blocks with a base, or again
with care, is here the same sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import DKD, AdaptiveKL, DecoupledKL, LKHybrid, Rule, TwoKL
from .eager_chunks import LARGEST, LOG2_E, softcap_slope, sync_is_free
from .eager_pairs import pair_masses as pair_masses
from .eager_pairs import set_pair_masses as set_pair_masses
from .eager_terms import Entries, sums_of_terms
from .kernels.layout import (
    LARGEST_REFERENCE,
    SHARD_BINS,
    SHARD_CANDIDATES,
    SHARD_HEAD_WIDTH,
    SHARD_PIVOTS,
    SHARD_STATISTICS,
    SHARD_STRIDE,
    SHARD_SUMS,
)
from .shard_keys import key_of, lowest_key
from .shard_maps import in_bits
from .terms import LARGEST_DIFFERENCE, LARGEST_LOG, LARGEST_U

LN2 = math.log(2.0)
LARGEST_BITS = 2.0**127  # of |u| and of logarithms, `LARGEST_U` in bits
LARGEST_SCALE = 2.0**126  # of bits that a unit of the logits is worth, as the launchers hold it
BLOCK_LOGITS = 2**18  # of one side in a block of rows: some 15 temporaries of 2 MiB


def statistics(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    labels: Tensor | None,
    rule: Rule,
    with_stats: bool,
) -> tuple[Tensor, Tensor]:
    """`backend.ShardSweeps.statistics`; all columns are filled, whoever needs them."""
    has_head, apart = isinstance(rule.divergence, AdaptiveKL), isinstance(rule.divergence, DKD)
    width = len(SHARD_STATISTICS)
    n, columns = student.shape[0] * student.shape[1], width + has_head * SHARD_HEAD_WIDTH
    out = torch.zeros(n, columns, dtype=torch.float32, device=student.device)
    for rows in _blocks_of_rows(student, teacher, valid):
        s, t = _sides(student, teacher, rows)
        label_t = label_s = nothing = s.new_zeros(len(rows), 1)
        if labels is not None:
            at_label = _at_label(labels[rows], s)
            label_t, label_s = (
                x.masked_fill(~at_label, -torch.inf).amax(-1, keepdim=True) for x in (t, s)
            )
            if apart:
                s, t = s.masked_fill(at_label, -torch.inf), t.masked_fill(at_label, -torch.inf)
        of_t = _softmax_of(in_bits(t, rule.teacher_map, rule.temperature))
        of_s = _softmax_of(in_bits(s, rule.student_map, rule.temperature))
        reference_1 = z_1 = nothing
        if labels is not None and rule.temperature != 1.0:
            reference_1, z_1, *_ = _softmax_of(in_bits(s, rule.student_map, 1.0))
        kept = (t > -torch.inf) & (s > -torch.inf)
        u = _log_ratio(of_t.log_p, of_s.log_p) * LN2
        (forward_kl, kept_p), (reverse_kl, kept_q) = _kl(of_t.p, u, kept), _kl(of_s.p, -u, kept)
        top_t, top_s = t.amax(-1, keepdim=True), s.amax(-1, keepdim=True)
        agreement = ((t == top_t) & (s == top_s)).any(-1, keepdim=True)
        of_rows = (
            *(of_t.reference, of_t.z, of_s.reference, of_s.z, reference_1, z_1),
            *(forward_kl, reverse_kl, kept_p, kept_q, _entropy(of_t), _entropy(of_s)),
            *(agreement, top_t, top_s, label_t, label_s),
        )
        out[rows, :width] = torch.cat([x.float() for x in of_rows], dim=-1)
        if has_head:
            out[rows, width:] = _head_of_shard(t, of_t, rule, teacher.dtype)
    return _cleared(out, valid), out.new_zeros(n, 2)


def masses(teacher: Tensor, rows: Tensor, asked: Tensor, rule: Rule) -> Tensor:
    """`backend.ShardSweeps.masses`."""
    out = asked.new_empty(len(rows), SHARD_PIVOTS + 2)
    for some in _split(torch.arange(len(rows), device=rows.device), teacher.shape[-1]):
        t = _wide(teacher, rows[some], max(teacher.shape[-1], 1))
        *pivots, reference, low, high = torch.split(asked[some].double(), 1, dim=-1)
        mass = (in_bits(t, rule.teacher_map, rule.temperature) - reference).exp2_()
        found = [mass.where(t >= pivot, 0.0).sum(-1) for pivot in pivots]
        below = t.where(t < high, -torch.inf).amax(-1)
        above = t.where(t >= low, torch.inf).amin(-1)
        out[some] = torch.stack([*found, below, above], dim=-1).float()
    return out


def sums(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    rule: Rule,
    softmaxes: Tensor,
    boundary: Tensor | None,
    blocks: Tensor,
    with_stats: bool,
) -> Tensor:
    """`backend.ShardSweeps.sums`; a row of which a normaliser is NaN is NaN throughout."""
    out = torch.zeros(len(softmaxes), len(SHARD_SUMS), dtype=torch.float32, device=student.device)
    for rows in _blocks_of_rows(student, teacher, valid):
        s, t = _sides(student, teacher, rows)
        reference_t, z_t, reference_s, z_s, pivot = torch.split(softmaxes[rows].double(), 1, -1)
        lse_t, lse_s = reference_t + z_t.log2(), reference_s + z_s.log2()
        x_t = in_bits(t, rule.teacher_map, rule.temperature)
        log_p, log_q = x_t - lse_t, in_bits(s, rule.student_map, rule.temperature) - lse_s
        distance = (log_p.exp2() - log_q.exp2()).abs_()
        gap, nothing = distance.sum(-1, keepdim=True), torch.zeros_like(lse_t)
        head_gap, head_size = nothing, nothing + torch.nan
        if boundary is not None:
            stable = isinstance(rule.divergence, AdaptiveKL) and rule.divergence.ties == "stable"
            members = _head_members(t, boundary[rows].double(), stable)
            head_gap, head_size = (x.sum(-1, keepdim=True) for x in (members * distance, members))
        total_x = total_g = variance = nothing
        if isinstance(rule.divergence, DecoupledKL):
            # Of the lse as it is rounded for the gradient, in which these weights come back.
            w, u = _moments(x_t - lse_t.float(), log_p, log_q, -pivot, s, t, rule.divergence)
            total_x = w.sum(-1, keepdim=True)
            share = w / total_x.where(total_x != 0.0, 1.0)  # where nothing is kept
            total_g = (share * u).sum(-1, keepdim=True)
            variance = (share * (u - total_g).square_()).sum(-1, keepdim=True)
        elif not isinstance(rule.divergence, TwoKL):
            in_nats, g = sums_of_terms([_entries(log_p, log_q, s, t)], s.shape[-1], rule)
            total_x, total_g = in_nats / LN2, g.sum(-1, keepdim=True) / LN2
        of_rows = torch.cat((gap, head_gap, head_size, total_x, total_g, variance), dim=-1)
        broken = ~(lse_t + lse_s).isfinite()
        out[rows] = of_rows.clamp_(-LARGEST, LARGEST).masked_fill_(broken, torch.nan).float()
    return _cleared(out, valid)


def gradient(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    labels: Tensor | None,
    state: Tensor,
    rule: Rule,
    gradient: Tensor,
) -> None:
    """`backend.ShardSweeps.gradient`: the formulas of kernels/gradient.py."""
    untempered = labels is not None and rule.temperature != 1.0
    for rows in _blocks_of_rows(student, teacher, valid):
        s, t = _sides(student, teacher, rows)
        lse_t, lse_s, lse_1, of_label, _, _, *coefficients = torch.split(
            state[rows].double(), 1, -1
        )
        log_p = in_bits(t, rule.teacher_map, rule.temperature) - lse_t
        log_q = in_bits(s, rule.student_map, rule.temperature) - lse_s
        p, q = log_p.exp2(), log_q.exp2()
        kept = (t > -torch.inf) & (s > -torch.inf)
        if isinstance(rule.divergence, TwoKL):
            slope, offset, of_teacher, lost, at_apart, _ = coefficients
            u = _log_ratio(log_p, log_q)
            ds = torch.where(kept, q * (slope * u + offset) - of_teacher * p, q * lost)
        else:
            rate, total, shift, factor_s, of_p, of_q = coefficients
            if isinstance(rule.divergence, DecoupledKL):
                w, u = _moments(log_p, log_p, log_q, shift, s, t, rule.divergence)
                ds = rate * w * (u - total)
            else:
                bits_s = factor_s.log2()
                entries = _entries(log_p + (bits_s + shift), log_q + bits_s, s, t)
                _, g = sums_of_terms([entries], s.shape[-1], rule)
                ds = rate * (g / (LN2 * factor_s) - q * total)
            if isinstance(rule.divergence, (LKHybrid, DecoupledKL)):
                ds += q * of_q - of_p * p.where(kept, 0.0)
            if labels is not None and not untempered:
                ds += q * of_label
        if untempered:
            ds += (in_bits(s, rule.student_map, 1.0) - lse_1).exp2_() * of_label
        if labels is not None:
            at_label = _at_label(labels[rows], s)
            if isinstance(rule.divergence, DKD):
                ds = torch.where(at_label, at_apart, ds)
            else:
                ds -= at_label * (rule.label_weight * rule.student_map.scale)
        ds = (ds * upstream[rows].double()[:, None]).clamp_(-LARGEST, LARGEST)
        if rule.student_map.softcap is not None:
            ds *= softcap_slope(s, rule.student_map, out=torch.empty_like(s))
        gradient[_places(rows, gradient)] = ds[:, : gradient.shape[-1]].to(gradient.dtype)
    _cleared(gradient, valid)


class _Softmax(NamedTuple):
    """A side of R rows of a shard, of its own softmax."""

    reference: Tensor  # [R, 1] the largest logit, in bits and in fp32, held
    z: Tensor  # [R, 1] sum of 2^(x - reference), 0 where nothing is finite, NaN where it is broken
    p: Tensor  # [R, W]; 0 where nothing is finite
    log_p: Tensor  # [R, W] in bits


def _softmax_of(x: Tensor) -> _Softmax:
    """Of x [R, W] in bits."""
    top = x.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, -LARGEST_REFERENCE)
    reference = top.nan_to_num(0.0).clamp_(-LARGEST_REFERENCE, LARGEST_REFERENCE).float()
    p = (x - top).exp2_()
    total = p.sum(-1, keepdim=True)
    z = total * (top - reference).exp2()
    total = total.clamp(min=1.0)  # which it is, unless nothing is finite
    return _Softmax(reference, z, p / total, x - (top + total.log2()))


def _kl(p: Tensor, u: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of p u over the tokens that are kept, in nats, and their mass), each [R, 1]."""
    kl = (p * u).where(kept, 0.0).sum(-1, keepdim=True)
    lost = p.where(~kept, 0.0).sum(-1, keepdim=True)
    # Only where a token is dropped can it be less than 0, but for rounding.
    return kl.where((lost > 0.0) | ~(kl < 0.0), 0.0), p.where(kept, 0.0).sum(-1, keepdim=True)


def _entropy(of: _Softmax) -> Tensor:
    """[R, 1] in nats."""
    return (of.p * of.log_p.clamp(min=-LARGEST_BITS)).sum(-1, keepdim=True) * -LN2


def _head_of_shard(t: Tensor, of_t: _Softmax, rule: Rule, dtype: torch.dtype) -> Tensor:
    """[R, SHARD_HEAD_WIDTH] fp32 of the teacher's logits t [R, W], which were of `dtype`."""
    first = t.topk(min(SHARD_CANDIDATES + 1, t.shape[-1]), dim=-1).values
    first = F.pad(first, (0, SHARD_CANDIDATES + 1 - first.shape[-1]), value=-torch.inf)
    candidates, next_one = first[:, :-1], first[:, -1:]
    key = (key_of(next_one, dtype) + 1).masked_fill(next_one == -torch.inf, lowest_key(dtype))
    scale = min(LOG2_E * rule.teacher_map.scale / rule.temperature, LARGEST_SCALE)
    # NaN where nothing is finite, or the row broken.
    depth = ((first[:, :1] - t) * (scale / SHARD_STRIDE)).nan_to_num(SHARD_BINS)
    of_bins = t.new_zeros(len(t), SHARD_BINS + 1)
    of_bins.scatter_add_(-1, depth.clamp_(max=SHARD_BINS).long(), of_t.p)
    above = of_bins.cumsum(-1)[:, :SHARD_BINS]
    # As bits, many of which are those of a NaN: nothing may be computed with it from here on.
    as_bits = key.to(torch.int32).view(torch.float32)
    return torch.cat((as_bits, candidates.float(), above.float()), dim=-1)


def _head_members(t: Tensor, boundary: Tensor, stable: bool) -> Tensor:
    """[R, W] fp64: how much of each token is in the head."""
    crossing, taken, _ = torch.split(boundary, 1, dim=-1)
    tied = t == crossing
    if stable:
        share = (tied & (tied.cumsum(-1) <= taken)).double()
    else:
        ties = tied.sum(-1, keepdim=True)
        share = tied * (taken.minimum(ties) / ties.clamp(min=1))
    return share + (t > crossing)


def _entries(log_p: Tensor, log_q: Tensor, s: Tensor, t: Tensor) -> Entries:
    """The entries [R, W] of which a sum of terms is made, from their logarithms in bits."""
    nats_p, nats_q = ((log * LN2).clamp_(min=-LARGEST_LOG) for log in (log_p, log_q))
    u = (_log_ratio(log_p, log_q) * LN2).clamp_(-LARGEST_U, LARGEST_U)
    p, q = log_p.exp2(), log_q.exp2()
    return Entries(p, q, nats_p, nats_q, u, s == -torch.inf, t == -torch.inf)


def _moments(
    log: Tensor, log_p: Tensor, log_q: Tensor, shift: Tensor, s: Tensor, t: Tensor, of: DecoupledKL
) -> tuple[Tensor, Tensor]:
    """(w, u + shift) [R, W], w = 2^(kappa log) or 0 where a side is -inf, u in bits and held."""
    w = (log.clamp(min=-LARGEST_BITS) * of.kappa).exp2_()
    u = (_log_ratio(log_p, log_q) + shift).clamp_(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    return w.where((s > -torch.inf) & (t > -torch.inf), 0.0), u


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """u, held where a side is -inf or far from the other; 0 where both are -inf."""
    u = (log_p - log_q).nan_to_num_(0.0, LARGEST_BITS, -LARGEST_BITS)
    return u.clamp_(-LARGEST_BITS, LARGEST_BITS)


def _at_label(labels: Tensor, s: Tensor) -> Tensor:
    """[R, W] bool: where the label of a row stands, nowhere if it is no token of the shard."""
    return torch.arange(s.shape[-1], device=s.device) == labels[:, None]


def _sides(student: Tensor, teacher: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of both sides, each [R, W] fp64."""
    width = max(student.shape[-1], teacher.shape[-1], 1)
    return _wide(student, rows, width), _wide(teacher, rows, width)


def _wide(x: Tensor, rows: Tensor, width: int) -> Tensor:
    """Rows of x [outer, inner, V] as [R, width] fp64, -inf behind the last column."""
    return F.pad(x[_places(rows, x)].double(), (0, width - x.shape[-1]), value=-torch.inf)


def _places(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return rows // x.shape[1], rows % x.shape[1]


def _blocks_of_rows(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Iterator[Tensor]:
    """The rows that count, some at a time; all of them where to look which would stall."""
    rows = torch.arange(student.shape[0] * student.shape[1], device=student.device)
    if valid is not None and sync_is_free(student):
        rows = rows[valid]
    return _split(rows, max(student.shape[-1], teacher.shape[-1]))


def _split(rows: Tensor, width: int) -> Iterator[Tensor]:
    return iter(torch.split(rows, max(BLOCK_LOGITS // max(width, 1), 1)))


def _cleared(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [N, W] or [outer, inner, V], its rows that do not count exactly 0; in place."""
    if valid is not None:
        x.masked_fill_(~valid.view(*x.shape[:-1], 1), 0.0)
    return x
