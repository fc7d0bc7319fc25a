"""Batches that have the teacher's pairs in columns: collated, and made a teacher again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..sparse import SparseTeacher

# [B, L, k] twice and [B, L]; the last is optional, as in `SparseTeacher`.
COLUMNS = ("teacher_ids", "teacher_log_probs", "teacher_log_tail")
TEMPERATURE = "teacher_temperature"  # [B], the same for all
_PADDING: dict[str, float] = {
    "labels": -100,
    "attention_mask": 0,
    "teacher_ids": -1,
    "teacher_log_probs": -math.inf,
    "teacher_log_tail": 0.0,  # ln 1: all of the mass is that of the rest
}


@dataclasses.dataclass(frozen=True)
class PairCollator:
    """The data collator of a Trainer whose teacher is pairs: it pads sequences to the longest.

    Rows have ``input_ids`` ``[L]``, ``teacher_ids`` and ``teacher_log_probs`` ``[L, k]``, and
    optionally ``teacher_log_tail`` ``[L]``, ``labels`` and ``attention_mask`` ``[L]`` and
    ``teacher_temperature`` ``[]``, as tensors, arrays or lists. Labels are by default the
    input_ids, all of which then count; positions that pad a sequence have the label -100, no
    attention, and pairs whose ids are -1. Other columns are left out. Log-probabilities that fp16
    holds exactly, as it does those that were stored in it, are fp16 in the batch.

    Args:
        pad_token_id: the token that pads input_ids, which nothing reads.

    Raises:
        TypeError, ValueError: rows lack a column, or have one that others lack; sequences of a
            row differ in length, or rows in k.

    Example:
        >>> from akl_triton.integrations import PairCollator
        >>> row = {
        ...     "input_ids": [5, 7],
        ...     "teacher_ids": [[7, 3], [1, 9]],
        ...     "teacher_log_probs": [[-0.2, -2.0], [-0.1, -3.0]],
        ... }
        >>> longer = {name: values + values[-1:] for name, values in row.items()}
        >>> batch = PairCollator()([row, longer])
        >>> batch["teacher_ids"][0].tolist(), batch["labels"][0].tolist()
        ([[7, 3], [1, 9], [-1, -1]], [5, 7, -100])
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = _columns_of(rows)
        padding = {"input_ids": self.pad_token_id, **_PADDING}
        columns = {name: [_tensor(row, name) for row in rows] for name in names}
        columns.setdefault("labels", columns["input_ids"])
        columns.setdefault("attention_mask", [torch.ones_like(x) for x in columns["input_ids"]])
        lengths = [len(x) for x in columns["input_ids"]]
        batch = {}
        for name, values in columns.items():
            if name == TEMPERATURE:
                batch[name] = torch.stack(values)
                continue
            found = [len(x) for x in values]
            if found != lengths:
                raise ValueError(
                    f"{name}: expected as many positions as input_ids has, {lengths} in the rows "
                    f"of the batch, got {found}"
                )
            if len({x.shape[1:] for x in values}) > 1:
                raise ValueError(
                    f"{name}: expected the same k in all rows of a batch, got "
                    f"{', '.join(str(list(x.shape)) for x in values)}"
                )
            batch[name] = torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=padding[name]
            )
        return batch


def teacher_of(batch: Mapping[str, Tensor], temperature: float = 1.0) -> SparseTeacher:
    """The `SparseTeacher` of a batch that `PairCollator` made.

    Args:
        batch: ``teacher_ids`` and ``teacher_log_probs`` ``[B, L, k]``, and ``teacher_log_tail``
            ``[B, L]`` or none.
        temperature: that of the pairs.

    Raises:
        TypeError, ValueError: as for `SparseTeacher`; a column is missing.

    Example:
        >>> import torch
        >>> from akl_triton.integrations import teacher_of
        >>> ids, p = torch.tensor([[[7, 2]]]), torch.tensor([[[0.6, 0.3]]])
        >>> teacher_of({"teacher_ids": ids, "teacher_log_probs": p.log()}).shape
        torch.Size([1, 1])
    """
    _require(COLUMNS[:2], batch, "batch")
    ids, log_probs = (batch[name] for name in COLUMNS[:2])
    return SparseTeacher(ids, log_probs, batch.get(COLUMNS[2]), temperature=temperature)


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    known = ("input_ids", "labels", "attention_mask", *COLUMNS, TEMPERATURE)
    of_rows = [[name for name in known if name in row] for row in rows]
    for names, row in zip(of_rows, rows, strict=True):
        _require(("input_ids", *COLUMNS[:2]), row, "rows")
        if names != of_rows[0]:
            different = sorted({*names} ^ {*of_rows[0]})
            raise ValueError(
                f"rows: expected the same columns in all rows of a batch, got some with and some "
                f"without {', '.join(different)}"
            )
    return of_rows[0]


def _require(names: Iterable[str], found: Mapping[str, Any], argument: str) -> None:
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{argument}: expected {', '.join(missing)}, got {', '.join(found)}")


def _tensor(row: Mapping[str, Any], name: str) -> Tensor:
    value = row[name]
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected a tensor, an array or lists of numbers, got {checks.type_of(value)}"
        ) from error
    if name in ("input_ids", "labels", "attention_mask"):
        return tensor.long()
    if name == "teacher_log_probs" and tensor.dtype == torch.float32:
        # A dataset in torch's format has made fp32 of them. SparseTeacher allows their sum the
        # rounding of their dtype, which therefore has to be the one that they were rounded to.
        half = tensor.half()
        return half if torch.equal(half.float(), tensor) else tensor
    return tensor
