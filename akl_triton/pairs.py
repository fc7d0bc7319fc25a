"""A teacher that is pairs, made into one that is logits: the k + 1 entries of a row.

The entries are the pairs' tokens and, as one, all others. The student's are made of its logits
(`Backend.pairs`), the divergence of both is that of a vocabulary of k + 1 tokens, and the gradient
of the entries becomes that of the logits (`Backend.pairs_backward`). So every divergence, its head,
and its backward are those of dense teachers, in both backends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .divergences import Rule
from .kernels.layout import OF_STUDENT, STATISTICS
from .rows import LogitMap, PairState, RowResult, damping

if TYPE_CHECKING:
    from .backend import Backend

_COLUMNS = [STATISTICS.index(name) for name in OF_STUDENT]
_COLUMNS_WITHOUT_LABELS = OF_STUDENT.index("cross_entropy")  # those before it


class BackendOfPairs:
    """`Backend.forward` and `Backend.backward` where the teacher is pairs.

    Shape:
        ids [N, k] int32, ascending, layout.ABSENT last; teacher [1, N, k + 1] fp32, ln p of the
        pairs and of the rest, contiguous; the state as in `PairState`.
    """

    def __init__(self, backend: Backend, ids: Tensor) -> None:
        self.backend, self.ids = backend, ids

    def forward(
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
    ) -> None:
        state, with_stats = PairState.of(result.state, self.ids.shape[1]), len(result.stats) > 0
        self.backend.pairs(student, self.ids, teacher[0], valid, labels, rule, state, with_stats)
        with_labels = labels is not None
        if upstream is None or gradient is None:
            loss_of_entries(self.backend, teacher, valid, with_labels, rule, result, state)
            return
        of_label = loss_of_entries(
            self.backend, teacher, valid, with_labels, rule, result, state, upstream, damped
        )
        self.backend.pairs_backward(
            state.log_q, of_label, student, self.ids, valid, labels, state.of_pairs, rule, gradient
        )

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
        parts = PairState.of(state, self.ids.shape[1])
        of_pairs, of_label = gradient_of_entries(
            self.backend, upstream, teacher, valid, labels is not None, rule, parts
        )
        self.backend.pairs_backward(
            of_pairs, of_label, student, self.ids, valid, labels, parts.of_pairs, rule, gradient
        )


def loss_of_entries(
    backend: Backend,
    teacher: Tensor,
    valid: Tensor | None,
    with_labels: bool,
    rule: Rule,
    result: RowResult,
    state: PairState,
    upstream: Tensor | None = None,
    damped: bool = False,
) -> Tensor | None:
    """Fill `result` from the student's entries, its statistics and its cross-entropy.

    With an upstream the entries become their gradient, and that of the cross-entropy [N] is given
    where there are labels."""
    with_stats, entries = len(result.stats) > 0, state.log_q[None]
    backend.forward(
        entries,
        teacher,
        valid,
        None,
        _of_entries(rule),
        RowResult(result.loss, state.of_entries, result.stats),
        upstream=upstream,
        gradient=None if upstream is None else entries,
    )
    if with_labels:
        cross_entropy = state.of_student[:, OF_STUDENT.index("cross_entropy")]
        result.loss.add_(cross_entropy, alpha=rule.label_weight)
    if with_stats:  # the cross-entropy is NaN without labels, as it stands there
        known = len(_COLUMNS) if with_labels else _COLUMNS_WITHOUT_LABELS
        result.stats[:, _COLUMNS[:known]] = state.of_student[:, :known]
    if upstream is None:
        return None
    of_label = upstream * rule.label_weight if with_labels else None
    if damped:
        undamped = damping(result.loss).reciprocal()
        state.log_q.mul_(undamped[:, None])
        of_label = None if of_label is None else of_label * undamped
    return of_label


def gradient_of_entries(
    backend: Backend,
    upstream: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    with_labels: bool,
    rule: Rule,
    state: PairState,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the entries [N, k + 1], and that of the cross-entropy [N] with labels."""
    of_pairs = torch.empty_like(state.log_q)
    backend.backward(
        upstream,
        state.log_q[None],
        teacher,
        valid,
        None,
        state.of_entries,
        _of_entries(rule),
        of_pairs[None],
    )
    return of_pairs, upstream * rule.label_weight if with_labels else None


def _of_entries(rule: Rule) -> Rule:
    """The rule of the divergence of the entries, which are logarithms of probabilities."""
    return rule._replace(
        temperature=1.0,
        student_map=LogitMap(),
        teacher_map=LogitMap(),
        label_weight=0.0,
        rest=True,
        vocab_size=None,
    )
