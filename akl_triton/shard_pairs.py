"""Losses of teachers that are pairs, where the student's vocabulary is sharded over a group.

    1. every rank says what its own softmax is of its pairs and other tokens    -> all-gather
    2. every rank has all entries, and the loss of them: see pairs.py
    3. every rank has the gradient of its own columns

With Q_r the student's mass of shard r, and q and H those of the shard's own softmax,

    ln q_i = ln q_i of its shard + ln Q_r        q_rest = sum_r Z_rest / sum_r Z
    H(q) = sum_r Q_r (H_r - ln Q_r)              cross-entropy = that of its shard - ln Q_r, T = 1

What is of [N] is computed in fp64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, ShardSweeps, backend_of, shard_sweeps_of
from .divergences import Rule
from .kernels.layout import ABSENT, LARGEST_LOGIT, LARGEST_REFERENCE, OF_STUDENT_WIDTH
from .pairs import gradient_of_entries, loss_of_entries
from .rows import PairState, RowResult
from .shards import OfSteps, Shards, Steps

LN2 = math.log(2.0)
_MASSES = 3  # of `ShardSweeps.pair_masses`; each is sent as two numbers


class BackendOfShardedPairs(OfSteps):
    """`Backend.forward` and `Backend.backward` of this rank's columns, for ids and teacher as
    `BackendOfPairs` has them, of the whole vocabulary. All ranks have to make the same calls."""

    def __init__(self, name: str, shards: Shards, group: str, ids: Tensor) -> None:
        self.backend: Backend = backend_of(name)
        self.sweeps: ShardSweeps = shard_sweeps_of(name)
        self.shards, self.group, self.ids = shards, group, ids

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
        """`forward`, as a generator that yields this rank's message and is sent those of all."""
        state, with_stats = PairState.of(result.state, self.ids.shape[1]), len(result.stats) > 0
        own = _OwnPairs.of(self.ids, self.shards)
        everyone = yield self._message(
            student, own, teacher[0], valid, labels, rule, state, with_stats
        )
        whole = _Whole.of(everyone, self.ids, labels, self.shards)
        self.sweeps.set_pair_masses(state, whole.masses, rule)
        state.log_q.copy_(whole.log_q)
        state.of_student.copy_(whole.of_student)
        if valid is not None:
            for rows in (state.of_pairs, state.log_q, state.of_student):
                rows.masked_fill_(~valid[:, None], 0.0)
        with_labels = labels is not None
        if upstream is None or gradient is None:
            loss_of_entries(self.backend, teacher, valid, with_labels, rule, result, state)
            return
        of_label = loss_of_entries(
            self.backend, teacher, valid, with_labels, rule, result, state, upstream, damped
        )
        self._write(state.log_q, of_label, student, own, valid, labels, state, rule, gradient)

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
        parts = PairState.of(state, self.ids.shape[1])
        of_pairs, of_label = gradient_of_entries(
            self.backend, upstream, teacher, valid, labels is not None, rule, parts
        )
        own = _OwnPairs.of(self.ids, self.shards)
        self._write(of_pairs, of_label, student, own, valid, labels, parts, rule, gradient)

    def _message(
        self,
        student: Tensor,
        own: _OwnPairs,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        state: PairState,
        with_stats: bool,
    ) -> Tensor:
        """[N, k + 10] fp32 of this shard: ln q of the pairs, the masses, layout.OF_STUDENT and the
        largest logit."""
        tokens = self.shards.of_student[self.shards.rank]
        if tokens:
            # If another shard has the label, no one asks this one for its cross-entropy.
            some = None if labels is None else self.shards.local(labels).clamp(min=0)
            entries = teacher.gather(1, own.order)
            self.backend.pairs(
                student[..., :tokens], own.ids, entries, valid, some, rule, state, with_stats
            )
        else:
            for rows in (state.of_pairs, state.log_q, state.of_student):
                rows.zero_()
            state.of_student[:, LARGEST_LOGIT] = -torch.inf
        masses = self.sweeps.pair_masses(state, rule)
        high = masses.float()
        low = (masses - high).where(high.isfinite(), 0.0).float()
        log_q = state.log_q.gather(1, own.inverse)[:, :-1]
        return torch.cat((log_q, high, low, state.of_student), 1)

    def _write(
        self,
        of_pairs: Tensor,
        of_label: Tensor | None,
        student: Tensor,
        own: _OwnPairs,
        valid: Tensor | None,
        labels: Tensor | None,
        state: PairState,
        rule: Rule,
        gradient: Tensor,
    ) -> None:
        tokens = self.shards.of_student[self.shards.rank]
        if tokens:
            self.backend.pairs_backward(
                of_pairs.gather(1, own.order),
                of_label,
                student[..., :tokens],
                own.ids,
                valid,
                None if labels is None else self.shards.local(labels),
                state.of_pairs,
                rule,
                gradient[..., :tokens],
            )
        gradient[..., tokens:] = 0.0


