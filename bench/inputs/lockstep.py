"""All ranks of a group in one process: their steps in turn, and messages that need no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from akl_triton.divergences import Rule
from akl_triton.rows import RowResult, empty_result
from akl_triton.shard_pairs import BackendOfShardedPairs
from akl_triton.shards import BackendOfShards, Shards


class Ranks(NamedTuple):
    """What every rank has, and what was sent."""

    results: list[RowResult]
    gradients: list[Tensor]  # of each shard
    rounds: int
    bytes_of_row: float  # that a rank has sent


def cut(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The shards of [N, V], each in its own storage; what is behind the widths is nobody's."""
    return [part.clone() for part in torch.split(x[:, : sum(widths)], list(widths), dim=-1)]


def run_ranks(
    student: Tensor,
    teacher: Tensor,
    widths: Sequence[int],
    rule: Rule,
    *,
    backend: str,
    upstream: Tensor,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    widths_t: Sequence[int] | None = None,
    ids: Tensor | None = None,
    with_stats: bool = True,
    inplace: bool = False,
    **more: Any,
) -> Ranks:
    """`BackendOfShards` of [N, V] on as many ranks as there are widths, or with ids [N, k] and a
    teacher of as many entries and the rest [N, k + 1] `BackendOfShardedPairs`."""
    of_teacher = [teacher] * len(widths) if ids is not None else cut(teacher, widths_t or widths)
    sides = cut(student, widths), of_teacher
    both = torch.tensor([[s.shape[-1], t.shape[-1]] for s, t in zip(*sides, strict=True)])
    if ids is not None:
        both[:, 1] = both[:, 0]
    shards = [Shards.of(both, rank, rule.vocab_size) for rank in range(len(widths))]
    ranks = [
        BackendOfShards(backend, own, "nobody")
        if ids is None
        else BackendOfShardedPairs(backend, own, "nobody", ids)
        for own in shards
    ]
    results = [empty_result(s[None], with_stats, ids) for s in sides[0]]
    generators = []
    for rank, s, t, result in zip(ranks, *sides, results, strict=True):
        of_gradient = {"upstream": upstream, "gradient": s[None], **more} if inplace else {}
        generators.append(rank.steps(s[None], t[None], valid, labels, rule, result, **of_gradient))
    messages, rounds, sent = [next(x) for x in generators], 0, 0
    while messages:
        assert len({x.shape for x in messages}) == 1
        everyone = torch.stack(messages)
        rounds += 1
        sent += messages[0].numel() * messages[0].element_size()
        messages = []
        for generator in generators:
            try:
                messages.append(generator.send(everyone))
            except StopIteration:
                assert not messages or len(messages) == 0
        assert len(messages) in (0, len(generators))
    gradients = list(sides[0])
    if not inplace:
        gradients = [torch.empty_like(x) for x in gradients]
        for rank, s, t, result, ds in zip(ranks, *sides, results, gradients, strict=True):
            rank.backward(upstream, s[None], t[None], valid, labels, result.state, rule, ds[None])
    return Ranks(results, gradients, rounds, sent / max(len(student), 1))
