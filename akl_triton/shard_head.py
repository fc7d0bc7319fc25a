"""The boundary of the head where no rank has all of a row.

Every rank names its heaviest tokens, and the key from which on it has named all (layout). Above the
highest of these keys all tokens of the row are known: if the crossing is among them, nothing more
is asked. Of the other rows every rank sums its mass at or above SHARD_PIVOTS keys, in rounds, until
the bracket of the crossing is two neighbouring keys: as in head.py of the kernels, with more pivots
at a time, as a round costs an exchange and not only a sweep.

Ties belong to the head in the order of the vocabulary, that is of (rank, index in the shard).
Everything here is computed from what all ranks were sent, so that all decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import AdaptiveKL, Rule
from .kernels.layout import (
    SHARD_BINS,
    SHARD_CANDIDATES,
    SHARD_PIVOTS,
    SHARD_STRIDE,
)
from .shard_keys import key_of, lowest_key, value_of
from .shard_maps import in_bits, scale_of

# As in head.py of the kernels.
LARGEST_MU = 1.0 - 2.0**-20
DEPTH = 64.0
CURVATURE_ERROR = 0.0012
# The distances of pivots from where the crossing is expected, in units of the expected error: so
# close within it that two keys of 16 bits are soon left, and one for when it was more.
_DISTANCES = (0.06, 0.18, 0.31, 0.45, 0.6, 0.78, 1.0, 2.5)
assert 2 * len(_DISTANCES) == SHARD_PIVOTS
# The error of an estimate, in bits: that of a line through a bin, and that of so many tokens.
_LINE, _TOKEN = 0.1, 2.0
_WIDEST_ERROR = 1.0
_DEEPEST = 40.0  # bits below the top, where no mass is left
# Rounds after which the bracket is cut into equal parts, whatever was expected.
_GUESSES = 3


class Boundary(NamedTuple):
    """Where the heads of N rows end; fp64."""

    crossing: Tensor  # [N] the logit
    taken: Tensor  # [N] of the logits equal to it
    ties: Tensor  # [R, N] how many each rank has of these
    mass: Tensor  # [N] of the head

    def of_rank(self, rank: int, ties: str) -> Tensor:
        """[N, 3] fp32 for `ShardSweeps.sums`: crossing, taken and ties of this shard."""
        own = self.ties[rank]
        if ties == "average":
            taken = self.taken * own / self.ties.sum(0).clamp(min=1.0)
        else:
            before = self.ties[:rank].sum(0)
            taken = (self.taken - before).clamp(min=0.0).minimum(own)
        return torch.stack((self.crossing, taken, own), 1).float()


class _Named(NamedTuple):
    """What the ranks have said of the teacher."""

    complete: Tensor  # [N] int64, the key from which on all tokens are candidates
    candidates: Tensor  # [N, R, SHARD_CANDIDATES] logits, fp64
    profile: Tensor  # [N, R, SHARD_BINS] probability above the shard's top less so many strides
    tops: Tensor  # [N, R] logits, fp64


def find_boundary(
    of_head: Tensor,
    tops: Tensor,
    log2_z: Tensor,
    lse: Tensor,
    rule: Rule,
    dtype: torch.dtype,
    masses: Callable[[Tensor, Tensor], Tensor],
) -> Generator[Tensor, Tensor, Boundary]:
    """The boundary of N rows, from what R ranks have sent.

    Shape:
        of_head [R, N, layout.SHARD_HEAD_WIDTH] fp32; tops [R, N], the largest logits; log2_z
        [R, N], the softmax denominators in bits; lse [N], that of all. masses(rows [M], asked) is
        that of `ShardSweeps`. `dtype` is that of the teacher's logits.
    """
    divergence = rule.divergence
    assert isinstance(divergence, AdaptiveKL)
    inclusive = divergence.head == "inclusive"
    target = min(divergence.mu, LARGEST_MU)
    named = _named(of_head, tops, log2_z - lse)

    def mass(x: Tensor, lse: Tensor) -> Tensor:
        return (in_bits(x, rule.teacher_map, rule.temperature) - lse).exp2()

    # The known tokens of all ranks, in order.
    known = key_of(named.candidates.float(), dtype) >= named.complete[:, None, None]
    known &= named.candidates > -torch.inf
    of_known = torch.where(known, mass(named.candidates, lse[:, None, None]), 0.0)
    ranked = named.candidates.masked_fill(~known, -torch.inf).flatten(1)
    ranked = ranked.sort(-1, descending=True).values
    heavy = torch.where(ranked > -torch.inf, mass(ranked, lse[:, None]), 0.0)
    found = _crosses(heavy.cumsum(-1), target, inclusive) & (ranked > -torch.inf)
    resolved = found.any(-1)
    crossing = ranked.gather(-1, found.int().argmax(-1, keepdim=True))[:, 0]
    # A token with more than half of the mass has no equal.
    top = named.tops.amax(-1)
    of_top = mass(top, lse)
    alone = (of_top > 0.5) & _crosses(of_top, target, inclusive)
    broken = lse.isnan()
    crossing = torch.where(alone | broken, top, crossing)

    at = crossing[:, None, None]
    above = torch.where(known & (named.candidates > at), of_known, 0.0).sum((1, 2))
    above = above.masked_fill(alone, 0.0)
    ties = ((named.candidates == at) & (known | alone[:, None, None])).sum(-1).double()

    rows = (~(resolved | alone | broken)).nonzero()[:, 0]
    if len(rows):
        search = _Search(named, of_known.sum(-1), log2_z.T - lse[:, None], lse, rule, dtype, rows)
        while search.is_open():
            asked, factor = search.ask()
            everyone = yield masses(rows, asked)[:, : search.width].contiguous()
            search.narrow(everyone, factor, target, inclusive)
        crossing[rows] = search.crossing()
        above[rows] = search.mass_high.sum(-1)
        each = mass(crossing[rows], lse[rows])[:, None]
        ties[rows] = ((search.mass_low - search.mass_high) / each + 0.5).floor()

    of_one = mass(crossing, lse)
    total = ties.sum(-1)
    fitting = (target - above) / of_one
    if inclusive:
        taken = fitting.ceil().clamp(min=1.0).minimum(total)
    else:
        taken = fitting.floor().maximum((above == 0.0).double()).minimum(total)
    return Boundary(crossing, taken, ties.T, above + taken * of_one)


def _named(of_head: Tensor, tops: Tensor, log2_share: Tensor) -> _Named:
    complete = of_head[..., 0].contiguous().view(torch.int32).long().amax(0)
    candidates = of_head[..., 1 : 1 + SHARD_CANDIDATES].double().transpose(0, 1)
    share = log2_share.exp2().T[..., None]
    profile = torch.where(share > 0.0, of_head[..., -SHARD_BINS:].double().transpose(0, 1), 0.0)
    return _Named(complete, candidates, profile * share, tops.T)


def _crosses(mass: Tensor, target: float, inclusive: bool) -> Tensor:
    """Whether a prefix of this mass goes beyond mu."""
    return mass >= target if inclusive else mass > target


class _Search:
    """The brackets of M rows: the mass at or above `low` crosses, that at or above `high` does
    not."""

    def __init__(
        self,
        named: _Named,
        above: Tensor,
        log2_share: Tensor,
        lse: Tensor,
        rule: Rule,
        dtype: torch.dtype,
        rows: Tensor,
    ) -> None:
        self.rule, self.dtype, self.lse = rule, dtype, lse[rows]
        # fp32 logits are so many that the nearest ones are asked for as well.
        self.width = SHARD_PIVOTS + (2 if dtype == torch.float32 else 0)
        self.named = _Named(*(x[rows] for x in named))
        top, lowest = self.named.tops.amax(-1), lowest_key(dtype)
        self.high = self.named.complete.clone()
        self.low = torch.full_like(self.high, lowest)
        self.steepness = scale_of(rule.teacher_map, rule.temperature)
        if rule.teacher_map.softcap is None:  # a softcap lifts all that is below
            deep = key_of((top - DEPTH / self.steepness).float(), dtype) - 1
            self.low = self.low.maximum(deep)
        else:
            self.steepness *= rule.teacher_map.scale / rule.teacher_map.softcap
        self.low = self.low.minimum(self.high - 1)
        self.mass_high, self.mass_low = above[rows], log2_share[rows].exp2()  # [M, R]
        self.expected = torch.full_like(top, torch.nan)
        self.reach = torch.zeros_like(top)
        self.crossed = torch.zeros_like(top, dtype=torch.bool)
        self.fell_short = torch.zeros_like(self.crossed)
        self.equal_parts = torch.zeros_like(self.crossed)
        self.rounds = 0

    def is_open(self) -> bool:
        return bool(((self.high - self.low) > 1).any())

    def crossing(self) -> Tensor:
        return value_of(self.low, self.dtype).double()

    def ask(self) -> tuple[Tensor, Tensor]:
        """What `ShardSweeps.masses` is asked, and the factor of its masses [M]."""
        low, high = (value_of(key, self.dtype).double() for key in (self.low, self.high))
        self.keys = self._pivots(low, high)
        reference = self.lse.float()
        values = value_of(self.keys, self.dtype)
        asked = torch.cat((values, torch.stack((reference, low.float(), high.float()), 1)), 1)
        return asked, (reference.double() - self.lse).exp2()

    def _pivots(self, low: Tensor, high: Tensor) -> Tensor:
        """[M, SHARD_PIVOTS] keys inside of the bracket, ascending."""
        span = self.high - self.low
        x, distance = self._expectation(low, high)
        centre = key_of(x.float(), self.dtype)
        keys = []
        for i, share in enumerate(_DISTANCES):
            away = distance * share
            keys.append(key_of((x - away).float(), self.dtype).minimum(centre - i))
            keys.append(key_of((x + away).float(), self.dtype).maximum(centre + 1 + i))
        guesses = torch.stack(keys, 1).sort(-1).values
        steps = torch.arange(1, SHARD_PIVOTS + 1, device=span.device)
        parts = self.low[:, None] + torch.div(
            span[:, None] * steps, SHARD_PIVOTS + 1, rounding_mode="floor"
        )
        small = span <= SHARD_PIVOTS + 1
        parts = torch.where(small[:, None], self.low[:, None] + steps, parts)
        keys_of_rows = torch.where((self.equal_parts | small)[:, None], parts, guesses)
        return keys_of_rows.maximum(self.low[:, None] + 1).minimum(self.high[:, None] - 1)

    def _expectation(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Where the crossing is expected, and how far off that may be."""
        target = min(self.rule.divergence.mu, LARGEST_MU)  # type: ignore[attr-defined]
        if self.rounds == 0:
            self.expected, self.reach = self._estimate(target)
        mass_low, mass_high = self.mass_low.sum(-1), self.mass_high.sum(-1)
        share = (mass_low - target) / (mass_low - mass_high)
        x = low + (high - low) * share
        of_one = in_bits(x, self.rule.teacher_map, self.rule.temperature) - self.lse
        tokens = (mass_low - mass_high) / of_one.exp2()
        noise = ((share * (1.0 - share)).clamp(min=0.02) / tokens.clamp(min=1.0)).sqrt()
        distance = (high - low) * (CURVATURE_ERROR + 0.45 * noise)
        estimated = self.reach > 0.0
        return (
            torch.where(estimated, self.expected, x),
            torch.where(estimated, self.reach, distance),
        )

    def _estimate(self, target: float) -> tuple[Tensor, Tensor]:
        """The logit where the profiles of all ranks reach the target, and how far off that may
        be."""
        named = self.named
        edges = torch.cat((torch.zeros_like(named.tops)[..., None], named.profile), -1)
        # Each is exponential between its points, the last of which has all that the rank has.
        edges = torch.cat((edges, self.mass_low.maximum(edges[..., -1])[..., None]), -1)
        points = torch.arange(SHARD_BINS + 2, dtype=torch.float64, device=edges.device)
        points *= SHARD_STRIDE
        points[-1] = _DEEPEST

        def mass(x: Tensor) -> Tensor:
            depth = (named.tops - x[:, None]) * self.steepness
            depth = depth.nan_to_num(0.0).clamp(0.0, _DEEPEST)
            i = (depth / SHARD_STRIDE).floor().clamp(max=SHARD_BINS).long()
            share = (depth - points[i]) / (points[i + 1] - points[i])
            first, second = (edges.gather(-1, (i + n)[..., None])[..., 0] for n in (0, 1))
            ratio = (second / first.clamp(min=1e-30)).clamp(min=1e-30)
            return torch.where(first > 0.0, first * ratio**share, second * share).sum(-1)

        high = named.tops.amax(-1)
        low = high - _DEEPEST / self.steepness
        for _ in range(30):
            x = 0.5 * (low + high)
            over = mass(x) > target
            low, high = torch.where(over, x, low), torch.where(over, high, x)
        bit = 1.0 / self.steepness
        of_one = (in_bits(low, self.rule.teacher_map, self.rule.temperature) - self.lse).exp2()
        tokens = (mass(low - 0.5 * bit) - mass(low + 0.5 * bit)) / of_one
        error = (_LINE + _TOKEN / tokens.clamp(min=1.0).sqrt()).clamp(max=_WIDEST_ERROR)
        return low, error * bit

    def narrow(self, everyone: Tensor, factor: Tensor, target: float, inclusive: bool) -> None:
        """Take in the masses of all ranks [R, M, width]."""
        span = self.high - self.low
        self.rounds += 1
        if self.dtype == torch.float32:
            # No logit lies between the bracket's ends and these: moving the ends keeps both masses.
            below, above = everyone[..., -2].amax(0), everyone[..., -1].amin(0)
            self.high = self.high.minimum(key_of(below, self.dtype) + 1)
            self.low = self.low.maximum(key_of(above, self.dtype))
        masses = everyone[..., :SHARD_PIVOTS].double().permute(1, 2, 0) * factor[:, None, None]
        crossed = _crosses(masses.sum(-1), target, inclusive)  # [M, SHARD_PIVOTS]
        for i in range(SHARD_PIVOTS):
            key, mass = self.keys[:, i], masses[:, i]
            up = crossed[:, i] & (key >= self.low)
            self.low = torch.where(up, key, self.low)
            self.mass_low = torch.where(up[:, None], mass, self.mass_low)
            down = ~crossed[:, i] & (key <= self.high)
            self.high = torch.where(down, key, self.high)
            self.mass_high = torch.where(down[:, None], mass, self.mass_high)
        self.crossed |= crossed.any(-1)
        self.fell_short |= (~crossed).any(-1)
        far_off = (self.reach > 0.0) & ~(self.crossed & self.fell_short)
        if self.rounds >= _GUESSES:
            far_off = torch.zeros_like(far_off)
        self.reach = torch.where(far_off, 4.0 * self.reach, 0.0)
        low, high = (value_of(key, self.dtype).double() for key in (self.low, self.high))
        self.expected = torch.where(self.crossed, low + self.reach, high - self.reach)
        slow = SHARD_PIVOTS // 4 * (self.high - self.low) > span
        self.equal_parts = ~far_off & (slow | (self.rounds >= _GUESSES))
