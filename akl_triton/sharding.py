"""Logits and weights that are sharded over the vocabulary: who has which columns.

Rank r of a group has the columns from o_r on of both sides, as many as its tensors have: plain
tensors with ``group=``, or DTensors, whose mesh has one dimension that shards the vocabulary.

    placements of logits [..., V]      what a loss makes of them
    Shard(-1) on both sides            the group of that mesh dimension; others than one: an error
    Replicate() on both sides          whole rows: nothing is exchanged
    Shard(i) over tokens on both       this rank's tokens
    Partial(), or unlike placements    an error; see `align`

Before anything else the ranks tell each other what they were called with (`meet`), in one small
message: ranks that differ all raise, and say in what.
"""

from __future__ import annotations

import itertools
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .divergences import RULE_SCHEMA, Rule
from .exchange import all_gather, group_of
from .ops import NAMESPACE
from .sparse import SparseTeacher

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The numbers of the first message: N, the widths, then checksums, of facts and of tensors, and at
# the end the sizes of some hidden states.
_NUMBERS = 24
_FIRST = 3
_TENSORS = ("labels", "labels, mask", "ids", "log_probs", "token_weights")
_SAMPLES = 4
# By which these may differ, relatively: a reduction over the ranks need not round alike on all.
_TOLERANCE = 2.0**-6


@torch.library.custom_op(
    f"{NAMESPACE}::meet",
    mutates_args=(),
    # It waits for the ranks, and gives what is known on the host only.
    tags=torch.Tag.cudagraph_unsafe,
    schema="(Tensor rows, SymInt width_s, SymInt width_t, Tensor?[] tensors, bool are_hidden, "
    f"str[] facts, str group, {RULE_SCHEMA}) -> Tensor",
)
def meet(rows, width_s, width_t, tensors, are_hidden, facts, group, *rule):  # type: ignore[no-untyped-def]
    """The widths [R, 2] int64 of all ranks' shards, of student and teacher, on the CPU.

    `rows` [..., W] has the device and the N of the loss; `tensors` are those of _TENSORS, and
    `facts` names and values [name, value, ...], of which all ranks have to have the same, as of
    the rows where they `are_hidden` states. ValueError on all of them if they have not, or if the
    shards of the two sides are not of the same columns."""
    rule = Rule.unpack(*rule)
    known = {**_facts_of(rule), **dict(zip(facts[::2], facts[1::2], strict=True))}
    n = math.prod(rows.shape[:-1])
    own = [n, width_s, width_t, *(zlib.crc32(x.encode()) for x in known.values())]
    message = torch.tensor(own, dtype=torch.int64, device=rows.device)
    message = torch.cat((message, *(_checksum(x).to(rows.device) for x in tensors)))
    message = torch.nn.functional.pad(message, (0, _NUMBERS - _SAMPLES - len(message)))
    sizes = _sizes(rows) if are_hidden and n else torch.zeros(_SAMPLES, device=rows.device)
    message = torch.cat((message, sizes.view(torch.int32).long()))
    everyone = all_gather(message, group)().cpu()
    rank = group_of(group).rank()
    named = {"number of tokens": str(n), **known, **dict.fromkeys(_TENSORS, "")}
    names = ("number of tokens", None, None, *known, *_TENSORS)
    for name, values in zip(names, everyone.T.tolist(), strict=False):
        if name is not None and len(set(values)) > 1:
            same, others = (
                ", ".join(str(r) for r, x in enumerate(values) if (x == values[rank]) == equal)
                for equal in (True, False)
            )
            raise ValueError(
                f"{name}: expected the same on all ranks of the group, got {named[name] or 'one'} "
                f"on rank {same}, and another on rank {others}"
            )
    sizes = everyone[:, -_SAMPLES:].int().view(torch.float32)
    if not torch.allclose(sizes, sizes[:1], rtol=_TOLERANCE, atol=0.0, equal_nan=True):
        raise ValueError(
            "student_hidden: expected the same tokens on all ranks of the group, got others; a "
            "weight that FSDP has sharded is to be gathered: call the loss in the forward of the "
            "module that fully_shard gathers it for"
        )
    widths = everyone[:, 1:_FIRST].clone()
    _check_columns(widths)
    totals = dict(zip(("student", "teacher"), widths.sum(0).tolist(), strict=True))
    checks.check_vocab_size(rule.vocab_size, totals)
    return widths


@meet.register_fake
def _(rows, width_s, width_t, tensors, are_hidden, facts, group, *rule):  # type: ignore[no-untyped-def]
    return torch.empty(group_of(group).size(), 2, dtype=torch.int64)


