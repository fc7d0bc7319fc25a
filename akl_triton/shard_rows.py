"""Rows of a sharded vocabulary: what the numbers of all shards make together.

Everything is of [N] rows, or of [R, N] parts of them, in fp64; logarithms of masses are in bits.
The formulas are those of row_kernels.py in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .divergences import (
    DKD,
    AdaptiveKL,
    DecoupledKL,
    EntropySwitch,
    LKHybrid,
    Rule,
    SumOfTerms,
    TwoKL,
)
from .kernels.layout import COEFFICIENTS, SHARD_STATISTICS, SHARD_SUMS
from .shard_maps import in_bits

if TYPE_CHECKING:
    from .shard_head import Boundary
    from .shards import Shards

LN2 = math.log(2.0)
LARGEST_COEFFICIENT = 2.0**125  # as in gradient.py of the kernels


class Label(NamedTuple):
    """The label's token of N rows."""

    known: Tensor  # bool, whether it is a token of the student
    logit_t: Tensor  # as the models give them; -inf where the teacher lacks it
    logit_s: Tensor
    log2_t: Tensor  # in bits, at the temperature of the divergence
    log2_s: Tensor
    log2_1: Tensor  # of the student at T = 1
    log2_z1: Tensor  # softmax denominator of the student at T = 1, without a label that is apart

    @classmethod
    def of(
        cls, of: Mapping[str, Tensor], owner: Tensor, place: Tensor, shards: Shards, rule: Rule
    ) -> Label:
        """From what all ranks have sent, the label's owner and its place there [N]."""
        widths = torch.tensor(shards.of_student, device=owner.device)
        known = (place >= 0) & (place < widths[owner])
        logit_t, logit_s = (
            of[name].gather(0, owner[None])[0].where(known, torch.nan)
            for name in ("label_t", "label_s")
        )
        # A logit of +inf has no softmax.
        log2_t, log2_s, log2_1 = (
            in_bits(x.masked_fill(x == torch.inf, torch.nan), logit_map, temperature)
            for x, logit_map, temperature in (
                (logit_t, rule.teacher_map, rule.temperature),
                (logit_s, rule.student_map, rule.temperature),
                (logit_s, rule.student_map, 1.0),
            )
        )
        at_1 = "1" if rule.temperature != 1.0 else "s"
        log2_z1 = _log2_sum(_log2_mass(of[f"reference_{at_1}"], of[f"z_{at_1}"]))
        return cls(known, logit_t, logit_s, log2_t, log2_s, log2_1, log2_z1)


class Parts(NamedTuple):
    """The parts of the rows, whose own softmaxes are known: the shards; see `parts_of`."""

    of: dict[str, Tensor]  # by name of layout.SHARD_STATISTICS, each [R, N]
    log2_t: Tensor  # [R, N] softmax denominators
    log2_s: Tensor
    lse_t: Tensor  # [N] those of all parts
    lse_s: Tensor

    def softmaxes(self) -> Tensor:
        """What `ShardSweeps.sums` needs of all tokens, [N, 5] fp32."""
        lse = self.lse_t, self.lse_s
        sides = [x for log2_z in lse for x in (log2_z.float(), _rest(log2_z).exp2())]
        return torch.stack((*sides, self.kls().forward_kl / LN2), 1).float()

    def kls(self) -> KLs:
        share_t, share_s = self.log2_t - self.lse_t, self.log2_s - self.lse_s
        both = (share_t > -torch.inf) & (share_s > -torch.inf)
        p, q = share_t.exp2().where(both, 0.0), share_s.exp2().where(both, 0.0)
        u = (LN2 * (share_t - share_s)).where(both, 0.0)
        of, nothing = self.of, 0.0 * (self.lse_t + self.lse_s)

        def total(weights: Tensor, *factors: Tensor) -> Tensor:
            return nothing + (weights * sum(x.where(both, 0.0) for x in factors)).sum(0)

        forward_kl = total(p, of["forward_kl"], of["kept_p"] * u)
        reverse_kl = total(q, of["reverse_kl"], of["kept_q"] * -u)
        kept_p, kept_q = total(p, of["kept_p"]), total(q, of["kept_q"])
        # Only where a token is dropped can they be less than 0, but for rounding.
        all_p, all_q = (
            ((kept == 1.0) & both | (share == -torch.inf)).all(0)
            for kept, share in ((of["kept_p"], share_t), (of["kept_q"], share_s))
        )
        return KLs(
            torch.where(all_p, forward_kl.clamp(min=0.0), forward_kl),
            torch.where(all_q, reverse_kl.clamp(min=0.0), reverse_kl),
            kept_p,
            kept_q,
        )

    def entropies(self) -> tuple[Tensor, Tensor]:
        """Of the teacher and of the student."""
        entropies = []
        for log2_z, lse, of_parts in (
            (self.log2_t, self.lse_t, self.of["entropy_t"]),
            (self.log2_s, self.lse_s, self.of["entropy_s"]),
        ):
            share = log2_z - lse
            some = share > -torch.inf
            of_all = torch.where(some, share.exp2() * (of_parts - LN2 * share), 0.0)
            entropies.append(of_all.sum(0) + 0.0 * lse)
        return entropies[0], entropies[1]


