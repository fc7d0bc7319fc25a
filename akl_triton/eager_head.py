"""The boundary of the head in the PyTorch backend, and the sums over the head.

On a CPU nothing is sorted but a sample of each row and the few tokens around the boundary: see
`_narrow`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import AdaptiveKL, Rule
from .eager_chunks import Chunk, mapped, sync_is_free

SAMPLE = 256  # tokens that stand for a row when the head's last logit is guessed


def head_sums(
    chunk: Chunk, teacher: Tensor, max_t: Tensor, z_t: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gap (in units of 1/z_t), mass and size of the head, each [R, 1] fp32.

    chunk.spare[0] holds |p - q| of the teacher's vocabulary, in the same units; the rest of it is
    written over.
    With v the logit at which the cumulative mass crosses mu, the head is every token above v and k
    of the n tokens equal to v.
    """
    divergence = rule.divergence
    assert isinstance(divergence, AdaptiveKL)
    ranked_tokens = teacher.shape[-1] - rule.rest  # the rest is in no head
    teacher = teacher[:, :ranked_tokens]
    # Metal has no fp64; its fp32 sums blur the boundary by a few more roundings.
    wide = torch.float32 if teacher.device.type == "mps" else torch.float64
    target = divergence.mu * z_t.to(wide)
    spare = chunk.spare[:, :, :ranked_tokens]
    p, distance = chunk.p[:, :ranked_tokens], spare[0]
    none = torch.zeros_like(target)
    window = _Window(teacher, p, distance, count_above=none, mass_above=none, gap_above=none)
    while sync_is_free(teacher) and (width := window.logits.shape[-1]) >= 4 * SAMPLE:
        narrower = _narrow(window, target, spare[1:, :, :width])
        if narrower is None:
            break
        window = narrower
    logits = window.logits.float()

    ranked = logits.sort(dim=-1, descending=True).values
    last = (ranked > -torch.inf).sum(-1, keepdim=True) - 1
    # In fp64, and over itself where it can be: a row of equal logits is here in its full width.
    masses = mapped(ranked.to(wide, copy=True), rule.teacher_map)
    masses.sub_(mapped(max_t.to(wide), rule.teacher_map)).div_(rule.temperature).exp_()
    cumulative = masses.cumsum(-1).add_(window.mass_above)
    crossing = (cumulative <= target).sum(-1, keepdim=True).minimum(last).clamp(min=0)
    v, mass_v = ranked.gather(-1, crossing), masses.gather(-1, crossing)

    above, tied = logits > v, logits == v
    first, n = above.sum(-1, keepdim=True), tied.sum(-1, keepdim=True)
    count = window.count_above + first
    mass = cumulative.gather(-1, first) - masses.gather(-1, first)
    del ranked, masses, cumulative
    seats = (target - mass) / mass_v.clamp(min=torch.finfo(wide).tiny)
    seats = seats.floor() if divergence.head == "exclusive" else seats.ceil()
    k = seats.clamp(min=0).minimum(n).maximum(1 - count)

    if divergence.ties == "stable":
        share = (tied & (tied.cumsum(-1, dtype=torch.int32) <= k)).float()
    else:
        share = tied * (k / n).float()
    gap = window.gap_above + share.add_(above).mul_(window.distance).sum(-1, keepdim=True)
    return gap.float(), ((mass + k * mass_v) / z_t).float(), (count + k).float()


class _Window(NamedTuple):
    """K tokens of each row, in index order, among which the crossing logit is.

    The sums are over the tokens above all of these: they belong to the head.
    """

    logits: Tensor  # [R, K], padded with -inf
    p: Tensor  # [R, K] fp32
    distance: Tensor  # [R, K] fp32
    count_above: Tensor  # [R, 1] fp64
    mass_above: Tensor  # [R, 1] fp64
    gap_above: Tensor  # [R, 1] fp64


def _narrow(window: _Window, target: Tensor, spare: Tensor) -> _Window | None:
    """A window about a tenth as wide, certain to hold the crossing logit; None if it stays wide.

    One token in so many is sampled. Light tokens are many and well sampled, so the mass down to a
    logit is what the sample's tail leaves over: that gives a bound on either side of the crossing.
    The true masses above the bounds then prove the guess; where it fails, a bound moves away.
    Comparisons write 0 or 1 into fp32, which is several times as fast as into bool.
    """
    logits, p, distance, *_ = window
    above, inside = spare
    rows, width = logits.shape
    stride = width // SAMPLE
    sample, order = logits[:, ::stride].float().sort(dim=-1, descending=True)
    masses = p[:, ::stride].gather(-1, order).double() * stride
    below = masses.sum(-1, keepdim=True) - masses.cumsum(-1)
    total = window.mass_above + p.sum(-1, keepdim=True)
    rank = (total - below <= target).sum(-1, keepdim=True)
    spread = (2 * rank).float().sqrt().long() + 1
    low, high = rank + spread, rank - spread
    end = sample.shape[-1]
    while True:
        # No lower than the lowest number: a token at -inf is in no head.
        lower = sample.gather(-1, low.clamp(max=end - 1)).masked_fill(low >= end, -torch.inf)
        lower.clamp_(min=torch.finfo(torch.float32).min)
        upper = sample.gather(-1, high.clamp(min=0)).masked_fill(high < 0, torch.inf)
        torch.gt(logits, upper, out=above)
        count_above = window.count_above + above.sum(-1, keepdim=True)
        gap_above = window.gap_above + torch.mul(above, distance, out=inside).sum(-1, keepdim=True)
        mass_above = window.mass_above + torch.mul(above, p, out=inside).sum(-1, keepdim=True)
        torch.ge(logits, lower, out=inside).sub_(above)
        mass_inside = torch.mul(inside, p, out=above).sum(-1, keepdim=True)
        short = (mass_above + mass_inside <= target) & (low < end)
        over = (mass_above > target) & (high >= 0)
        if not (short | over).any():
            break
        low = torch.where(short, low + 2 * (low - rank), low)
        high = torch.where(over, high - 2 * (rank - high), high)

    widest = int(inside.sum(-1).max())
    if widest > width // 2:
        return None  # mostly one large group of ties
    row, token = inside.bool().nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device).sub_((count.cumsum(0) - count)[row])

    def pack(x: Tensor, padding: float) -> Tensor:
        packed = x.new_full((rows, max(widest, 1)), padding, dtype=torch.float32)
        packed[row, place] = x[row, token].float()
        return packed

    return _Window(
        pack(logits, -torch.inf),
        pack(p, 0.0),
        pack(distance, 0.0),
        count_above=count_above,
        mass_above=mass_above,
        gap_above=gap_above,
    )
