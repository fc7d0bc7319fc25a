"""The lm_heads of both sides, of the same tokens of the vocabulary.

Tensor parallelism cuts the rows of a weight over the ranks of a group, in equal parts of which the
last ones may be shorter, or empty. Each rank then needs the same rows of both sides. Those of a
weight that is whole it has; those of one that is cut elsewhere, as where one side has more padding,
come from other ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding import align, is_dtensor, local, summed_gradient

Ranges: TypeAlias = list[tuple[int, int]]  # [start, end) of the rows of every rank


def of_same_tokens(
    sides: Mapping[str, Any], student_size: int, teacher_size: int | None
) -> dict[str, Any]:
    """The arguments of `linear_distillation_loss` with this rank's rows, without padding.

    Args:
        sides: these arguments with weights as the models have them: whole, or sharded over their
            rows as DTensors, next to hidden states that are whole on every rank.
        student_size, teacher_size: V of each side; None for a teacher of pairs.
    """
    student, teacher = (
        {name: sides[name] for name in (f"{side}_weight", f"{side}_bias") if name in sides}
        for side in ("student", "teacher")
    )
    weight, weight_t = student["student_weight"], teacher.get("teacher_weight")
    group, group_t = _group_of_rows(weight), _group_of_rows(weight_t)
    if group is None and group_t is None:
        student = _each(student, lambda x: _without_padding(x, student_size))
        if teacher_size is not None:
            teacher = _each(teacher, lambda x: _without_padding(x, teacher_size))
        return {**sides, **student, **teacher}
    result = {**sides, "teacher_hidden": local(sides["teacher_hidden"])}
    if group is not None:
        _check_ranks(group, group_t)
        ranges = _ranges_of(weight, student_size)
        student = _each(student, lambda x: _without_padding(x, student_size))
    else:
        assert group_t is not None and teacher_size is not None
        result["group"] = group = group_t
        ranges = _with_end(_ranges_of(weight_t, teacher_size), student_size)
        # Each rank has the gradient of the rows that it takes: that of all of them is the sum.
        student = _each(student, lambda x: summed_gradient(x, group_t.group_name))
        student = _each(student, lambda x: _rows_of_ranges(x, student_size, ranges, group_t))
    if teacher_size is not None:
        teacher = _each(teacher, lambda x: _rows_of_ranges(x, teacher_size, ranges, group))
    return {**result, **student, **teacher}


def _each(side: dict[str, Any], function: Callable[[Any], Tensor]) -> dict[str, Any]:
    return {name: None if x is None else function(x) for name, x in side.items()}


def _group_of_rows(weight: Any) -> dist.ProcessGroup | None:
    """The group over whose ranks the rows of a weight are cut."""
    if not is_dtensor(weight):
        return None
    group: dist.ProcessGroup = weight.device_mesh.get_group(_dim_of_rows(weight))
    return group


def _check_ranks(group: dist.ProcessGroup, of_teacher: dist.ProcessGroup | None) -> None:
    if of_teacher is None:
        return
    ranks, others = (dist.get_process_group_ranks(x) for x in (group, of_teacher))
    if ranks != others:
        raise ValueError(
            "teacher: expected an lm_head that is whole, or sharded over the ranks of the "
            f"student's, {ranks}, got one over {others}"
        )


def _dim_of_rows(x: Any) -> int:
    """The dimension of the mesh over which rows are cut."""
    return next(i for i, placement in enumerate(x.placements) if placement.is_shard(0))


def _ranges_of(x: Any, size: int) -> Ranges:
    """The rows of each rank that are of the first `size`."""
    ranks = x.device_mesh.size(_dim_of_rows(x))
    each = -(-x.shape[0] // ranks)
    ends = [min(i * each, size) for i in range(ranks + 1)]
    return list(itertools.pairwise(ends))


def _with_end(ranges: Ranges, size: int) -> Ranges:
    """The ranges of `size` rows: the last one that is not empty ends with them."""
    last = _last(ranges)
    ends = [size if i >= last else min(end, size) for i, (_, end) in enumerate(ranges)]
    return list(itertools.pairwise([0, *ends]))


def _last(ranges: Ranges) -> int:
    """The last rank that has any rows."""
    return max(i for i, (start, end) in enumerate(ranges) if end > start)


def _own_rows(x: Any, size: int) -> Tensor:
    start, end = _ranges_of(x, size)[x.device_mesh.get_local_rank(_dim_of_rows(x))]
    rows: Tensor = x.to_local()[: end - start]
    return rows


def _without_padding(x: Any, size: int) -> Tensor:
    """The first `size` rows. Those of a DTensor stay where they are, which its slices do not."""
    if len(x) == size:
        rows: Tensor = x
    elif not is_dtensor(x):
        rows = x[:size]
    else:
        from torch.distributed.tensor import DTensor

        rows = DTensor.from_local(
            _own_rows(x, size),
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=torch.Size((size, *x.shape[1:])),
            stride=x.stride(),
        )
    return rows


def _rows_of_ranges(x: Any, size: int, ranges: Ranges, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows by the ranges of the other side, of the first `size`. The last rank that has
    any has those behind them, too. No gradient passes through a DTensor."""
    rank = group.rank()
    start, end = ranges[rank]
    if not is_dtensor(x):
        rows: Tensor = x[start : size if rank == _last(ranges) else min(end, size)]
        return rows
    rows = _own_rows(x, size).detach()
    both = zip(_ranges_of(x, size), ranges, strict=True)
    if all(own[0] == other[0] for own, other in both if own[1] > own[0] or other[1] > other[0]):
        return rows
    columns = rows.view(len(rows), -1).T
    like = rows.new_empty(()).expand(len(columns), end - start)
    return align(columns, like, group).T.reshape(-1, *x.shape[1:])