class KLs(NamedTuple):
    """Each [N]."""

    forward_kl: Tensor
    reverse_kl: Tensor
    kept_p: Tensor  # mass of the tokens that are finite on both sides
    kept_q: Tensor


class Slope(NamedTuple):
    """What the gradient needs of N rows, fp32: two runs of the columns of layout's state."""

    of_softmaxes: Tensor  # [N, 4] lse of the teacher, of the student, at T = 1; of_label
    coefficients: Tensor  # [N, layout.COEFFICIENTS]


def sent(rule: Rule, has_labels: bool, with_stats: bool) -> list[str]:
    """The columns of layout.SHARD_STATISTICS that the others need for a loss."""
    has_head = isinstance(rule.divergence, AdaptiveKL)
    needed = {
        **dict.fromkeys(("reference_1", "z_1"), has_labels and rule.temperature != 1.0),
        "entropy_t": with_stats or isinstance(rule.divergence, EntropySwitch),
        "entropy_s": with_stats,
        "agreement": with_stats,
        "top_t": with_stats or has_head,
        "top_s": with_stats,
        **dict.fromkeys(("label_t", "label_s"), has_labels),
    }
    return [name for name in SHARD_STATISTICS if needed.get(name, True)]


def parts_of(of: dict[str, Tensor], label: Label | None, rule: Rule) -> Parts:
    """All tokens of the rows, from what all ranks have sent, by name, each [R, N].

    Of `DKD`, whose shards have left out the label's token, that is one more part."""
    log2_t, log2_s = (
        _log2_mass(of["reference_t"], of["z_t"]),
        _log2_mass(of["reference_s"], of["z_s"]),
    )
    if label is not None and isinstance(rule.divergence, DKD):
        some = ((label.log2_t > -torch.inf) & (label.log2_s > -torch.inf)).double()
        alone = {
            **dict.fromkeys(of, torch.zeros_like(some)),
            **dict.fromkeys(("kept_p", "kept_q", "agreement"), some),
            "top_t": label.logit_t,
            "top_s": label.logit_s,
        }
        of = {name: torch.cat((x, alone[name][None])) for name, x in of.items()}
        log2_t, log2_s = (
            torch.cat((x, of_label[None]))
            for x, of_label in ((log2_t, label.log2_t), (log2_s, label.log2_s))
        )
    return Parts(of, log2_t, log2_s, _softmax(log2_t), _softmax(log2_s))


