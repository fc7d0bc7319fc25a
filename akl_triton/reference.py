"""The float64 oracle of adaptive KL and of its family, and the authors' own computation.

`reference_adaptive_kl` spells the definition out with a full sort and every intermediate kept, to
be read along with the formulas, and `reference_divergence` does the same for the divergences that
are one function of an entry; `authors_adaptive_kl` is the published fp32 code, the baseline of
every comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Literal["exclusive", "inclusive"]
Ties = Literal["stable", "average"]


class ReferenceResult(NamedTuple):
    """Every intermediate of the loss, float64, one entry per row unless said otherwise.

    With a fixed weight there is no head: g_head, g_tail, head_mass and head_size are NaN and `head`
    is all False.
    """

    forward_kl: Tensor  # [N] KL(teacher || student)
    reverse_kl: Tensor  # [N] KL(student || teacher)
    gap: Tensor  # [N] sum |p - q|
    student_entropy: Tensor  # [N] -sum q ln q
    teacher_entropy: Tensor  # [N] -sum p ln p
    top1_agreement: Tensor  # [N] 1 where some token is a most probable one on both sides, else 0
    g_head: Tensor  # [N] its share inside the head
    g_tail: Tensor  # [N] its share outside
    forward_weight: Tensor  # [N] w, the weight of forward_kl
    head_mass: Tensor  # [N] teacher mass of the head
    head_size: Tensor  # [N] number of tokens in the head
    head: Tensor  # [N, V] bool; for ties="average" float64, k/n in the split group
    loss: Tensor  # [N]
    grad: Tensor  # [N, V_s] dloss/dstudent_logits with w constant
    terms: Tensor  # [N] the most that an entry of grad is a difference of


class SparseResult(NamedTuple):
    """The divergence of a teacher that is pairs, and its gradient, float64.

    The last three are NaN where there is no head."""

    loss: Tensor  # [N]
    grad: Tensor  # [N, V] dloss/dstudent_logits
    terms: Tensor  # [N] the most that an entry of grad is a difference of
    forward_weight: Tensor  # [N] w
    head_mass: Tensor  # [N] teacher mass of the head
    head_size: Tensor  # [N] number of pairs in the head


class DivergenceResult(NamedTuple):
    """A divergence and its gradient, float64."""

    loss: Tensor  # [N]
    grad: Tensor  # [N, V_s] dloss/dstudent_logits
    terms: Tensor  # [N] the most that an entry of grad is a difference of


def reference_adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    head: Head = "exclusive",
    ties: Ties = "stable",
    size: Tensor | None = None,
    weight: float | Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> ReferenceResult:
    """Adaptive KL per row in float64, with its closed-form gradient.

    Math:
        With K the tokens that are finite on both sides, and the head that of mu, or its first
        ``size`` [N] tokens where that is given::

            p = softmax(t/T), q = softmax(s/T), u = ln p - ln q
            forward_kl = sum_K p u, reverse_kl = -sum_K q u, gap = sum |p - q| = g_head + g_tail
            w = g_head / gap (1/2 where gap = 0), or `weight`, a number or [N]
            loss = w forward_kl + (1 - w) reverse_kl

            P_K = sum_K p, Q_K = sum_K q
            T dloss/ds_j = w (P_K q_j - [j in K] p_j)
                         + (1 - w) q_j ([j in K] (1 - u_j) - reverse_kl - Q_K)

        Either side's logits are softcap tanh(logit_scale x / softcap) of its input x, or
        logit_scale x without a softcap, and the gradient is with respect to x; infinities stay.
        Both are strictly increasing, so the head is ordered by the teacher's x. A row with NaN or
        +inf, or all -inf, on either side is NaN throughout.

    Shape:
        student_logits [N, V_s], teacher_logits [N, V_t]. What the shorter side lacks is -inf there.

    Dtype:
        Any floating dtype, also mixed; everything is computed and returned in ``dtype``, in which
        the same formulas are the yardstick of what that dtype can do.

    Reference:
        Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
        Language Models", arXiv 2404.02657.

    Example:
        >>> teacher = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> student = torch.tensor([[0.4, 0.4, 0.2]]).log()
        >>> result = reference_adaptive_kl(student, teacher)
        >>> round(result.forward_weight.item(), 6), result.head.tolist()
        (0.5, [[True, False, False]])
    """
    if size is not None and weight is not None:
        raise ValueError("size: expected None with a fixed weight, which has no head, got a tensor")
    student, teacher = shared_vocabulary(student_logits.detach(), teacher_logits.detach(), dtype)
    t = mapped_logits(teacher, teacher_softcap, teacher_logit_scale)
    s = mapped_logits(student, student_softcap, student_logit_scale)
    log_p = torch.log_softmax(t / temperature, dim=-1)
    log_q = torch.log_softmax(s / temperature, dim=-1)
    # Not exp(log p), which would round the masses of equal logits.
    p, q = torch.softmax(t / temperature, dim=-1), torch.softmax(s / temperature, dim=-1)

    kept = (teacher > -torch.inf) & (student > -torch.inf)
    u = torch.where(kept, log_p - log_q, 0.0)
    forward_kl = (p * u).sum(-1)
    reverse_kl = -(q * u).sum(-1)
    distance = (p - q).abs()
    gap = distance.sum(-1)
    tops = [x == x.amax(-1, keepdim=True) for x in (teacher, student)]
    agreement = (tops[0] & tops[1]).any(-1).to(dtype)

    if weight is None:
        order = teacher.argsort(dim=-1, descending=True, stable=True)
        if size is None:
            size = head_size(p, order, mu, head)
        members = head_members(teacher, order, size, ties)
        g_head = (members * distance).sum(-1)
        head_mass = (members * p).sum(-1)
        # Summed apart from g_head: gap - g_head would cancel.
        g_tail = ((1.0 - members.to(dtype)) * distance).sum(-1)
        w = torch.where(gap == 0.0, 0.5, g_head / gap)
        size_of_row = size.to(dtype)
    else:
        members = torch.zeros_like(p, dtype=torch.bool)
        g_head = g_tail = head_mass = size_of_row = torch.full_like(gap, torch.nan)
        w = torch.as_tensor(weight, dtype=dtype, device=gap.device).expand_as(gap)

    loss = w * forward_kl + (1.0 - w) * reverse_kl
    p_kept = (p * kept).sum(-1, keepdim=True)
    q_kept = (q * kept).sum(-1, keepdim=True)
    of_forward = p_kept * q - p * kept
    of_reverse = q * (kept * (1.0 - u) - reverse_kl[:, None] - q_kept)
    grad = (w[:, None] * of_forward + (1.0 - w[:, None]) * of_reverse) / temperature
    slope = mapped_slope(student, student_softcap, student_logit_scale)
    grad = grad * slope
    sizes = w[:, None] * (p + q) + (1.0 - w[:, None]) * q * (
        1.0 + u.abs() + reverse_kl[:, None].abs()
    )

    # A broken side may hide behind an empty K, whose sums are 0; its softmax is NaN in every entry.
    broken = p[:, 0].isnan() | q[:, 0].isnan()

    def nan_where_broken(row: Tensor) -> Tensor:
        return row.masked_fill(broken, torch.nan)

    return ReferenceResult(
        forward_kl=nan_where_broken(forward_kl),
        reverse_kl=nan_where_broken(reverse_kl),
        gap=nan_where_broken(gap),
        student_entropy=nan_where_broken(torch.special.entr(q).sum(-1)),
        teacher_entropy=nan_where_broken(torch.special.entr(p).sum(-1)),
        top1_agreement=nan_where_broken(agreement),
        g_head=nan_where_broken(g_head),
        g_tail=nan_where_broken(g_tail),
        forward_weight=nan_where_broken(w),
        head_mass=nan_where_broken(head_mass),
        head_size=nan_where_broken(size_of_row),
        head=members.masked_fill(broken[:, None], 0),
        loss=nan_where_broken(loss),
        grad=grad.masked_fill(broken[:, None], torch.nan)[:, : student_logits.shape[-1]],
        terms=nan_where_broken((sizes * slope).amax(-1) / temperature),
    )


def reference_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **numbers: float,
) -> DivergenceResult:
    """A divergence per row in float64, with its closed-form gradient.

    Math:
        A divergence is the sum of a function phi of each entry::

            p = softmax(t/T), q = softmax(s/T), u = ln p - ln q
            loss = sum_i phi(p_i, q_i), g = q dphi/dq, G = sum_i g_i
            T dloss/ds_j = g_j - q_j G

        phi of each divergence, with its numbers and the mixture m that it uses::

            jensen_shannon (beta)           beta p ln(p/m) + (1 - beta) q ln(q/m),
                                            m = beta p + (1 - beta) q
            skew_kl (alpha)                 p ln(p/m), m = alpha p + (1 - alpha) q
            skew_reverse_kl (alpha, detach) q ln(q/m), m = (1 - alpha) p + alpha q
            total_variation ()              |p - q| / 2
            alpha (a)                       (p^a q^(1-a) - a p - (1-a) q) / (a (a-1))
            alpha_beta (a, b)               (a p^l + b q^l - l p^a q^b) / (a b l), l = a + b
            todi ()                         (p - q) u
            jeffreys ()                     (p - q) u
            forward_kl (), reverse_kl ()    p u, -q u
            mixed_kl (alpha)                alpha p u - (1 - alpha) q u
            entropy_switch (tau)            [H(p) > tau] p u - q u, H(p) = -sum p ln p
            lk_hybrid (eta)                 w p u + (1 - w) |p - q| / 2,
                                            w = exp(-eta (1 - sum |p - q| / 2)) constant
            decoupled_kl (alpha, beta, kappa)
                                            alpha p u + beta/2 w (u - sum w u)^2,
                                            w_i = p_i^kappa over its sum
            dkd (alpha, beta)               alpha (P ln(P/Q) + (1-P) ln((1-P)/(1-Q)))
                                            + beta KL(p' || q')

        The sums of decoupled_kl are those of the tokens that are finite on both sides. In dkd, with
        y the label, P = p_y, Q = q_y, and p', q' are the distributions without y; an addend of the
        two whose probability is 0 on a side is 0, as is a KL to which a side has no other token.

        Two of the gradients hold a part of the loss constant. With ``detach``, skew_reverse_kl
        does so with m. The value of todi is that of v p u - (1 - v) q u with v = sigmoid(u)
        constant, so that g = (q - p) - u q^2 / (p + q).

        Where a side's logit is -inf, phi and g take their limit at p = 0 or q = 0 if it is finite::

                              (p, 0)                     (0, q)
            jensen_shannon    beta p ln(1/beta)          (1 - beta) q ln(1/(1 - beta))
            skew_kl           p ln(1/alpha)              0
            skew_reverse_kl   0                          q ln(1/alpha)
            total_variation   p / 2                      q / 2
            alpha             p / (1-a) if a < 1         q / a if a > 0
            alpha_beta        p^l / (b l) if b, l > 0    q^l / (a l) if a, l > 0

        Where it is infinite, which is everywhere else, the entry is dropped: it adds 0 to the loss
        and has g_j = 0, but it keeps its q_j G. For alpha and alpha_beta the exponents decide, as
        0^c is 0 for c > 0 and infinite for c < 0: those of q are l and b, and those of p are l and
        a (for alpha, 1 and 1 - a, and 1 and a). An entry that both sides forbid adds nothing.
        Either side's logits are softcap tanh(logit_scale x / softcap) of its input x, or
        logit_scale x without a softcap, and the gradient is with respect to x; infinities stay.
        A row with NaN or +inf, or all -inf, on either side is NaN throughout.

    Shape:
        student_logits [N, V_s], teacher_logits [N, V_t]. What the shorter side lacks is -inf there.
        labels [N], tokens of the student, for dkd.

    Dtype:
        Any floating dtype, also mixed; everything is computed and returned in ``dtype``.

    Reference:
        - jensen_shannon: Agarwal et al. (GKD), arXiv 2306.13649.
        - skew_kl, skew_reverse_kl: Ko et al. (DistiLLM), arXiv 2402.03898; with ``detach``, Ko et
          al. (DistiLLM-2), arXiv 2503.07067.
        - alpha: Amari, "Differential-Geometrical Methods in Statistics", 1985.
        - alpha_beta: Wang et al. (ABKD), arXiv 2505.04560.
        - todi: Jung et al. (ToDi), arXiv 2505.16297.
        - entropy_switch: Jin et al., arXiv 2603.07079.
        - lk_hybrid: Samarin et al. (LK losses), arXiv 2602.23881.
        - decoupled_kl: Cui et al. (DKL, IKL), arXiv 2305.13948.
        - dkd: Zhao et al., arXiv 2203.08679.

    Example:
        >>> teacher = torch.tensor([[0.75, 0.25]]).log()
        >>> student = torch.tensor([[0.5, 0.5]]).log()
        >>> result = reference_divergence(student, teacher, "total_variation")
        >>> [round(x, 6) for x in (result.loss.item(), *result.grad[0].tolist())]
        [0.25, -0.25, 0.25]
    """
    of_rows: dict[str, Callable[..., DivergenceResult]] = {
        "forward_kl": partial(_mixed_kl, alpha=1.0),
        "reverse_kl": partial(_mixed_kl, alpha=0.0),
        "mixed_kl": _mixed_kl,
        "entropy_switch": _entropy_switch,
        "lk_hybrid": _lk_hybrid,
        "decoupled_kl": _decoupled_kl,
        "dkd": partial(_dkd, labels=labels),
    }
    maps: dict[str, Any] = {
        "temperature": temperature,
        "student_softcap": student_softcap,
        "teacher_softcap": teacher_softcap,
        "student_logit_scale": student_logit_scale,
        "teacher_logit_scale": teacher_logit_scale,
        "dtype": dtype,
    }
    if divergence in of_rows:
        return of_rows[divergence](student_logits, teacher_logits, **numbers, **maps)
    if divergence not in _DIVERGENCES:
        names = ", ".join((*_DIVERGENCES, *of_rows))
        raise ValueError(f"divergence: expected one of {names}, got {divergence!r}")
    s, t, slope = _logits_of(student_logits, teacher_logits, **maps)
    p, q = torch.softmax(t, dim=-1), torch.softmax(s, dim=-1)
    log_p, log_q = torch.log_softmax(t, dim=-1), torch.log_softmax(s, dim=-1)
    phi, g = _DIVERGENCES[divergence](p, q, log_p, log_q, **numbers)

    forbidden = (log_p == -torch.inf) | (log_q == -torch.inf)
    dropped = forbidden & ~(phi.isfinite() & g.isfinite())
    phi, g = phi.masked_fill(dropped, 0.0), g.masked_fill(dropped, 0.0)
    total = g.sum(-1, keepdim=True)
    grad = (g - q * total) * slope
    sizes = (torch.maximum(p, q) + g.abs() + q * total.abs()) * slope

    # The softmax of a broken side is NaN in every entry, some of which may be dropped by the other.
    broken = p[:, 0].isnan() | q[:, 0].isnan()
    return DivergenceResult(
        loss=phi.sum(-1).masked_fill(broken, torch.nan),
        grad=grad.masked_fill(broken[:, None], torch.nan)[:, : student_logits.shape[-1]],
        terms=sizes.amax(-1).masked_fill(broken, torch.nan),
    )


def reference_sparse(
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor | None = None,
    divergence: str = "adaptive_kl",
    *,
    outside: Literal["bucket", "zero", "renormalise"] = "bucket",
    temperature: float = 1.0,
    mu: float = 0.5,
    head: Head = "exclusive",
    ties: Ties = "stable",
    size: Tensor | None = None,
    weight: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **numbers: float,
) -> SparseResult:
    """A divergence of k pairs a row and one entry for all other tokens, with its gradient.

    Math:
        S the tokens of the pairs, q = softmax(s/T), sigma = sum of q outside of S
        p = exp(log_probs), tau = exp(log_tail), or 1 - sum_S p without log_tail; both divided by
        their sum, which rounding may have put off 1
        The loss is the divergence of (p_S, tau) and (q_S, sigma), whose gradient by the logarithms
        of the entries, of which only differences matter, is g:
            dloss/ds_i = g_i / T                           i in S
            dloss/ds_j = g_rest (q_j / sigma) / T          every other j
        outside="zero": tau = 0. "renormalise": tau = sigma = 0, and g_rest = 0.
        The head of adaptive_kl is that of mu among the pairs, in the order (p descending, id
        ascending), or their first `size` [N]: never the rest. Its w is that of the head, or
        `weight` [N].
    Shape:
        student_logits [N, V]; ids and log_probs [N, k], in any order, an id < 0 being no pair;
        log_tail [N].
    Dtype:
        Any floating dtype; everything is computed and returned in `dtype`.

    Reference:
        See `akl_triton.SparseTeacher`.
    Example:
        >>> student = torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log()
        >>> pairs = torch.tensor([[0]]), torch.tensor([[0.5]]).log()
        >>> result = reference_sparse(student, *pairs, divergence="total_variation")
        >>> round(result.loss.item(), 4), [round(x, 4) for x in result.grad[0].tolist()]
        (0.1, [-0.24, 0.16, 0.04, 0.04])
    """
    x = student_logits.detach().to(dtype)
    s = mapped_logits(x, student_softcap, student_logit_scale) / temperature
    slope = mapped_slope(x, student_softcap, student_logit_scale) / temperature
    last = torch.iinfo(torch.int64).max
    tokens, order = ids.long().masked_fill(ids < 0, last).sort(dim=-1)
    named = tokens < last
    tokens = tokens.where(named, 0)
    log_p = log_probs.to(dtype).gather(-1, order).masked_fill(~named, -torch.inf)
    rest = 1.0 - log_p.exp().sum(-1) if log_tail is None else log_tail.to(dtype).exp()
    if outside != "bucket":
        rest = torch.zeros_like(rest)
    entries_t = torch.cat([log_p, rest.clamp(min=0.0).log()[:, None]], dim=-1).log_softmax(-1)

    is_pair = torch.zeros_like(s, dtype=torch.bool)
    is_pair.scatter_reduce_(-1, tokens, named, "amax")
    log_q = torch.log_softmax(s, dim=-1)
    of_pairs = log_q.gather(-1, tokens).masked_fill(~named, -torch.inf)
    others = log_q.masked_fill(is_pair, -torch.inf)
    sigma = others.logsumexp(-1, keepdim=True)
    if outside == "renormalise":
        sigma = torch.full_like(sigma, -torch.inf)
    entries_s = torch.cat([of_pairs, sigma], dim=-1)

    w = mass = size_of_row = torch.full_like(rest, torch.nan)
    if divergence == "adaptive_kl":
        p, q = entries_t.exp(), torch.softmax(entries_s, dim=-1)
        in_order = log_p.argsort(dim=-1, descending=True, stable=True)
        if size is None:
            size = head_size(p[:, :-1], in_order, mu, head).minimum(named.sum(-1))
        members = head_members(log_p, in_order, size, ties)
        distance = (p - q).abs()
        gap = distance.sum(-1)
        w = torch.where(gap == 0.0, 0.5, (members * distance[:, :-1]).sum(-1) / gap)
        w = w if weight is None else weight.to(dtype)
        mass, size_of_row = (members * p[:, :-1]).sum(-1), size.to(dtype)
        of_entries = reference_adaptive_kl(entries_s, entries_t, weight=w, dtype=dtype)
        loss, g, terms = of_entries.loss, of_entries.grad, of_entries.terms
    else:
        fields: dict[str, Any] = dict(numbers)
        loss, g, terms = reference_divergence(
            entries_s, entries_t, divergence, dtype=dtype, **fields
        )
    share = torch.where(is_pair | (sigma == -torch.inf), 0.0, (others - sigma).exp())
    own = torch.zeros_like(s).scatter_add_(-1, tokens, g[:, :-1].where(named, 0.0))
    grad = (own + g[:, -1:] * share) * slope
    return SparseResult(loss, grad, terms * slope.amax(-1), w, mass, size_of_row)


def reference_cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    *,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> DivergenceResult:
    """Cross-entropy of the student with the labels [N] at T = 1 in float64, with its gradient.

    Math:
        ``q = softmax(s)``, ``loss = -ln q_label``, ``dloss/ds_j = q_j - [j = label]``, where s is
        softcap tanh(logit_scale x / softcap) of the input x, or logit_scale x without a softcap,
        and the gradient is with respect to x; infinities stay. A row with NaN or +inf, or all -inf,
        is NaN throughout.

    Shape:
        student_logits [N, V_s].

    Dtype:
        Any floating dtype; everything is computed and returned in ``dtype``.

    Reference:
        Its weighted sum with a divergence: Hinton et al., arXiv 1503.02531, section 2.

    Example:
        >>> student = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> result = reference_cross_entropy(student, torch.tensor([1]))
        >>> round(result.loss.item(), 4), [round(x, 2) for x in result.grad[0].tolist()]
        (1.3863, [0.5, -0.75, 0.25])
    """
    x = student_logits.detach().to(dtype)
    s = mapped_logits(x, student_softcap, student_logit_scale)
    slope = mapped_slope(x, student_softcap, student_logit_scale)
    at_label = F.one_hot(labels.long(), x.shape[-1]).to(dtype)
    q = torch.softmax(s, dim=-1)
    return DivergenceResult(
        loss=-torch.log_softmax(s, dim=-1).gather(-1, labels.long()[:, None]).squeeze(-1),
        grad=(q - at_label) * slope,
        terms=((q + at_label) * slope).amax(-1),
    )


def _mixture(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> DivergenceResult:
    """The sum of weights [N] times losses, for parts (weight, loss, grad, terms)."""
    loss, grad, terms = (
        sum(part[0].view(-1, *[1] * (part[k].dim() - 1)) * part[k] for part in parts)
        for k in (1, 2, 3)
    )
    return DivergenceResult(loss, grad, terms)  # type: ignore[arg-type]


def _mixed_kl(student: Tensor, teacher: Tensor, *, alpha: float, **maps: Any) -> DivergenceResult:
    result = reference_adaptive_kl(student, teacher, weight=alpha, **maps)
    return DivergenceResult(result.loss, result.grad, result.terms)


def _entropy_switch(
    student: Tensor, teacher: Tensor, *, tau: float, **maps: Any
) -> DivergenceResult:
    forward, reverse = (
        reference_adaptive_kl(student, teacher, weight=weight, **maps) for weight in (1.0, 0.0)
    )
    weight = (forward.teacher_entropy > tau).to(forward.loss.dtype)
    return _mixture(
        [
            (weight, forward.loss, forward.grad, forward.terms),
            (torch.ones_like(weight), reverse.loss, reverse.grad, reverse.terms),
        ]
    )


def _lk_hybrid(student: Tensor, teacher: Tensor, *, eta: float, **maps: Any) -> DivergenceResult:
    forward = reference_adaptive_kl(student, teacher, weight=1.0, **maps)
    variation = reference_divergence(student, teacher, "total_variation", **maps)
    weight = torch.exp(-eta * (1.0 - variation.loss))
    return _mixture(
        [
            (weight, forward.loss, forward.grad, forward.terms),
            (1.0 - weight, variation.loss, variation.grad, variation.terms),
        ]
    )


def _decoupled_kl(
    student: Tensor, teacher: Tensor, *, alpha: float, beta: float, kappa: float, **maps: Any
) -> DivergenceResult:
    forward = reference_adaptive_kl(student, teacher, weight=1.0, **maps)
    s, t, slope = _logits_of(student, teacher, **maps)
    kept = (s > -torch.inf) & (t > -torch.inf)
    u = torch.where(kept, torch.log_softmax(t, dim=-1) - torch.log_softmax(s, dim=-1), 0.0)
    w = torch.softmax((kappa * t).masked_fill(~kept, -torch.inf), dim=-1)
    w = w.masked_fill(~kept.any(-1, keepdim=True), 0.0)
    centred = torch.where(kept, u - (w * u).sum(-1, keepdim=True), 0.0)
    variance = (w * centred.square()).sum(-1)
    shape = student.shape[-1]
    grad = (-w * centred * slope)[:, :shape]
    sizes = (w * (centred.abs() + u.abs()) * slope).amax(-1)
    return DivergenceResult(
        loss=alpha * forward.loss + 0.5 * beta * variance,
        grad=alpha * forward.grad + beta * grad,
        terms=alpha * forward.terms + beta * sizes,
    )


def _dkd(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None,
    alpha: float,
    beta: float,
    **maps: Any,
) -> DivergenceResult:
    if labels is None:
        raise ValueError("labels: expected the token of each row for dkd, got None")
    s, t, slope = _logits_of(student, teacher, **maps)
    at_label = F.one_hot(labels.long(), s.shape[-1]).bool()

    def apart(x: Tensor) -> tuple[Tensor, Tensor]:
        """ln of the probabilities of the label and of all others [N, 2], and of these [N, V]."""
        others = x.masked_fill(at_label, -torch.inf)
        pair = torch.stack((x[at_label], torch.logsumexp(others, dim=-1)), dim=-1)
        return torch.log_softmax(pair, dim=-1), torch.log_softmax(others, dim=-1)

    def kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The KL over the entries that are finite on both sides, its gradient by the logits of q,
        and the most that an entry of that is a difference of."""
        kept = (log_p > -torch.inf) & (log_q > -torch.inf)
        p, q = (log.exp().nan_to_num(0.0) for log in (log_p, log_q))
        loss = torch.where(kept, p * (log_p - log_q), 0.0).sum(-1)
        grad = q * (p * kept).sum(-1, keepdim=True) - p * kept
        return loss, grad, torch.maximum(p, q)

    (pair_p, others_p), (pair_q, others_q) = apart(t), apart(s)
    target, of_pair, pair_sizes = kl(pair_p, pair_q)
    rest, of_rest, sizes = kl(others_p, others_q)
    # The probabilities of the others move the pair's second logit, by their share of it.
    share = others_q.exp().nan_to_num(0.0)
    by_pair = torch.where(at_label, of_pair[:, :1], of_pair[:, 1:] * share)
    grad = (alpha * by_pair + beta * of_rest) * slope
    sizes = (alpha * pair_sizes.amax(-1, keepdim=True) + beta * sizes) * slope
    broken = (torch.log_softmax(t, dim=-1) + torch.log_softmax(s, dim=-1)).isnan().all(-1)
    return DivergenceResult(
        loss=(alpha * target + beta * rest).masked_fill(broken, torch.nan),
        grad=grad.masked_fill(broken[:, None], torch.nan)[:, : student.shape[-1]],
        terms=sizes.amax(-1).masked_fill(broken, torch.nan),
    )


