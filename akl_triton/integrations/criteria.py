"""The losses as two recipes call them, which find a loss by its name in a configuration.

    torchtune        kd_loss(chunks of the student's logits, those of the teacher's, labels)
    NeMo AutoModel   kd_loss_fn(student_logits, teacher_logits, labels, num_batch_labels=...)

In both, the labels have been shifted. A configuration holds text and numbers, so that a divergence
is given by its name, and its fields are options. Neither framework is imported here. Other calls
need no adapter: docs/frameworks.md says which framework takes what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_integer, type_of
from ..divergences import check_names, divergence
from ..modules import DistillationLoss, _DivergenceLoss
from ..options import LOSS_OPTIONS

# The recipes have shifted the labels, take one number, and read the logits again.
_OPTIONS = {
    name: option
    for name, option in LOSS_OPTIONS.items()
    if option.check is not None and name not in ("shift", "reduction", "inplace")
}


class _Criterion(DistillationLoss):
    """A mean over tokens, of a divergence that is given by its name and its fields."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        kind = type(divergence(name))
        check_names(type(self).__name__, options, (*kind._checks, *_OPTIONS))
        _DivergenceLoss.__init__(self, kind, _OPTIONS, {"return_stats": False, **options})


class TorchtuneLoss(_Criterion):
    """The `kd_loss` of torchtune's recipes for knowledge distillation, with chunks of logits.

    Their models return chunks where the `loss` of the configuration is CEWithChunkedOutputLoss, as
    it is by default. With any other, the logits are whole: `AdaptiveKLLoss` and `DistillationLoss`
    are what to name then.

    Math:
        the mean over the tokens of all chunks whose label is not ``ignore_index``.

    Args:
        divergence: its name, such as "adaptive_kl".
        num_output_chunks: as that of the `loss`.
        options: the fields of the divergence, and options of `distillation_loss` but for ``shift``,
            ``reduction`` and ``inplace``: the recipe has shifted the labels, takes the mean, and
            reads the logits again for its `loss`.

    Shape:
        lists of ``[B, L_i, V]`` for student and teacher, and labels ``[B, L]`` that were shifted, L
        the sum of all L_i; a scalar.

    Raises:
        TypeError, ValueError: as `distillation_loss`; the logits are not as many chunks as labels
            are cut into.

    Example:
        >>> import torch
        >>> from akl_triton.integrations.criteria import TorchtuneLoss
        >>> loss_function = TorchtuneLoss("adaptive_kl", num_output_chunks=2, mu=0.8)
        >>> student, teacher = torch.randn(2, 1, 6, 8)
        >>> labels = torch.zeros(1, 6, dtype=torch.long)
        >>> loss_function(student.chunk(2, dim=1), teacher.chunk(2, dim=1), labels).shape
        torch.Size([])
    """

    def __init__(
        self, divergence: str = "adaptive_kl", *, num_output_chunks: int = 8, **options: Any
    ) -> None:
        super().__init__(divergence, options)
        self.num_output_chunks = check_integer("num_output_chunks", num_output_chunks)
        if self.num_output_chunks < 1:
            raise ValueError(f"num_output_chunks: expected an int >= 1, got {num_output_chunks}")
        self.ignore_index: int = self.options.get("ignore_index", -100)

    def forward(  # type: ignore[override]
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        labels: Tensor,
    ) -> Tensor:
        """The loss of all chunks."""
        targets = labels.chunk(self.num_output_chunks, dim=1)
        sides = (("student_logits", student_logits), ("teacher_logits", teacher_logits))
        for name, chunks in sides:
            if isinstance(chunks, Tensor) or len(chunks) != len(targets):
                got = type_of(chunks) if isinstance(chunks, Tensor) else f"{len(chunks)} chunks"
                raise ValueError(
                    f"{name}: expected {len(targets)} chunks, as CEWithChunkedOutputLoss with "
                    f"num_output_chunks={self.num_output_chunks} makes the models return, got "
                    f"{got}; for whole logits name AdaptiveKLLoss or DistillationLoss"
                )
        count = (labels != self.ignore_index).sum()
        total = labels.new_zeros((), dtype=torch.float32)
        for chunks in zip(student_logits, teacher_logits, targets, strict=True):
            loss = super().forward(*chunks, num_items=count)
            assert isinstance(loss, Tensor)
            total = total + loss
        return total


class AutoModelLoss(_Criterion):
    """The `kd_loss_fn` of NeMo AutoModel's recipes for knowledge distillation.

    Args:
        divergence: its name, such as "adaptive_kl".
        options: as those of `TorchtuneLoss`. AutoModel's own loss is `AutoModelLoss("forward_kl",
            scale_by_t2=True)`.

    Shape:
        logits ``[..., V]`` and labels ``[...]`` that were shifted; a scalar.

    Raises:
        TypeError, ValueError: as `distillation_loss`, which takes logits that are DTensors, too.

    Example:
        >>> import torch
        >>> from akl_triton.integrations.criteria import AutoModelLoss
        >>> loss_function = AutoModelLoss("skew_kl", alpha=0.1, temperature=2.0, scale_by_t2=True)
        >>> student, teacher = torch.randn(2, 1, 6, 8)
        >>> labels = torch.zeros(1, 6, dtype=torch.long)
        >>> loss_function(student, teacher, labels, num_batch_labels=12).shape
        torch.Size([])
    """

    def __init__(self, divergence: str = "adaptive_kl", **options: Any) -> None:
        super().__init__(divergence, options)
        # The recipe reads both: it gives ignored tokens the one, and logs the other.
        self.ignore_index: int = self.options.get("ignore_index", -100)
        self.temperature: float = self.options.get("temperature", 1.0)

    def forward(  # type: ignore[override]
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        """The loss of a micro-batch, whose sum is divided by the labels of the whole step."""
        loss = super().forward(student_logits, teacher_logits, labels, num_items=num_batch_labels)
        assert isinstance(loss, Tensor)
        return loss