def _facts_of(rule: Rule) -> dict[str, str]:
    """The options that are in a rule, by their names."""
    facts = {
        "divergence": rule.divergence,
        "temperature": rule.temperature,
        "student_softcap, student_logit_scale": tuple(rule.student_map),
        "teacher_softcap, teacher_logit_scale": tuple(rule.teacher_map),
        "kd_ratio, scale_by_t2": (rule.divergence_weight, rule.label_weight),
        "outside": rule.rest,
        "vocab_size": rule.vocab_size,
    }
    return {name: str(value) for name, value in facts.items()}


def _sizes(hidden: Tensor) -> Tensor:
    """[_SAMPLES] fp32 of hidden states [..., H]: sum |h| of some tokens."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    some = torch.linspace(0, len(rows) - 1, _SAMPLES, device=rows.device).long()
    return rows[some].float().abs().sum(-1)


def _checksum(x: Tensor | None) -> Tensor:
    """[1] int64 of what a tensor holds, and where."""
    if x is None:
        return torch.full((1,), -1)
    values = x.reshape(-1)
    values = (values.float().view(torch.int32) if x.is_floating_point() else values).long() + 1
    places = torch.arange(1, len(values) + 1, device=x.device)
    return (values * (places * 2654435761 % 2147483647)).sum().view(1)


def _check_columns(widths: Tensor) -> None:
    """The shards of both sides begin at the same columns, wherever there are any."""
    of_student, of_teacher = widths.T.tolist()
    starts = (itertools.accumulate(side, initial=0) for side in (of_student, of_teacher))
    for rank, (start_s, start_t, *own) in enumerate(
        zip(*starts, of_student, of_teacher, strict=False)
    ):
        # A rank has nothing of a teacher whose vocabulary ends before its columns.
        if start_s != start_t and own[1] > 0:
            raise ValueError(
                "teacher: expected shards of the same columns of the vocabulary as the student's, "
                f"whose widths are {of_student}, got widths {of_teacher}, of which that of rank "
                f"{rank} begins at column {start_t}, not at {start_s}; use sharding.align"
            )


def shards_and_vocabulary(
    group: str | None,
    rule: Rule,
    widths: Mapping[str, int],
    student: Tensor,
    teacher: Tensor,
    of_rows: Sequence[Tensor | None],
    token_weights: Tensor | None,
    *,
    are_hidden: bool = False,
    **options: object,
) -> tuple[Tensor | None, int]:
    """The widths [R, 2] of all ranks' shards, None without a group, and the tokens of the student.

    `widths` are those of this rank, by the name of their argument; a teacher of pairs has none.
    `of_rows` are labels, valid and ids, which all ranks have, as they have the `options` and where
    the student's `are_hidden` states these."""
    if group is None:
        return None, checks.check_vocab_size(rule.vocab_size, widths)
    facts = {"dtype of the student": student.dtype, "dtype of the teacher": teacher.dtype}
    texts = [str(x) for fact in (*facts.items(), *options.items()) for x in fact]
    of_student, *of_teacher = widths.values()
    tensors = [*of_rows, None if of_teacher else teacher, token_weights]
    both = of_student, of_teacher[0] if of_teacher else of_student
    shards: Tensor = meet(student, *both, tensors, are_hidden, texts, group, *rule.pack())
    if rule.vocab_size is not None or checks.is_traced(shards):  # then nobody looks at labels
        return shards, rule.vocab_size or 0
    return shards, int(shards[:, 0].sum())


def is_dtensor(x: object) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(x, distributed.DTensor)


def local_logits(
    student: Tensor, teacher: Tensor | SparseTeacher, options: Any
) -> tuple[Tensor, Tensor | SparseTeacher]:
    """This rank's part of logits of which at least one side is a DTensor.

    `options` get the group that shards the vocabulary, if one does, and this rank's part of what
    is of tokens. A plain tensor next to a DTensor is this rank's part already."""
    for name in ("mask", "token_weights"):
        options[name] = local(options[name])
    if not is_dtensor(student):
        raise TypeError(
            "student_logits: expected a DTensor, as teacher_logits is one, got a plain tensor; "
            "pass teacher_logits.to_local() and group= where both are this rank's columns"
        )
    if options["group"] is not None:
        raise ValueError(
            "group: expected None with DTensors, which bring theirs along, got "
            f"{options['group']!r}"
        )
    if is_dtensor(teacher):
        _check_alike(student, teacher)  # type: ignore[arg-type]
    options["group"] = _group_of_columns("student_logits", student, options)  # type: ignore[arg-type]
    return local(student), local(teacher)


def local(x: Any) -> Any:
    """This rank's part of a DTensor; anything else as it is."""
    return _waited(x.to_local()) if is_dtensor(x) else x