class _OwnPairs(NamedTuple):
    """The pairs of N rows as one shard has them: its own are a run of them, and come first."""

    ids: Tensor  # [N, k] int32 places in the shard, ABSENT behind them
    order: Tensor  # [N, k + 1] int64: where each entry stands among those of all pairs
    inverse: Tensor  # [N, k + 1] int64: where those stand here

    @classmethod
    def of(cls, ids: Tensor, shards: Shards) -> _OwnPairs:
        k, start = ids.shape[1], sum(shards.of_student[: shards.rank])
        before = (ids < start).sum(1, keepdim=True)
        pair = torch.arange(k, device=ids.device)
        # The rest stays the last of the entries.
        order, inverse = (
            torch.nn.functional.pad(x % k, (0, 1), value=k) for x in (pair + before, pair - before)
        )
        place = ids.gather(1, order[:, :-1]) - start
        here = (place >= 0) & (place < shards.of_student[shards.rank])
        return cls(place.where(here, ABSENT), order, inverse)


class _Whole(NamedTuple):
    """The student of N rows over all shards."""

    log_q: Tensor  # [N, k + 1] fp64, ln q of the pairs and of the rest
    masses: Tensor  # [N, 3] fp64, those of `ShardSweeps.pair_masses`
    of_student: Tensor  # [N, 4] fp64, layout.OF_STUDENT and the largest logit

    @classmethod
    def of(cls, everyone: Tensor, ids: Tensor, labels: Tensor | None, shards: Shards) -> _Whole:
        """From what all ranks have sent [R, N, k + 10]; a row that is broken is NaN throughout."""
        k, vocabulary = ids.shape[1], sum(shards.of_student)
        log_q, high, low, of_student = torch.split(
            everyone, [k, _MASSES, _MASSES, OF_STUDENT_WIDTH], dim=-1
        )
        parts = high.double() + low.double()
        whole = (parts * LN2).logsumexp(0) / LN2
        named = ids != ABSENT
        broken = (named & (ids >= vocabulary)).any(1)
        broken |= ((ids[:, 1:] == ids[:, :-1]) & named[:, 1:]).any(1)
        # As of logits: see shards.py of the kernels.
        broken |= ~(whole[:, 0].abs() <= LARGEST_REFERENCE)
        whole = whole.masked_fill(broken[:, None], torch.nan)
        lse, lse_rest, lse_1 = whole.unbind(1)
        nothing = 0.0 * lse
        shares, _, shares_1 = (LN2 * (parts - whole)).unbind(-1)  # ln Q_r, [R, N]

        owner, _ = shards.owner(ids.long())
        of_owner = shares.T.gather(1, owner)
        log_q = log_q.gather(0, owner[None])[0] + of_owner
        log_q = log_q.masked_fill(~named | (of_owner == -torch.inf), -torch.inf)
        log_rest = LN2 * (lse_rest - lse)
        log_q = torch.cat((log_q, log_rest[:, None]), 1) + nothing[:, None]

        entropies, agreements, cross_entropies, largest = of_student.double().unbind(-1)
        entropy = torch.where(shares > -torch.inf, shares.exp() * (entropies - shares), 0.0).sum(0)
        top = largest.amax(0)
        agreement = ((agreements == 1.0) & (largest == top)).any(0).double()
        cross_entropy = nothing
        if labels is not None:
            labels = labels.long()
            owner, _ = shards.owner(labels)
            of_label = shares_1.gather(0, owner[None])[0]
            cross_entropy = cross_entropies.gather(0, owner[None])[0] - of_label
            cross_entropy = cross_entropy.masked_fill(of_label == -torch.inf, torch.inf)
            known = (labels >= 0) & (labels < vocabulary) & (lse_1.abs() <= LARGEST_REFERENCE)
            cross_entropy = cross_entropy.where(known, torch.nan) + nothing
            whole[:, 2].masked_fill_(~known, torch.nan)  # and with it all of the gradient
        columns = entropy + nothing, agreement + nothing, cross_entropy, top
        return cls(log_q, whole, torch.stack(columns, 1))
