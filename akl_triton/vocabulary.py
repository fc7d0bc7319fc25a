"""A vocabulary that is padded: the logits behind its tokens are nobody's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .divergences import Rule
from .rows import RowResult

if TYPE_CHECKING:
    from .backend import Backend
    from .pairs import BackendOfPairs


class BackendOfVocabulary:
    """`Backend.forward` and `Backend.backward` of the first logits of each row, which are views: no
    copy is made, and the gradient of the others is 0."""

    def __init__(self, backend: Backend | BackendOfPairs, vocab_size: int, of_pairs: bool) -> None:
        self.backend, self.vocab_size, self.of_pairs = backend, vocab_size, of_pairs

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
        self.backend.forward(
            *self._sides(student, teacher),
            valid,
            labels,
            rule,
            result,
            upstream=upstream,
            gradient=None if gradient is None else gradient[..., : self.vocab_size],
            damped=damped,
        )
        if gradient is not None:
            gradient[..., self.vocab_size :] = 0.0

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
        sides = self._sides(student, teacher)
        of_tokens = gradient[..., : self.vocab_size]
        self.backend.backward(upstream, *sides, valid, labels, state, rule, of_tokens)
        gradient[..., self.vocab_size :] = 0.0

    def _sides(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        of_teacher = teacher if self.of_pairs else teacher[..., : self.vocab_size]
        return student[..., : self.vocab_size], of_teacher