class _Waited(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.wait().view(x.shape)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        return upstream


def _waited(x: Tensor) -> Tensor:
    """A part that may be on its way here, as a redistribution with ``async_op`` leaves it."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    if not isinstance(x, AsyncCollectiveTensor):
        return x
    return _Waited.apply(x)  # type: ignore[no-untyped-call,no-any-return]


def _check_alike(student: DTensor, teacher: DTensor) -> None:
    """Both sides lie on the ranks alike."""
    if student.device_mesh != teacher.device_mesh or student.placements != teacher.placements:
        raise ValueError(
            f"teacher_logits: expected the mesh and placements of student_logits, "
            f"{student.device_mesh} and {student.placements}, got {teacher.device_mesh} and "
            f"{teacher.placements}; use akl_triton.sharding.align"
        )


def _group_of_columns(
    name: str, x: DTensor, options: Mapping[str, Any], columns: int = -1
) -> str | None:
    """The name of the group that shards the dimension of the vocabulary; None where all ranks have
    all of it."""
    columns, groups = columns % x.dim(), []
    for dim, placement in enumerate(x.placements):
        if placement.is_partial():
            raise ValueError(
                f"{name}: expected Shard or Replicate in each mesh dimension, got {x.placements}; "
                "redistribute it"
            )
        if placement.is_shard(columns):
            groups.append(x.device_mesh.get_group(dim))
        elif placement.is_shard() and columns == 0:
            raise ValueError(
                f"{name}: expected Shard(0), of the vocabulary, or Replicate in each mesh "
                f"dimension, got {x.placements}; redistribute it"
            )
    if columns:
        _check_mean(name, [p for p in x.placements if not p.is_shard(columns)], options)
    if len(groups) > 1:
        raise ValueError(
            f"{name}: expected one mesh dimension that shards the vocabulary, got {x.placements}"
        )
    return checks.check_group("group", groups[0]) if groups else None


Projection: TypeAlias = tuple[Any, Any, Any]  # hidden, weight, bias


def local_projections(
    of_student: Projection, of_teacher: Projection, options: Any
) -> tuple[Projection, Projection]:
    """This rank's part of both sides, of which at least one weight is a DTensor.

    Weights are sharded over their rows, the vocabulary, and hidden states replicated over the same
    ranks, or gathered from the tokens that these have. `options` get the group."""
    for name in ("mask", "token_weights"):
        options[name] = local(options[name])
    if options["group"] is not None:
        raise ValueError(
            "group: expected None with DTensors, which bring theirs along, got "
            f"{options['group']!r}"
        )
    if not is_dtensor(of_student[1]):
        raise TypeError(
            "student_weight: expected a DTensor, as teacher_weight is one, got a plain tensor; "
            "pass .to_local() of both and group= where they are this rank's rows"
        )
    student, options["group"] = _local_projection("student", *of_student, options)
    if not is_dtensor(of_teacher[1]):
        return student, of_teacher
    teacher, group = _local_projection("teacher", *of_teacher, options)
    if group != options["group"]:
        raise ValueError(
            "teacher_weight: expected the mesh dimension of student_weight to shard its rows, "
            f"{of_student[1].device_mesh} and {of_student[1].placements}, got "
            f"{of_teacher[1].device_mesh} and {of_teacher[1].placements}; redistribute it"
        )
    return student, teacher


def _local_projection(
    side: str, hidden: Any, weight: DTensor, bias: Any, options: Any
) -> tuple[Projection, str | None]:
    from torch.distributed.tensor import Partial, Replicate

    mesh, name = weight.device_mesh, f"{side}_weight"
    group = _group_of_columns(name, weight, options, columns=0)
    tokens_at = []  # mesh dimensions over which tokens are sharded
    if is_dtensor(hidden):
        if hidden.device_mesh != mesh:
            raise ValueError(
                f"{side}_hidden: expected the mesh of {name}, {mesh}, got {hidden.device_mesh}"
            )
        # What the ranks of the vocabulary have of the tokens is gathered, and its gradient sent
        # back where it came from, summed.
        wanted = [
            Replicate() if of_weight.is_shard(0) or of_hidden.is_partial() else of_hidden
            for of_weight, of_hidden in zip(weight.placements, hidden.placements, strict=True)
        ]
        tokens_at = [i for i, placement in enumerate(wanted) if placement.is_shard()]
        _check_mean(f"{side}_hidden", wanted, options)
        hidden = _waited(
            hidden.redistribute(placements=wanted).to_local(
                grad_placements=[
                    Partial() if of_weight.is_shard(0) else placement
                    for of_weight, placement in zip(weight.placements, wanted, strict=True)
                ]
            )
        )

    def of_rank(x: Any) -> Any:
        if not is_dtensor(x):
            return x
        summed = [Partial() if i in tokens_at else p for i, p in enumerate(x.placements)]
        return _waited(x.to_local(grad_placements=summed))

    return (hidden, of_rank(weight), of_rank(bias)), group


class _SummedGradient(torch.autograd.Function):
    """The identity, of which each rank has the gradient by its own columns alone."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        # Here, as it takes a tenth of the time in which all else is imported.
        from torch.distributed._functional_collectives import all_reduce, wait_tensor

        summed = all_reduce(upstream, "sum", ctx.group)
        return wait_tensor(summed), None  # type: ignore[no-untyped-call]


def summed_gradient(hidden: Tensor, group: str) -> Tensor:
    """Hidden states that all ranks of the group have, whose gradient is summed over the ranks."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return hidden
    return _SummedGradient.apply(hidden, group)  # type: ignore[no-untyped-call,no-any-return]


def _check_mean(name: str, placements: Sequence[Any], options: Mapping[str, Any]) -> None:
    """A mean over tokens that other ranks have needs their number."""
    sharded = [p for p in placements if p.is_shard()]
    if sharded and options["reduction"] == "mean" and options["num_items"] is None:
        raise ValueError(
            "num_items: expected the number of tokens of all ranks for a mean where these are "
            f"sharded, as {name} is by {tuple(placements)}, got None; or use reduction='sum'"
        )


def align(teacher: Tensor, like: Tensor, group: dist.ProcessGroup | str | None = None) -> Tensor:
    """This rank's part of the teacher's logits, of the columns that it has of the student's.

    For sides that are padded or sharded unlike each other. Every rank sends each other one what
    that has to have, in one all-to-all. What the teacher has behind the student's vocabulary goes
    to the last rank that has any columns.

    Args:
        teacher: ``[..., W_t]``, this rank's columns, as many as it has; or a DTensor, which may
            also be replicated.
        like: ``[..., W_s]``, this rank's columns of the student; or a DTensor.
        group: of plain tensors, as for the losses; DTensors bring theirs along.

    Shape:
        ``[..., W]``, a plain tensor, for ``teacher_logits`` next to `like`. It has no gradient.

    Example:
        >>> import torch
        >>> from akl_triton import sharding
        >>> sharding.align(torch.zeros(2, 8), torch.zeros(2, 6)).shape  # one rank has all
        torch.Size([2, 8])
    """
    name = checks.check_group("group", group)
    replicated = False
    if is_dtensor(like):
        summed = {"reduction": "sum", "num_items": None}
        name = _group_of_columns("like", like, summed)  # type: ignore[arg-type]
        if is_dtensor(teacher):
            of_teacher = _group_of_columns("teacher", teacher, summed)  # type: ignore[arg-type]
            replicated = name is not None and of_teacher is None
            if of_teacher not in (None, name):
                raise ValueError(
                    "teacher: expected its vocabulary to be sharded over the mesh dimension that "
                    f"shards the student's, or not at all, got {teacher.placements}"  # type: ignore[attr-defined]
                )
    teacher, like = local(teacher).detach(), local(like)
    if teacher.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"teacher: expected the leading dimensions of like, {list(like.shape[:-1])}, got "
            f"{list(teacher.shape)}"
        )
    if name is None:
        return teacher
    own = torch.tensor([like.shape[-1], teacher.shape[-1]], device=like.device)
    widths = all_gather(own, name)().tolist()
    rank = group_of(name).rank()
    wanted = _ranges([width for width, _ in widths])
    last = max((r for r, (start, end) in enumerate(wanted) if end > start), default=rank)
    if replicated:
        start, end = wanted[rank]
        return teacher[..., start : teacher.shape[-1] if rank == last else end]
    held = _ranges([width for _, width in widths])
    wanted[last] = wanted[last][0], max(wanted[last][1], held[-1][1])
    sent, received = (
        [max(min(a, end) - max(b, start), 0) for b, a in others]
        for (start, end), others in ((held[rank], wanted), (wanted[rank], held))
    )
    rows = math.prod(teacher.shape[:-1])
    parts = torch.split(teacher.reshape(rows, teacher.shape[-1]), sent, dim=-1)
    outgoing = torch.cat([part.reshape(-1) for part in parts])
    incoming = outgoing.new_empty(rows * sum(received))
    dist.all_to_all_single(
        incoming,
        outgoing,
        [rows * width for width in received],
        [rows * width for width in sent],
        group=group_of(name),
    )
    blocks = torch.split(incoming, [rows * width for width in received])
    columns = [x.view(rows, width) for x, width in zip(blocks, received, strict=True)]
    return torch.cat(columns, dim=-1).view(*teacher.shape[:-1], sum(received))


def _ranges(widths: list[int]) -> list[tuple[int, int]]:
    """[start, end) of the columns of every rank."""
    ends = list(itertools.accumulate(widths))
    return [(end - width, end) for width, end in zip(widths, ends, strict=True)]
