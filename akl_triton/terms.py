"""The terms of a divergence in PyTorch: what one vocabulary entry adds to the sums of its row.

    terms(p, q, log_p, log_q, u, *numbers) -> (x, g)      phi = x + g      g = q dphi/dq

    loss = sum (x + g)      dloss/ds_j = (g_j - q_j G) / T      G = sum g

This is all that the PyTorch backend knows of a divergence. Everything is elementwise and in nats,
in fp32, or in fp64 where the vocabulary is in shards. Phi is in normal form: it and its derivative
are 0 at p = q, which adding c (p - q) arranges and which changes nothing, as p and q have the same
sum. An error of the normalisers, which shifts every u alike, is then of second order.

u = ln p - ln q is given because it is exact where the two are close. All five are finite. Where a
logit is -inf, its probability is 0, its logarithm is `-LARGEST_LOG`, and u is `LARGEST_U` if it is
the student's, -`LARGEST_U` if it is the teacher's. There terms must have the limit of phi and g if
it is finite; the caller drops the entry if it is not.

A function returns new tensors and does not change what it is given. None branches: on a CPU,
`torch.where` costs as much as several exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Terms: TypeAlias = Callable[..., tuple[Tensor, Tensor]]

_LOG2_E = math.log2(math.e)
LARGEST_U = 2.0**127 / _LOG2_E  # of |ln p - ln q|, as the kernels have it: 2^127 bits
LARGEST_LOG = 2.0**100  # of |ln p| and of |ln q|, which are multiplied by exponents
LARGEST_DIFFERENCE = 2.0**50  # of |u| where it is squared
_FAR = 40.0  # where a power too small for fp32 times e^40 is still too small to count
_LARGEST_PRODUCT_LOG = 120.0 * math.log(2.0)  # of p^a q^b, which is beyond 1 for exponents below 0
_LARGEST_POWER_LOG = 66.0 * math.log(2.0)  # of p^l and q^l, so that e^40 times them is not infinite


def jensen_shannon(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """beta p ln(p/m) + (1 - beta) q ln(q/m), m = beta p + (1 - beta) q"""
    log_m = _log_mixture(u, beta)
    x = u.clamp(max=0.0).sub_(log_m).mul_(p).mul_(beta)
    g = u.clamp(min=0.0).add_(log_m).mul_(q).mul_(beta - 1.0)
    return x, g


def skew_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """p ln(p/m) - (1 - alpha) (p - q), m = alpha p + (1 - alpha) q"""
    log_share = u.clamp(max=0.0).sub_(_log_mixture(u, alpha))  # ln(p/m)
    rest = torch.expm1(log_share).neg_()
    g = torch.mul(q, rest).mul_(1.0 - alpha)
    x = rest.mul_(alpha).add_(log_share).mul_(p)
    return x, g


def skew_reverse_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """q ln(q/m) + (1 - alpha) (p - q), m = (1 - alpha) p + alpha q"""
    log_share = u.clamp(min=0.0).add_(_log_mixture(u, 1.0 - alpha)).neg_()  # ln(q/m)
    rest = torch.expm1(log_share).neg_()
    x = torch.mul(p, rest).mul_(1.0 - alpha)
    g = rest.mul_(alpha).add_(log_share).mul_(q)
    return x, g


def skew_reverse_kl_detached(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """The phi of skew_reverse_kl, its mixture m a constant of the backward pass."""
    log_share = u.clamp(min=0.0).add_(_log_mixture(u, 1.0 - alpha)).neg_()  # ln(q/m)
    # (1 - alpha) (p - q) = m - q = m (1 - q/m), of which errors cancel against those of g.
    x = torch.expm1(log_share).mul_(torch.mul(p, alpha - 1.0).sub_(q, alpha=alpha))
    return x, log_share.mul_(q)


def total_variation(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """|p - q| / 2"""
    half = torch.sign(u).mul_(0.5)
    return p * half, half.mul_(q).neg_()


def alpha(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    """(p^a q^(1-a) - a p - (1-a) q) / (a (a-1))"""
    return _power_terms(p, q, log_p, log_q, u, a, 1.0 - a)


def alpha_beta(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, a: float, b: float
) -> tuple[Tensor, Tensor]:
    """(a p^l + b q^l - l p^a q^b) / (a b l), l = a + b"""
    total = a + b
    powers = [_exp(log * total, _LARGEST_POWER_LOG) for log in (log_p, log_q)]
    h, g = _power_terms(powers[0], powers[1], log_p, log_q, u, a, b)
    # By Euler, as phi is homogeneous of degree l: l phi = g + h.
    return h.add_(g, alpha=1.0 - total).div_(total), g


def todi(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(p - q) u, which is v p u - (1 - v) q u with v = p / (p + q) constant in the backward pass"""
    difference = p - q
    # q / (p + q) = sigmoid(-u)
    g = torch.neg(u).sigmoid_().mul_(u).mul_(q).add_(difference).neg_()
    return difference.mul_(u).sub_(g), g


def jeffreys(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """(p - q) u"""
    difference = p - q
    return torch.addcmul(difference, p, u), torch.addcmul(difference, q, u).neg_()


TERMS: dict[str, Terms] = {
    terms.__name__: terms
    for terms in (
        jensen_shannon,
        skew_kl,
        skew_reverse_kl,
        skew_reverse_kl_detached,
        total_variation,
        alpha,
        alpha_beta,
        todi,
        jeffreys,
    )
}


def _log_mixture(u: Tensor, of_p: float) -> Tensor:
    """ln(m / max(p, q)) for m = of_p p + (1 - of_p) q; at most 0, and exact for small weights."""
    of_teacher = u.clamp(max=0.0).mul_(_LOG2_E).exp2_()  # p / max(p, q)
    of_student = u.clamp(min=0.0).mul_(-_LOG2_E).exp2_()  # q / max(p, q)
    return of_teacher.mul_(of_p).add_(of_student, alpha=1.0 - of_p).log_()


def _power_terms(
    p_total: Tensor, q_total: Tensor, log_p: Tensor, log_q: Tensor, u: Tensor, a: float, b: float
) -> tuple[Tensor, Tensor]:
    """(h, g) = ((p^l - p^a q^b) / b, (q^l - p^a q^b) / a) from p^l and q^l, l = a + b."""
    product = _exp(torch.mul(log_p, a).add_(log_q, alpha=b), _LARGEST_PRODUCT_LOG)
    return _less(p_total, product, u, -b).div_(b), _less(q_total, product, u, a).div_(a)


def _less(power: Tensor, product: Tensor, u: Tensor, exponent: float) -> Tensor:
    """power - product, where product = power e^(exponent u).

    Up to a ratio of e^`_FAR`, the second form is the more accurate, and does not cancel where the
    ratio is close to 1. Beyond, its factors may overflow and underflow, and the rest of the
    difference comes from the product."""
    beyond = torch.sub(product, power, alpha=math.exp(_FAR)).clamp_(min=0.0)
    return torch.mul(u, exponent).clamp_(max=_FAR).expm1_().mul_(power).add_(beyond).neg_()


def _exp(log: Tensor, largest: float) -> Tensor:
    """e^log, held at e^largest; in place."""
    return log.clamp_(max=largest).mul_(_LOG2_E).exp2_()
