"""The losses of a vocabulary that is sharded over processes: a gloo group on this machine.

What the kernels and their sums make of shards is in test_shards.py; here is what needs a group:
the doors, autograd, messages, DTensors, faults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from akl_triton import (
    DKD,
    AdaptiveKL,
    AdaptiveKLLoss,
    Divergence,
    ForwardKL,
    JensenShannon,
    SparseTeacher,
    adaptive_kl,
    distillation_loss,
    exchange,
    linear_distillation_loss,
    linear_ops,
    sharding,
    teacher_pairs,
)
from akl_triton.divergences import Rule
from bench.lab.collectives import record_collectives
from tests.support.ranks import Failed, Ranks

N, V, REAL = 24, 1003, 900


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks()
    yield processes
    processes.stop()


def logits() -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, labels) of whole rows, the same on every rank."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, N, V, generator=g) * 3.0
    return student, teacher, torch.randint(REAL, (N,), generator=g)


def columns_of(group: dist.ProcessGroup, v: int = V) -> slice:
    """Uneven shards: this rank's columns of the vocabulary."""
    size, rank = group.size(), group.rank()
    ends = [v * (i + 1) ** 2 // size**2 for i in range(-1, size)]
    return slice(ends[rank], ends[rank + 1])


def of_logits(
    group: dist.ProcessGroup, divergence: Divergence, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Any]:
    """(loss, this rank's gradient, statistics)"""
    student, teacher, labels = logits()
    own = columns_of(group)
    leaf = student[:, own].clone().requires_grad_()
    inplace = options.get("inplace", False)
    loss, stats = distillation_loss(
        leaf * 1 if inplace else leaf, teacher[:, own].clone(), labels,
        divergence=divergence, group=group, return_stats=True, **options,
    )  # fmt: skip
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, tuple(stats)


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "in place": {"inplace": True},
    "labels": {"kd_ratio": 0.5, "temperature": 2.0, "reduction": "none"},
    "padded": {"vocab_size": REAL, "student_softcap": 5.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("divergence", [AdaptiveKL(), ForwardKL(), DKD(), JensenShannon()], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_logits(ranks: Ranks, size: int, divergence: Divergence, options: dict[str, Any]) -> None:
    student, teacher, labels = logits()
    leaf = student.clone().requires_grad_()
    inplace = options.get("inplace", False)
    loss, stats = distillation_loss(
        leaf * 1 if inplace else leaf, teacher, labels,
        divergence=divergence, return_stats=True, **options,
    )  # fmt: skip
    loss.sum().backward()
    assert leaf.grad is not None
    results = ranks.run(size, of_logits, divergence, options)
    for of_rank, _, stats_of_rank in results:
        assert torch.equal(of_rank, results[0][0])  # to the bit
        torch.testing.assert_close(of_rank, loss.detach(), rtol=2e-6, atol=1e-6)
        for ours, theirs in zip(stats_of_rank, stats, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6, equal_nan=True)
    gradient = torch.cat([x[1] for x in results], dim=-1)
    if size == 1:
        assert torch.equal(gradient, leaf.grad) and torch.equal(results[0][0], loss.detach())
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-6)


def of_a_short_teacher(group: dist.ProcessGroup, end: int) -> tuple[Tensor, Tensor]:
    student, teacher, _ = logits()
    own = columns_of(group)
    leaf = student[:, own].clone().requires_grad_()
    loss = adaptive_kl(leaf, teacher[:, own.start : min(own.stop, end)].clone(), group=group)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_a_teacher_whose_vocabulary_ends_before_the_columns_of_a_rank(ranks: Ranks) -> None:
    """The last rank has 439 columns of the student, and none of the teacher."""
    student, teacher, _ = logits()
    leaf = student.clone().requires_grad_()
    loss = adaptive_kl(leaf, teacher[:, :500])
    loss.backward()
    results = ranks.run(4, of_a_short_teacher, 500)
    for of_rank, _ in results:
        torch.testing.assert_close(of_rank, loss.detach(), rtol=2e-6, atol=1e-6)
    gradient = torch.cat([x[1] for x in results], dim=-1)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)


def of_fp16(group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(loss, this rank's gradient), which is written before its loss scale is known."""
    student, teacher, _ = logits()
    own = slice(None) if group is None else columns_of(group)
    leaf = student[:, own].half().requires_grad_()
    loss = adaptive_kl(leaf * 1, teacher[:, own].half(), inplace=True, group=group)
    (loss * 1024.0).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_fp16_in_place(ranks: Ranks) -> None:
    loss, gradient = of_fp16(None)
    results = ranks.run(4, of_fp16)
    torch.testing.assert_close(results[0][0], loss, rtol=2e-6, atol=1e-6)
    ours = torch.cat([x for _, x in results], dim=-1)
    rounding = float(gradient.abs().max()) * 2**-11
    torch.testing.assert_close(ours, gradient, rtol=2e-3, atol=rounding)


def test_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the door, in processes of their own. Few tokens count: the interpreter is slow."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    two = Ranks(2)
    options: dict[str, Any] = {"mask": torch.arange(N) % 6 == 1, "kd_ratio": 0.5}
    try:
        of_kernels = two.run(2, of_logits, AdaptiveKL(), {**options, "backend": "triton"})
        of_torch = two.run(2, of_logits, AdaptiveKL(), {**options, "backend": "torch"})
    finally:
        two.stop()
    for (loss, gradient, _), (expected, exact, _) in zip(of_kernels, of_torch, strict=True):
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


H_S, H_T = 16, 24


def assert_close(gradient: Tensor, exact: Tensor) -> None:
    """To some roundings of its largest entries."""
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=4e-6 * float(exact.abs().max()))


def projections() -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(hidden, weight, bias) of both sides, and labels; whole, the same on every rank."""
    g = torch.Generator().manual_seed(1)
    student, teacher = (
        [
            torch.randn(N, h, generator=g),
            torch.randn(V, h, generator=g),
            torch.randn(V, generator=g),
        ]
        for h in (H_S, H_T)
    )
    return student, teacher, torch.randint(REAL, (N,), generator=g)


def of_hidden_states(
    group: dist.ProcessGroup | None, divergence: Divergence, empty: bool, options: dict[str, Any]
) -> tuple[Any, ...]:
    """(loss, stats, gradients of hidden states, weight and bias), of this rank's columns."""
    student, teacher, labels = projections()
    own = slice(None) if group is None else columns_of(group)
    if group is not None and empty:  # the first rank's columns are the second's
        own = [slice(0, 0), slice(0, columns_of(group).stop), own, own][group.rank()]
    hidden, weight, bias = (
        x.clone().requires_grad_() for x in (student[0], student[1][own], student[2][own])
    )
    loss, stats = linear_distillation_loss(
        hidden, weight, teacher[0], teacher[1][own], labels, divergence=divergence, group=group,
        student_bias=bias, teacher_bias=teacher[2][own], return_stats=True,
        chunk_bytes=7 * 8 * V, **options,
    )  # fmt: skip
    (loss * torch.linspace(0.5, 1.0, loss.numel()).view(loss.shape)).sum().backward()
    return loss.detach(), tuple(stats), hidden.grad, weight.grad, bias.grad


@pytest.mark.parametrize(
    "divergence, empty, options",
    [
        (AdaptiveKL(), False, {}),
        (AdaptiveKL(), True, {"reduction": "none", "ignore_index": 5}),
        (ForwardKL(), True, {"kd_ratio": 0.5, "temperature": 2.0}),
        (JensenShannon(), False, {"vocab_size": REAL}),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 4])
def test_hidden_states(
    ranks: Ranks, size: int, divergence: Divergence, empty: bool, options: dict[str, Any]
) -> None:
    """Chunks of 7 tokens, of which two are under way."""
    loss, stats, *gradients = of_hidden_states(None, divergence, False, options)
    results = ranks.run(size, of_hidden_states, divergence, empty, options)
    for of_rank, stats_of_rank, of_hidden, *_ in results:
        assert torch.equal(of_rank, results[0][0]) and torch.equal(of_hidden, results[0][2])
        torch.testing.assert_close(of_rank, loss, rtol=2e-6, atol=1e-6)
        assert_close(of_hidden, gradients[0])
        for ours, theirs in zip(stats_of_rank, stats, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6, equal_nan=True)
    for i in (1, 2):
        whole = torch.cat([result[2 + i] for result in results])
        assert_close(whole, gradients[i])


def of_dtensors(group: dist.ProcessGroup, layout: str) -> tuple[Any, ...]:
    """(loss, gradient of the student's logits, whole), on a mesh of data x vocabulary."""
    student, teacher, labels = logits()
    mesh, tokens = _mesh(group, layout)
    placements = [Shard(0)] * (mesh.ndim - 1) + [Replicate() if layout == "whole" else Shard(1)]
    leaf = distribute_tensor(student, mesh, placements).detach().requires_grad_()
    targets = distribute_tensor(labels, mesh, [Shard(0)] * (mesh.ndim - 1) + [Replicate()])
    loss = distillation_loss(
        leaf, distribute_tensor(teacher, mesh, placements), targets, reduction="sum"
    )
    loss.backward()
    assert isinstance(leaf.grad, DTensor) and leaf.grad.placements == tuple(placements)
    total = loss.detach() / N
    if tokens is not None:
        dist.all_reduce(total, group=tokens)
    return total, leaf.grad.full_tensor() / N


def _mesh(group: dist.ProcessGroup, layout: str) -> tuple[DeviceMesh, dist.ProcessGroup | None]:
    """The mesh, and the group of its dimension of tokens."""
    if layout != "data x vocabulary":
        return DeviceMesh.from_group(group, "cpu"), None
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    return mesh, mesh.get_group("data")


@pytest.mark.parametrize("layout", ["vocabulary", "data x vocabulary", "whole"])
def test_dtensors(ranks: Ranks, layout: str) -> None:
    student, teacher, labels = logits()
    leaf = student.clone().requires_grad_()
    loss = adaptive_kl(leaf, teacher, labels)
    loss.backward()
    for of_rank, gradient in ranks.run(4, of_dtensors, layout):
        torch.testing.assert_close(of_rank, loss.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)


def of_dtensor_weights(group: dist.ProcessGroup, layout: str) -> tuple[Any, ...]:
    (hidden, weight, bias), (hidden_t, weight_t, bias_t), labels = projections()
    mesh, tokens = _mesh(group, layout)
    data: list[Any] = [Shard(0)] * (mesh.ndim - 1)
    rows: list[Any] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    of_tokens = [*data, Shard(0) if layout.startswith("sequence") else Replicate()]

    def leaf(x: Tensor, placements: list[Any]) -> Tensor:
        return distribute_tensor(x, mesh, placements).detach().requires_grad_()

    plain = layout == "plain hidden states"
    is_late = layout == "sequence, on its way"
    of_student = (
        hidden.clone().requires_grad_() if plain else leaf(hidden, of_tokens),
        leaf(weight, rows),
        leaf(bias, rows),
    )
    of_teacher = (
        hidden_t if plain else distribute_tensor(hidden_t, mesh, of_tokens),
        distribute_tensor(weight_t, mesh, rows),
        distribute_tensor(bias_t, mesh, rows),
    )
    ours: Any = of_student[0]
    theirs: Any = of_teacher[0]
    if is_late:  # as the styles of tensor parallelism pass them on
        ours, theirs = (
            x.redistribute(placements=[Replicate()], async_op=True) for x in (ours, theirs)
        )
    loss = linear_distillation_loss(
        ours, of_student[1], theirs, of_teacher[1],
        distribute_tensor(labels, mesh, [*data, Replicate()]),
        student_bias=of_student[2], teacher_bias=of_teacher[2], num_items=float(N),
        chunk_bytes=5 * 8 * V,
    )  # fmt: skip
    loss.backward()
    total = loss.detach()
    if tokens is not None:
        dist.all_reduce(total, group=tokens)
    grads = [x.grad for x in of_student]
    return total, *(x.full_tensor() if isinstance(x, DTensor) else x for x in grads)


@pytest.mark.parametrize(
    "layout",
    [
        "vocabulary",
        "plain hidden states",
        "sequence",
        "sequence, on its way",
        "data x vocabulary",
    ],
)
def test_dtensor_weights(ranks: Ranks, layout: str) -> None:
    (hidden, weight, bias), (hidden_t, weight_t, bias_t), labels = projections()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_distillation_loss(
        leaves[0], leaves[1], hidden_t, weight_t, labels,
        student_bias=leaves[2], teacher_bias=bias_t,
    )  # fmt: skip
    loss.backward()
    for of_rank, *gradients in ranks.run(4, of_dtensor_weights, layout):
        torch.testing.assert_close(of_rank, loss.detach(), rtol=2e-6, atol=1e-6)
        for ours, exact in zip(gradients, leaves, strict=True):
            torch.testing.assert_close(ours, exact.grad, rtol=1e-5, atol=1e-6)


def compiled(group: dist.ProcessGroup, door: str) -> Any:
    """(loss, gradient) of a function that torch.compile takes whole."""
    own = columns_of(group)
    student, teacher, labels = logits()
    sides, name = projections(), group.group_name

    def of_logits(x: Tensor) -> Tensor:
        return distillation_loss(
            x * 1, teacher[:, own], labels, kd_ratio=0.5, group=name, inplace=door == "in place"
        )

    def of_hidden_states(x: Tensor) -> Tensor:
        (_, weight, _), (hidden_t, weight_t, _), labels = sides
        return linear_distillation_loss(
            x, weight[own], hidden_t, weight_t[own], labels, group=group, chunk_bytes=7 * 8 * V
        )

    function, x = of_logits, student[:, own]
    if door == "hidden states":
        function, x = of_hidden_states, sides[0][0]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        loss = run(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager, rtol=0.0, atol=0.0)
    return results[0]


@pytest.mark.parametrize("door", ["logits", "in place", "hidden states"])
def test_one_graph(ranks: Ranks, door: str) -> None:
    ranks.run(2, compiled, door)


def of_module(group: dist.ProcessGroup) -> Any:
    student, teacher, labels = logits()
    own = columns_of(group)
    module = AdaptiveKLLoss(mu=0.8, group=group)
    assert isinstance(module.options["group"], str)  # which can be pickled
    return module(student[:, own], teacher[:, own], labels)


def test_module(ranks: Ranks) -> None:
    student, teacher, labels = logits()
    for loss in ranks.run(2, of_module):
        torch.testing.assert_close(loss, adaptive_kl(student, teacher, labels, mu=0.8))


def aligned(group: dist.ProcessGroup, v_s: int, v_t: int) -> tuple[Tensor, Tensor]:
    """A loss of sides of other widths, each in equal parts; and the last row of the teacher."""
    student, teacher, labels = logits()
    student, teacher = student[:, :v_s].clone(), teacher[:, :v_t].clone()
    own_s, own_t = (x.tensor_split(group.size(), dim=-1)[group.rank()] for x in (student, teacher))
    ours = sharding.align(
        own_t.view(2, -1, own_t.shape[-1]), own_s.view(2, -1, own_s.shape[-1]), group
    )
    flat = ours.reshape(N, -1)
    return distillation_loss(own_s, flat, labels, group=group), flat[-1]


@pytest.mark.parametrize("v_s, v_t", [(950, V), (V, 950), (V, V)])
@pytest.mark.parametrize("size", [2, 4])
def test_align(ranks: Ranks, size: int, v_s: int, v_t: int) -> None:
    student, teacher, labels = logits()
    expected = distillation_loss(student[:, :v_s], teacher[:, :v_t], labels)
    results = ranks.run(size, aligned, v_s, v_t)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(torch.cat([row for _, row in results]), teacher[-1, :v_t])


def aligned_dtensors(group: dist.ProcessGroup, replicated: bool) -> Tensor:
    student, teacher, labels = logits()
    mesh = DeviceMesh.from_group(group, "cpu")
    like = distribute_tensor(student[:, :950].contiguous(), mesh, [Shard(1)])
    other = distribute_tensor(teacher, mesh, [Replicate() if replicated else Shard(1)])
    return distillation_loss(like, sharding.align(other, like), labels)


@pytest.mark.parametrize("replicated", [False, True])
def test_align_dtensors(ranks: Ranks, replicated: bool) -> None:
    student, teacher, labels = logits()
    expected = distillation_loss(student[:, :950], teacher, labels)
    for loss in ranks.run(4, aligned_dtensors, replicated):
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)


def pairs() -> SparseTeacher:
    """The teacher's 64 most probable tokens of each position, on every rank."""
    return teacher_pairs(logits()[1], 64)


def of_pairs(
    group: dist.ProcessGroup | None, divergence: Divergence, hidden: bool, options: dict[str, Any]
) -> tuple[Any, ...]:
    """(loss, statistics, this rank's gradient of logits or weight)"""
    own = slice(None) if group is None else columns_of(group)
    student, _, labels = logits()
    if hidden:
        (x, weight, _), _, _ = projections()
        leaf = weight[own].clone().requires_grad_()
        loss, stats = linear_distillation_loss(
            x, leaf, pairs(), None, labels, divergence=divergence, group=group,
            return_stats=True, chunk_bytes=7 * 4 * V, **options,
        )  # fmt: skip
    else:
        leaf = student[:, own].clone().requires_grad_()
        loss, stats = distillation_loss(
            leaf, pairs(), labels, divergence=divergence, group=group, return_stats=True, **options
        )
    loss.backward()
    return loss.detach(), tuple(stats), leaf.grad


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden states"])
@pytest.mark.parametrize(
    "divergence, options",
    [(AdaptiveKL(), {}), (ForwardKL(), {"kd_ratio": 0.5})],
    ids=str,
)
def test_pairs(ranks: Ranks, divergence: Divergence, options: dict[str, Any], hidden: bool) -> None:
    loss, stats, gradient = of_pairs(None, divergence, hidden, options)
    results = ranks.run(4, of_pairs, divergence, hidden, options)
    for of_rank, stats_of_rank, _ in results:
        assert torch.equal(of_rank, results[0][0])
        torch.testing.assert_close(of_rank, loss, rtol=2e-6, atol=1e-6)
        for ours, theirs in zip(stats_of_rank, stats, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6, equal_nan=True)
    assert_close(torch.cat([x[2] for x in results], dim=0 if hidden else -1), gradient)


def collectives_of(group: dist.ProcessGroup, case: str) -> tuple[list[str], list[str], int]:
    """The collectives of forward and backward, and the bytes that forward has sent."""
    student, teacher, labels = logits()
    own = columns_of(group)
    leaf = student[:, own].bfloat16().requires_grad_()
    of_teacher: Any = pairs() if case == "pairs" else teacher[:, own].bfloat16()
    with record_collectives() as forward:
        loss = distillation_loss(
            leaf, of_teacher, labels, group=group,
            divergence=JensenShannon() if case == "terms" else
            ForwardKL() if case == "fixed weight" else AdaptiveKL(),
        )  # fmt: skip
    with record_collectives() as backward:
        loss.backward()
    return [x.name for x in forward], [x.name for x in backward], sum(x.bytes for x in forward)


@pytest.mark.parametrize(
    "case, most", [("fixed weight", 2), ("terms", 3), ("pairs", 2), ("adaptive", 5)]
)
@pytest.mark.parametrize("size", [2, 4])
def test_collectives(ranks: Ranks, size: int, case: str, most: int) -> None:
    """The first of them is that of `meet`; backward has none."""
    for forward, backward, sent in ranks.run(size, collectives_of, case):
        assert 2 <= len(forward) <= most and all("gather" in name for name in forward)
        assert backward == []
        assert sent <= 24 * 8 + 300 * N


def called_unlike(group: dist.ProcessGroup, what: str) -> Any:
    """The last rank calls with something else."""
    student, teacher, labels = logits()
    own, last = columns_of(group), group.rank() == group.size() - 1
    options: dict[str, Any] = {"divergence": AdaptiveKL(), "kd_ratio": 0.5}
    student, teacher = student[:, own], teacher[:, own]
    if last and what == "N":
        student, teacher, labels = student[:-1], teacher[:-1], labels[:-1]
    if last and what == "labels":
        labels = labels.roll(1)
    if last and what == "mask":
        options["mask"] = torch.arange(N) != 3
    if group.rank() == 0 and what == "columns":
        teacher = teacher[:, 1:]
    if what == "vocab_size":
        options["vocab_size"] = V + 1
    unlike: dict[str, dict[str, Any]] = {
        "mu": {"divergence": AdaptiveKL(mu=0.6)},
        "divergence": {"divergence": "jensen_shannon"},
        "temperature": {"temperature": 2.0},
        "kd_ratio": {"kd_ratio": 0.25},
        "reduction": {"reduction": "sum"},
        "statistics": {"return_stats": True},
    }
    options.update(unlike.get(what, {}) if last else {})
    if what == "token_weights":
        options["token_weights"] = torch.ones(N) + last
    if what == "hidden states":  # as if FSDP had sharded the weight
        (hidden, weight, _), (hidden_t, weight_t, _), labels = projections()
        hidden, hidden_t = (x.roll(group.rank(), 0) for x in (hidden, hidden_t))
        return linear_distillation_loss(hidden, weight[own], hidden_t, weight_t[own], group=group)
    if last and what == "dtype":
        student = student.bfloat16()
    return distillation_loss(student, teacher, labels, group=group, **options)


@pytest.mark.parametrize(
    "what, message",
    [
        ("N", "number of tokens: expected the same on all ranks of the group, got 2"),
        ("labels", "labels: expected the same on all ranks of the group"),
        ("mask", "labels, mask: expected the same on all ranks of the group"),
        ("columns", "teacher: expected shards of the same columns of the vocabulary as the st"),
        ("token_weights", "token_weights: expected the same on all ranks of the group"),
        ("hidden states", "student_hidden: expected the same tokens on all ranks of the group"),
        ("mu", "divergence: expected the same on all ranks of the group, got AdaptiveKL(mu=0."),
        ("divergence", "divergence: expected the same on all ranks of the group, got "),
        ("temperature", "temperature: expected the same on all ranks of the group, got "),
        ("kd_ratio", "kd_ratio, scale_by_t2: expected the same on all ranks of the group, got "),
        ("reduction", "reduction: expected the same on all ranks of the group, got "),
        ("statistics", "return_stats: expected the same on all ranks of the group, got "),
        ("dtype", "dtype of the student: expected the same on all ranks of the group, got "),
        ("vocab_size", f"vocab_size: expected an integer from 1 to {V}"),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_differ_all_raise(ranks: Ranks, size: int, what: str, message: str) -> None:
    for result in ranks.call(size, called_unlike, what):
        assert isinstance(result, Failed), result
        assert result.error == "ValueError" and result.text.startswith(message), result.text
    assert len(ranks.run(size, of_module)) == size  # nothing is left behind


def called_by_one(group: dist.ProcessGroup) -> Any:
    """The other rank ends before it comes to the loss."""
    student, teacher, labels = logits()
    own = columns_of(group)
    if group.rank():
        os._exit(1)
    return adaptive_kl(student[:, own], teacher[:, own], labels, group=group)


def test_a_rank_that_ends_leaves_nobody_waiting_without_a_word() -> None:
    two = Ranks(2)
    first, second = two.call(2, called_by_one)
    two.stop()
    assert second.error == "EOFError"
    assert first.error == "RuntimeError" and first.text.startswith("group: the exchange with the ")
    assert "output of the other ranks" in first.text


def called_wrongly(group: dist.ProcessGroup, what: str) -> Any:
    student, teacher, labels = logits()
    mesh = DeviceMesh.from_group(group, "cpu")
    placements: list[Any] = [Shard(1)]
    (hidden, weight, _), (hidden_t, weight_t, _), _ = projections()
    if what == "no group":
        return adaptive_kl(student, teacher, group="nobody")
    if what == "another's group":
        return adaptive_kl(student, teacher, group=cast(Any, dist.GroupMember.NON_GROUP_MEMBER))
    if what == "no type of group":
        return adaptive_kl(student, teacher, group=cast(Any, group.size()))
    if what == "rows of weights":
        of = distribute_tensor(weight, mesh, [Shard(1)])
        return linear_distillation_loss(hidden, of, hidden_t, weight_t, labels)
    if what == "plain weight":
        of = distribute_tensor(weight_t, mesh, [Shard(0)])
        return linear_distillation_loss(hidden, weight, hidden_t, of, labels)
    if what == "whole weight of the teacher":
        own = distribute_tensor(weight, mesh, [Shard(0)])
        whole = distribute_tensor(weight_t, mesh, [Replicate()])
        return linear_distillation_loss(hidden, own, hidden_t, whole, labels)
    if what == "two dimensions":
        mesh = init_device_mesh("cpu", (2, 2))
        placements = [Shard(1), Shard(1)]
    of_student: Tensor = distribute_tensor(student, mesh, placements)
    of_teacher: Tensor = distribute_tensor(teacher, mesh, placements)
    options: dict[str, Any] = {}
    if what == "plain teacher":
        of_teacher = teacher
    elif what == "plain student":
        of_student = student
    elif what == "replicated teacher":
        of_teacher = distribute_tensor(teacher, mesh, [Replicate()])
    elif what == "partial":
        of_student = DTensor.from_local(student, mesh, [Partial()])
        of_teacher = DTensor.from_local(teacher, mesh, [Partial()])
    elif what == "group as well":
        options["group"] = group
    elif what == "mean of some tokens":
        of_student, of_teacher = (
            distribute_tensor(x, mesh, [Shard(0)]) for x in (student, teacher)
        )
    return distillation_loss(of_student, of_teacher, **options)


@pytest.mark.parametrize(
    "what, error, message",
    [
        ("no group", "ValueError", "group: expected a process group or the name of one, got 'n"),
        ("another's group", "TypeError", "group: expected a torch.distributed.ProcessGroup or th"),
        ("no type of group", "TypeError", "group: expected a torch.distributed.ProcessGroup or "),
        ("rows of weights", "ValueError", "student_weight: expected Shard(0), of the vocabulary"),
        ("plain weight", "TypeError", "student_weight: expected a DTensor, as teacher_weight is"),
        ("whole weight of the teacher", "ValueError", "teacher_weight: expected the mesh dimensi"),
        ("two dimensions", "ValueError", "student_logits: expected one mesh dimension that shard"),
        ("plain teacher", "ValueError", "teacher: expected shards of the same columns of the voc"),
        ("plain student", "TypeError", "student_logits: expected a DTensor, as teacher_logits is"),
        ("replicated teacher", "ValueError", "teacher_logits: expected the mesh and placements o"),
        ("partial", "ValueError", "student_logits: expected Shard or Replicate in each mesh dime"),
        ("group as well", "ValueError", "group: expected None with DTensors, which bring theirs "),
        ("mean of some tokens", "ValueError", "num_items: expected the number of tokens of all "),
    ],
)
def test_what_is_refused(ranks: Ranks, what: str, error: str, message: str) -> None:
    for result in ranks.call(4, called_wrongly, what):
        assert isinstance(result, Failed), result
        assert result.error == error and result.text.startswith(message), result.text


class Alone:
    """A group of one process, for what its operators do."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def test_products_are_made_while_messages_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, _), (hidden_t, weight_t, _), _ = projections()
    expected = linear_distillation_loss(
        hidden, weight, hidden_t, weight_t, divergence=ForwardKL(), reduction="sum"
    )
    events: list[str] = []
    project = linear_ops._project

    def all_gather(message: Tensor, group: str) -> Callable[[], Tensor]:
        events.append("sent")

        def arrived() -> Tensor:
            events.append("arrived")
            return message[None]

        return arrived

    def projected(*inputs: Any, **out: Any) -> None:
        events.append("product")
        project(*inputs, **out)

    monkeypatch.setattr(exchange, "all_gather", all_gather)
    monkeypatch.setattr(exchange, "group_of", lambda name: Alone())
    monkeypatch.setattr(linear_ops, "_project", projected)
    fp32 = torch.float32
    plan = linear_ops.Plan(fp32, fp32, fp32, 14 * 8 * V, True, True, False, "torch", "of one")
    sides = linear_ops.Sides(hidden, weight, None, hidden_t, weight_t, None)
    widths = torch.tensor([[V, V]])
    loss, *_ = linear_ops.linear_divergence(
        False, False, *sides, None, None, widths, torch.ones(()), *plan, *Rule(ForwardKL()).pack()
    )
    torch.testing.assert_close(loss, expected)
    # Of 4 chunks of 7 tokens, but for the first and the last: both products of the next one.
    both = ["product", "product"]
    assert events == [*both, "sent", *[*both, "sent", "arrived"] * 3, "arrived"]