def _logits_of(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """s / T and t / T [N, V] of a shared vocabulary, and the derivative of the former."""
    student, teacher = shared_vocabulary(student.detach(), teacher.detach(), dtype)
    s = mapped_logits(student, student_softcap, student_logit_scale) / temperature
    t = mapped_logits(teacher, teacher_softcap, teacher_logit_scale) / temperature
    return s, t, mapped_slope(student, student_softcap, student_logit_scale) / temperature


# Each member takes p, q, ln p, ln q and its numbers, and returns phi and g. Where a logit is -inf,
# IEEE arithmetic itself gives the finite limit, or else inf or NaN, by which the entry is dropped.


def _times_log(x: Tensor, log: Tensor) -> Tensor:
    """x log, where 0 ln 0 = 0."""
    return torch.where(x == 0.0, 0.0, x * log)


def _log_mixture(log_p: Tensor, log_q: Tensor, of_p: float) -> Tensor:
    """ln(of_p p + (1 - of_p) q)"""
    return torch.logaddexp(log_p + math.log(of_p), log_q + math.log1p(-of_p))


def _jensen_shannon(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, beta)
    g = (1.0 - beta) * _times_log(q, log_q - log_m)
    return beta * _times_log(p, log_p - log_m) + g, g


def _skew_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, alpha: float
) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, alpha)
    return _times_log(p, log_p - log_m), -(1.0 - alpha) * q * torch.exp(log_p - log_m)


