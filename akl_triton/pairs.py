"""A teacher that is pairs, made into one that is logits: the k + 1 entries of a row.

The entries are the pairs' tokens and, as one, all others. The student's are made of its logits
(`Backend.pairs`), the divergence of both is that of a vocabulary of k + 1 tokens, and the gradient
of the entries becomes that of the logits (`Backend.pairs_backward`). So every divergence, its head,
and its backward are those of dense teachers, in both backends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        state = PairState.of(result.state, self.ids.shape[1])
        with_stats = len(result.stats) > 0
        self.backend.pairs(student, self.ids, teacher[0], valid, labels, rule, state, with_stats)
        entries = state.log_q[None]
        self.backend.forward(
            entries,
            teacher,
            valid,
            None,
            _of_entries(rule),
            RowResult(result.loss, state.of_entries, result.stats),
            upstream=upstream,
            gradient=None if gradient is None else entries,
        )
        if labels is not None:
            cross_entropy = state.of_student[:, OF_STUDENT.index("cross_entropy")]
            result.loss.add_(cross_entropy, alpha=rule.label_weight)
        if with_stats:  # the cross-entropy is NaN without labels, as it stands there
            known = len(_COLUMNS) if labels is not None else _COLUMNS_WITHOUT_LABELS
            result.stats[:, _COLUMNS[:known]] = state.of_student[:, :known]
        if upstream is None or gradient is None:
            return
        of_label = None if labels is None else upstream * rule.label_weight
        if damped:
            undamped = damping(result.loss).reciprocal()
            state.log_q.mul_(undamped[:, None])
            of_label = None if of_label is None else of_label * undamped
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
        of_pairs = parts.log_q.new_empty(parts.log_q.shape)
        self.backend.backward(
            upstream,
            parts.log_q[None],
            teacher,
            valid,
            None,
            parts.of_entries,
            _of_entries(rule),
            of_pairs[None],
        )
        of_label = None if labels is None else upstream * rule.label_weight
        self.backend.pairs_backward(
            of_pairs, of_label, student, self.ids, valid, labels, parts.of_pairs, rule, gradient
        )


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