def loss_of(
    parts: Parts, label: Label | None, sums: Tensor | None, rule: Rule
) -> tuple[Tensor, Slope]:
    """The loss [N] fp32, and what its gradient needs; `sums` [R, N, 6] are those of all ranks."""
    divergence = rule.divergence
    if isinstance(divergence, DKD):
        assert label is not None
        return _of_decoupled(parts, label, divergence, rule)
    kls = parts.kls()
    lse_t, lse_s = parts.lse_t, parts.lse_s
    label_rate = rule.label_weight * rule.student_map.scale
    loss, cross_entropy, lse_1 = torch.zeros_like(lse_t), torch.zeros_like(lse_t), lse_s
    if label is not None:
        cross_entropy, lse_1 = LN2 * (label.log2_z1 - label.log2_1), label.log2_z1
    untempered = label is not None and rule.temperature != 1.0
    rate = rule.divergence_weight * rule.rate
    factor_t, factor_s = (-_rest(lse_t)).exp2(), (-_rest(lse_s)).exp2()
    shift = _rest(lse_s) - _rest(lse_t)
    of_label = _of_label(lse_1, label_rate)
    if isinstance(divergence, SumOfTerms):
        assert sums is not None
        loss, w, of_terms, total, pivot = _terms(kls, sums, rule)
        mixed = 0.0 if w is None else w
        coefficients: tuple[Tensor, ...] = (
            of_terms * rate * (factor_s if pivot is None else 1.0),
            total,
            shift if pivot is None else shift - pivot,
            factor_s,
            factor_t * rate * mixed,
            factor_s * rate * mixed * kls.kept_p,
        )
    else:
        assert isinstance(divergence, TwoKL)
        w = _weight(parts, sums, rule)
        of_reverse = torch.ones_like(w) if isinstance(divergence, EntropySwitch) else 1.0 - w
        for weight, kl in ((w, kls.forward_kl), (of_reverse, kls.reverse_kl)):
            loss = loss + torch.where(weight != 0.0, weight * kl, 0.0)
        coefficients = _kl_coefficients(
            factor_t, factor_s, shift, w, of_reverse, kls, rate, 0.0 if untempered else of_label
        )
    loss = rule.divergence_weight * (loss + 0.0 * (lse_t + lse_s))
    if label is not None:
        loss = loss + rule.label_weight * cross_entropy
    return loss.float(), _slope(loss, lse_t, lse_s, lse_1, of_label, coefficients)


def stats_of(
    parts: Parts,
    label: Label | None,
    sums: Tensor | None,
    boundary: Boundary | None,
    rule: Rule,
) -> Tensor:
    """[N, statistics] fp32, of all tokens."""
    assert sums is not None
    kls, (entropy_t, entropy_s) = parts.kls(), parts.entropies()
    nan = torch.full_like(parts.lse_t, torch.nan)
    nothing = 0.0 * (parts.lse_t + parts.lse_s)
    of = _sums(sums)
    top_t, top_s = parts.of["top_t"].amax(0), parts.of["top_s"].amax(0)
    agree = (parts.of["agreement"] == 1.0) & (parts.of["top_t"] == top_t)
    agree &= parts.of["top_s"] == top_s
    w = nan
    if isinstance(rule.divergence, SumOfTerms):
        mixed = _terms(kls, sums, rule)[1]
        w = nan if mixed is None else mixed
    elif not isinstance(rule.divergence, DKD):
        w = _weight(parts, sums, rule)
    cross_entropy = nan
    if label is not None and rule.label_weight:
        log2_z1 = label.log2_z1
        if isinstance(rule.divergence, DKD):
            log2_z1 = torch.logaddexp2(log2_z1, label.log2_1)
        cross_entropy = LN2 * (log2_z1 - label.log2_1)
    columns = (
        kls.forward_kl,
        kls.reverse_kl,
        w + nothing,
        (nan if boundary is None else boundary.mass) + nothing,
        # Where ties are averaged each rank has a share of them.
        of["head_size"].round() + nothing,
        of["gap"] + nothing,
        entropy_s + nothing,
        entropy_t + nothing,
        agree.any(0) + nothing,
        cross_entropy,
    )
    return torch.stack(columns, 1).float()


def _weight(parts: Parts, sums: Tensor | None, rule: Rule) -> Tensor:
    """w of the two KLs [N]."""
    divergence = rule.divergence
    assert isinstance(divergence, TwoKL)
    if isinstance(divergence, EntropySwitch):
        return (parts.entropies()[0] > divergence.tau).double()
    if divergence.fixed_weight is not None:
        return torch.full_like(parts.lse_t, divergence.fixed_weight)
    assert sums is not None
    of = _sums(sums)
    # Two sums of the same terms may differ: that over the head may exceed the gap.
    w = (of["head_gap"] / of["gap"]).clamp(max=1.0)
    return torch.where(of["gap"] == 0.0, 0.5, w)