def _skew_reverse_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, alpha: float, detach: bool
) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, 1.0 - alpha)
    phi = _times_log(q, log_q - log_m)
    if detach:
        return phi, phi + q
    return phi, phi + q - alpha * q * torch.exp(log_q - log_m)


def _total_variation(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * (p - q).abs(), 0.5 * q * torch.sign(q - p)


def _alpha(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, a: float
) -> tuple[Tensor, Tensor]:
    product = torch.exp(a * log_p + (1.0 - a) * log_q)
    phi = (product - a * p - (1.0 - a) * q) / (a * (a - 1.0))
    return phi, (q - product) / a


def _alpha_beta(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, a: float, b: float
) -> tuple[Tensor, Tensor]:
    total = a + b
    product = torch.exp(a * log_p + b * log_q)
    p_total, q_total = torch.exp(total * log_p), torch.exp(total * log_q)
    phi = (a * p_total + b * q_total - total * product) / (a * b * total)
    return phi, (q_total - product) / a


def _todi(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    u = log_p - log_q
    return (p - q) * u, (q - p) - u * q * torch.sigmoid(-u)


def _jeffreys(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    u = log_p - log_q
    return (p - q) * u, (q - p) - q * u


_Member: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
_DIVERGENCES: dict[str, _Member] = {
    "jensen_shannon": _jensen_shannon,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "alpha": _alpha,
    "alpha_beta": _alpha_beta,
    "todi": _todi,
    "jeffreys": _jeffreys,
}


def shared_vocabulary(
    student: Tensor, teacher: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Both as [N, max(V_s, V_t)] of `dtype`; the entries that one side lacks are -inf."""
    vocabulary = max(student.shape[-1], teacher.shape[-1])

    def pad(x: Tensor) -> Tensor:
        return F.pad(x.to(dtype), (0, vocabulary - x.shape[-1]), value=-torch.inf)

    return pad(student), pad(teacher)


def mapped_logits(x: Tensor, softcap: float | None, scale: float) -> Tensor:
    """softcap tanh(scale x / softcap), or scale x; infinities stay."""
    if softcap is None:
        return scale * x
    return torch.where(x.isinf(), x, softcap * torch.tanh(scale * x / softcap))


def mapped_slope(x: Tensor, softcap: float | None, scale: float) -> Tensor:
    """d mapped_logits / dx."""
    if softcap is None:
        return torch.full_like(x, scale)
    return scale / torch.cosh(scale * x / softcap).square()


def head_size(p: Tensor, order: Tensor, mu: float, head: Head) -> Tensor:
    """[N] int64: how many tokens of `order` (teacher logit descending, index ascending) are taken.

    The tie rule has no say here: tied tokens have the same mass, whatever their order.
    """
    mass = p.gather(-1, order).cumsum(-1)
    if head == "exclusive":
        return (mass <= mu).sum(-1).clamp(min=1)
    return (mass < mu).sum(-1).add(1).clamp(max=p.shape[-1])


def head_members(teacher: Tensor, order: Tensor, size: Tensor, ties: Ties) -> Tensor:
    """[N, V] membership of the head of `size` tokens: bool for stable ties, else float64."""
    if ties == "stable":
        taken_in_order = torch.arange(order.shape[-1], device=order.device) < size[:, None]
        return torch.zeros_like(taken_in_order).scatter_(-1, order, taken_in_order)
    # [N, 1] logit of the last token taken; whatever ties with it shares its group's seats.
    last = teacher.gather(-1, order.gather(-1, size[:, None] - 1))
    above, tied = teacher > last, teacher == last
    taken = (size - above.sum(-1)).double()
    return above + tied * (taken / tied.sum(-1))[:, None]


def authors_adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, mu: float = 0.5) -> Tensor:
    """The authors' published computation as it is meant: full sort, gather and cumsum in fp32.

    Their AKL.py replaces -inf by 0 before it weighs head against tail, which gives a forbidden
    token e^0: not repeated here. The sums skip infinite logits, as theirs do.

    Shape:
        Both [..., V]; gives the mean over all rows. Differentiable in student_logits by autograd,
        with the weights held constant.

    Reference:
        AKL.py of https://github.com/wutaiqiang/LLM_KD_AKL
    """
    forward_weight, tail_weight = _authors_weights(student_logits, teacher_logits, mu)
    infinite = torch.isinf(student_logits) | torch.isinf(teacher_logits)
    forward_kl = _authors_kl(teacher_logits, student_logits, infinite)
    reverse_kl = _authors_kl(student_logits, teacher_logits, infinite)
    return (forward_weight * forward_kl).mean() + (tail_weight * reverse_kl).mean()


def _authors_weights(
    student_logits: Tensor, teacher_logits: Tensor, mu: float
) -> tuple[Tensor, Tensor]:
    teacher_probs = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    student_probs = F.softmax(student_logits, dim=-1, dtype=torch.float32).detach()
    sorted_teacher, order = teacher_probs.sort(dim=-1, descending=True)
    sorted_student = student_probs.gather(dim=-1, index=order)
    errors = torch.abs(sorted_teacher - sorted_student)
    in_tail = torch.cumsum(sorted_teacher, dim=-1) > mu
    in_tail[..., 0] = False
    g_head = torch.masked_fill(errors, in_tail, 0.0).sum(dim=-1)
    g_tail = torch.masked_fill(errors, ~in_tail, 0.0).sum(dim=-1)
    return g_head / (g_head + g_tail), g_tail / (g_head + g_tail)


def _authors_kl(target_logits: Tensor, logits: Tensor, infinite: Tensor) -> Tensor:
    """KL(target || other) per row, with both logarithms taken anew, as the authors do."""
    target_probs = F.softmax(target_logits, dim=-1, dtype=torch.float32)
    target_logprobs = F.log_softmax(target_logits, dim=-1, dtype=torch.float32)
    logprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    entropy = torch.masked_fill(target_probs * target_logprobs, infinite, 0.0).sum(dim=-1)
    cross = torch.masked_fill(target_probs * logprobs, infinite, 0.0).sum(dim=-1)
    return entropy - cross
