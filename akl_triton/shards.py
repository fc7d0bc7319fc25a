"""Losses of a vocabulary that is sharded over the ranks of a group.

    1. every rank says of its shard what its own softmax is            -> all-gather
    2. adaptive_kl: where the head ends (shard_head.py)                -> none or some
    3. what needs the softmax of all is summed over each shard         -> all-gather
    4. every rank has the loss, and the gradient of its own columns

With P_r and Q_r the masses of shard r, the chain rule makes the KLs of the shards that of the row,

    KL(p || q) = sum_r P_r (KL_r + kept_r ln(P_r / Q_r))        H(p) = sum_r P_r (H_r - ln P_r)

so that losses whose weights are fixed need no step 3. Sums are made in the order of the ranks from
what all have been sent: every rank has the same bits, and takes the same decisions. What is of [N]
is computed in fp64.

The work is written as a generator that yields its messages and is sent those of all ranks, so that
two chunks can be under way at once, and tests can run all ranks in one process. How messages
travel is in exchange.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .backend import ShardSweeps, shard_sweeps_of
from .divergences import AdaptiveKL, Rule, SumOfTerms
from .exchange import run
from .kernels.layout import SHARD_STATISTICS
from .rows import RowResult, damping
from .shard_head import find_boundary
from .shard_rows import Label, loss_of, parts_of, sent, stats_of

Steps: TypeAlias = Generator[Tensor, Tensor, None]


class Shards(NamedTuple):
    """Which columns of the vocabulary each rank has."""

    rank: int
    of_student: tuple[int, ...]  # their number on each rank
    of_teacher: tuple[int, ...]

    @classmethod
    def of(cls, widths: Tensor, rank: int, vocab_size: int | None) -> Shards:
        """From the widths [R, 2] of both sides, of which no more than vocab_size are tokens."""
        sides = []
        for side in widths.T.tolist():
            starts = itertools.accumulate(side, initial=0)
            real = (max(vocab_size - start, 0) if vocab_size else width
                    for start, width in zip(starts, side, strict=False))  # fmt: skip
            sides.append(tuple(map(min, side, real)))
        return cls(rank, *sides)

    def owner(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The rank that has each token of the student, and the token's place there."""
        ends = torch.tensor(
            list(itertools.accumulate(self.of_student)), device=tokens.device, dtype=torch.int64
        )
        rank = torch.searchsorted(ends, tokens, right=True).clamp(max=len(ends) - 1)
        starts = torch.nn.functional.pad(ends[:-1], (1, 0))
        return rank, tokens - starts[rank]

    def local(self, labels: Tensor) -> Tensor:
        """The labels in this shard, -1 where they are in none or in another."""
        labels = labels.long()
        rank, place = self.owner(labels)
        here = (rank == self.rank) & (labels >= 0) & (place < self.of_student[self.rank])
        return place.where(here, -1)


class OfSteps:
    """`Backend.forward` of one whose work is a generator, `steps`, of the same arguments."""

    group: str
    steps: Callable[..., Steps]

    def forward(self, *inputs: Any, **options: Any) -> None:
        run(self.steps(*inputs, **options), self.group)


class BackendOfShards(OfSteps):
    """`Backend.forward` and `Backend.backward` of this rank's columns, in the group of that name.

    All its ranks have to make the same calls."""

    def __init__(self, name: str, shards: Shards, group: str) -> None:
        self.sweeps: ShardSweeps = shard_sweeps_of(name)
        self.shards, self.group = shards, group

    def steps(
        self,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        result: RowResult,
        *,
        upstream: Tensor | None = None,
        gradient: Tensor | None = None,
        damped: bool = False,
    ) -> Steps:
        """`forward`, as a generator that yields this rank's messages and is sent those of all."""
        student, teacher = self._tokens(student, teacher)
        divergence, with_stats = rule.divergence, len(result.stats) > 0
        own = None if labels is None else self.shards.local(labels)
        message, blocks = self.sweeps.statistics(student, teacher, valid, own, rule, with_stats)
        names = sent(rule, labels is not None, with_stats)
        columns = [SHARD_STATISTICS.index(name) for name in names]
        columns += range(len(SHARD_STATISTICS), message.shape[1])  # of a head
        everyone = yield message[:, columns]
        of_head = everyone[..., len(names) :]
        of = dict(zip(names, everyone[..., : len(names)].double().unbind(-1), strict=True))
        label = None
        if labels is not None:
            label = Label.of(of, *self.shards.owner(labels.long()), self.shards, rule)
        parts = parts_of(of, label, rule)
        boundary = of_rank = sums = None
        if isinstance(divergence, AdaptiveKL):
            boundary = yield from find_boundary(
                of_head,
                parts.of["top_t"],
                parts.log2_t,
                parts.lse_t,
                rule,
                teacher.dtype,
                lambda rows, asked: self.sweeps.masses(teacher, rows, asked, rule),
            )
            of_rank = boundary.of_rank(self.shards.rank, divergence.ties)
        if with_stats or isinstance(divergence, (AdaptiveKL, SumOfTerms)):
            softmaxes = parts.softmaxes()
            sums = yield self.sweeps.sums(
                student, teacher, valid, rule, softmaxes, of_rank, blocks, with_stats
            )
        loss, slope = loss_of(parts, label, sums, rule)
        # No row has a base here: see blocks.py of the kernels.
        state = torch.cat((slope.of_softmaxes, blocks.clamp(min=1.0), slope.coefficients), 1)
        if valid is not None:
            loss, state = loss.where(valid, 0.0), state.where(valid[:, None], 0.0)
        result.loss.copy_(loss)
        if with_stats:
            stats = stats_of(parts, label, sums, boundary, rule)
            result.stats.copy_(stats if valid is None else stats.where(valid[:, None], 0.0))
        if gradient is None or upstream is None:
            result.state.copy_(state)
            return
        if damped:
            upstream = upstream / damping(result.loss)
        self._write(upstream, student, teacher, valid, own, state, rule, gradient)

    def backward(
        self,
        upstream: Tensor,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        state: Tensor,
        rule: Rule,
        gradient: Tensor,
    ) -> None:
        """Nothing is sent."""
        student, teacher = self._tokens(student, teacher)
        own = None if labels is None else self.shards.local(labels)
        self._write(upstream, student, teacher, valid, own, state, rule, gradient)

    def _tokens(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides without the columns that are no tokens."""
        rank = self.shards.rank
        of_student, of_teacher = self.shards.of_student[rank], self.shards.of_teacher[rank]
        return student[..., :of_student], teacher[..., :of_teacher]

    def _write(
        self,
        upstream: Tensor,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        own: Tensor | None,
        state: Tensor,
        rule: Rule,
        gradient: Tensor,
    ) -> None:
        tokens = student.shape[-1]
        if tokens:
            self.sweeps.gradient(
                upstream, student, teacher, valid, own, state, rule, gradient[..., :tokens]
            )
        gradient[..., tokens:] = 0.0