def _terms(
    kls: KLs, sums: Tensor, rule: Rule
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """(loss, weight of the forward KL that is mixed in, of_terms, total, pivot), each [N]: the
    coefficient of g, less the rate, and what is taken off it or off u."""
    divergence, of = rule.divergence, _sums(sums)
    if isinstance(divergence, DecoupledKL):
        each = dict(zip(SHARD_SUMS, sums.double().unbind(-1), strict=True))  # of [R, N]
        weight = of["total_x"].where(of["total_x"] != 0.0, 1.0)
        share = each["total_x"] / weight
        mean = (share * each["total_g"]).sum(0)
        variance = (share * (each["variance"] + (each["total_g"] - mean).square())).sum(0)
        w = torch.full_like(mean, divergence.alpha)
        loss = w * kls.forward_kl + 0.5 * divergence.beta * LN2**2 * variance
        # As softmaxes() has it, in fp32.
        pivot = (kls.forward_kl / LN2).float().double()
        return loss, w, -divergence.beta * LN2 / weight, mean, pivot
    total = of["total_g"]
    loss = ((of["total_x"] + total) * LN2).clamp(min=0.0)  # which no phi is below
    of_terms = torch.full_like(loss, LN2)
    if not isinstance(divergence, LKHybrid):
        return loss, None, of_terms, total, None
    w = ((loss - 1.0) * divergence.eta).exp()
    return w * kls.forward_kl + (1.0 - w) * loss, w, of_terms * (1.0 - w), total, None


def _of_decoupled(parts: Parts, label: Label, divergence: DKD, rule: Rule) -> tuple[Tensor, Slope]:
    """As in decoupled.py of the kernels: the last of the parts is the label's token."""
    others = Parts(
        {name: x[:-1] for name, x in parts.of.items()},
        parts.log2_t[:-1],
        parts.log2_s[:-1],
        _log2_sum(parts.log2_t[:-1]),
        _log2_sum(parts.log2_s[:-1]),
    )
    some = (others.lse_t != -torch.inf) & (others.lse_s != -torch.inf)
    odds_t, odds_s = label.log2_t - others.lse_t, label.log2_s - others.lse_s
    odds_1 = label.log2_1 - label.log2_z1
    target, pull = _target(odds_t, odds_s)
    kls = KLs(*(x.where(some, 0.0) for x in others.kls()))
    label_rate = rule.label_weight * rule.student_map.scale
    not_label = _log2_sigmoid(-odds_1).exp2()
    loss = rule.divergence_weight * (divergence.alpha * target + divergence.beta * kls.forward_kl)
    if rule.label_weight:
        loss = loss - rule.label_weight * LN2 * _log2_sigmoid(odds_1)
    # A side that has no other token has no use for its normaliser.
    lse_t, lse_s, lse_1 = (
        x.masked_fill(x == -torch.inf, 0.0) for x in (others.lse_t, others.lse_s, label.log2_z1)
    )
    factor_t, factor_s = (-_rest(lse_t)).exp2(), (-_rest(lse_s)).exp2()
    rate = rule.divergence_weight * rule.rate
    of_label = _of_label(lse_1, label_rate) * not_label
    of_others = 0.0 if rule.temperature != 1.0 else of_label
    coefficients = _kl_coefficients(
        factor_t,
        factor_s,
        _rest(lse_s) - _rest(lse_t),
        torch.full_like(loss, divergence.beta),
        torch.zeros_like(loss),
        kls,
        rate,
        of_others - divergence.alpha * pull * rate * factor_s,
    )
    at_label = divergence.alpha * pull * rate - not_label * label_rate
    slope = _slope(loss, lse_t, lse_s, lse_1, of_label, (*coefficients[:4], at_label))
    return loss.float(), slope


def _target(odds_t: Tensor, odds_s: Tensor) -> tuple[Tensor, Tensor]:
    """KL of label and not label, in nats, and its derivative by the log-odds of the student."""
    p = torch.where(odds_s > -torch.inf, _log2_sigmoid(odds_t).exp2(), 0.0)
    not_p = torch.where(odds_s < torch.inf, _log2_sigmoid(-odds_t).exp2(), 0.0)
    target = torch.zeros_like(p)
    for mass, sign in ((p, 1.0), (not_p, -1.0)):
        u = _log2_sigmoid(sign * odds_t) - _log2_sigmoid(sign * odds_s)
        target = target + torch.where(mass > 0.0, LN2 * mass * u, 0.0)
    # As it is 0 at least where nothing is dropped.
    target = torch.where(odds_s.isfinite(), target.clamp(min=0.0), target)
    pull = _log2_sigmoid(odds_s).exp2() * (p + not_p) - p
    known = ~(odds_t.isnan() | odds_s.isnan())
    return target.where(known, torch.nan), pull.where(known, torch.nan)


def _kl_coefficients(
    factor_t: Tensor,
    factor_s: Tensor,
    shift: Tensor,
    w: Tensor,
    of_reverse: Tensor,
    kls: KLs,
    rate: float,
    of_label: Tensor | float,
) -> tuple[Tensor, ...]:
    """slope, offset, teacher and lost, as `kl_coefficients` of gradient.py in the kernels."""
    # A KL of no weight may be infinite.
    reverse_kl = torch.where(of_reverse != 0.0, kls.reverse_kl, 0.0)
    common = w * kls.kept_p - of_reverse * (reverse_kl + kls.kept_q)
    student = factor_s * rate
    return (
        -of_reverse * LN2 * student,
        (common + of_reverse - of_reverse * LN2 * shift) * student + of_label,
        w * factor_t * rate,
        common * student + of_label,
    )


def _of_label(lse_1: Tensor, label_rate: float) -> Tensor:
    return (-_rest(lse_1)).exp2() * label_rate


def _slope(
    loss: Tensor,
    lse_t: Tensor,
    lse_s: Tensor,
    lse_1: Tensor,
    of_label: Tensor,
    coefficients: tuple[Tensor, ...],
) -> Slope:
    """A label that is no token makes the loss NaN, and all of the gradient with it."""
    broken = loss.isnan()
    missing = COEFFICIENTS - len(coefficients)
    held = torch.stack((*coefficients, *[torch.zeros_like(loss)] * missing), 1)
    held = held.clamp(-LARGEST_COEFFICIENT, LARGEST_COEFFICIENT)
    held = held.masked_fill(broken[:, None], torch.nan)
    of_softmaxes = torch.stack((lse_t, lse_s, lse_1, of_label), 1)
    return Slope(of_softmaxes.masked_fill(broken[:, None], torch.nan).float(), held.float())


def _sums(sums: Tensor) -> dict[str, Tensor]:
    """Those of all shards, [N] each, by name."""
    return dict(zip(SHARD_SUMS, sums.double().sum(0).unbind(-1), strict=True))


def _log2_mass(reference: Tensor, z: Tensor) -> Tensor:
    return torch.where(z == 0.0, -torch.inf, reference + z.log2())


def _log2_sum(parts: Tensor) -> Tensor:
    """log2 of the sum of 2^parts [R, N]; -inf where all parts are."""
    largest = parts.amax(0)
    whole = largest + (parts - largest).exp2().sum(0).log2()
    return torch.where(largest == -torch.inf, -torch.inf, whole)


def _softmax(parts: Tensor) -> Tensor:
    """The same, NaN where there is no mass at all."""
    whole = _log2_sum(parts)
    return whole.masked_fill(whole.isinf(), torch.nan)


def _rest(x: Tensor) -> Tensor:
    """What x loses when it is rounded to fp32."""
    return x - x.float().double()


def _log2_sigmoid(x: Tensor) -> Tensor:
    """-log2(1 + 2^-x)."""
    return -torch.logaddexp2(torch.zeros_like(x), -x)
