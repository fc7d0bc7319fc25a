"""`python -m bench vocabulary_parallel`: losses of logits that are sharded over the vocabulary.

Real processes, a rank each, hold equal parts of the columns of real logits
(bench/inputs/real_logits.py) and talk by Gloo. Each calls backward on the loss that it got. Value
and gradient are compared with those of one process that has all columns, in float64; what is sent
is what the ranks hand to their collectives (bench/lab/collectives.py).
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from akl_triton.cli.bench import no_native_stderr
from akl_triton.reference import reference_adaptive_kl, reference_cross_entropy
from akl_triton.verify import EPSILON, YARDSTICK
from bench.inputs.real_logits import real_logits
from bench.inputs.shard_peers import LEFT_OUT, SHARD_PEERS, TOP_K, ShardPeer
from bench.lab.collectives import record_collectives
from bench.questions import Unanswerable
from bench.report.tables import table

HEADINGS = {
    "adaptive_kl": "Adaptive KL",
    "forward_kl": "Forward KL",
    "top_k_forward_kl": f"Forward KL of the teacher's {TOP_K:,} most probable tokens, renormalised",
    "cross_entropy": "Cross-entropy with labels",
}
# Logits of student and teacher, labels, and by name of a loss its value and gradient in float64.
Problem = tuple[Tensor, Tensor, Tensor, dict[str, tuple[float, Tensor]]]
# A rank whose peer has failed is not waited for any longer.
PATIENCE = datetime.timedelta(minutes=2)


def collect(
    rows: int = 64,
    ranks: Sequence[int] = (2, 4),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """The errors and the collectives of every loss, on so many ranks."""
    for peer in SHARD_PEERS:
        if (obstacle := peer.obstacle()) is not None:
            raise Unanswerable(obstacle)
    student, teacher = real_logits(rows)
    return measured(SHARD_PEERS, student, teacher, ranks, dtypes)


def measured(
    peers: Sequence[ShardPeer],
    student: Tensor,
    teacher: Tensor,
    ranks: Sequence[int],
    dtypes: Sequence[str],
) -> dict[str, Any]:
    """A case for every peer, number of ranks and dtype. The labels are drawn from the teacher."""
    for world in ranks:
        if student.shape[1] % world:
            raise ValueError(f"ranks: V = {student.shape[1]} is no multiple of {world}")
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(teacher.softmax(-1), 1, generator=generator).squeeze(1)
    problems: list[Problem] = []
    whole = []
    for dtype in dtypes:
        logits = student.to(getattr(torch, dtype)), teacher.to(getattr(torch, dtype))
        computed: list[str] = list(dict.fromkeys(peer.computes for peer in peers))
        exact = {name: oracle(name, *logits, labels, torch.float64) for name in computed}
        problems.append((*logits, labels, exact))
        for name in computed:
            value, gradient = oracle(name, *logits, labels, torch.float32)
            errors = compared(value, gradient.to(logits[0].dtype), exact[name])
            whole.append({"computes": name, "dtype": dtype, **errors})
    cases = [
        {
            "name": peer.name,
            "package": f"{peer.package} {peer.version}",
            "is_ours": peer.is_ours,
            "remark": peer.remark,
            "computes": peer.computes,
            "dtype": dtype,
            "ranks": [of_rank[i][j] for of_rank in of_ranks],
        }
        for of_ranks in [on_ranks(peers, problems, world) for world in ranks]
        for i, dtype in enumerate(dtypes)
        for j, peer in enumerate(peers)
    ]
    return {
        "rows": len(student),
        "vocabulary": student.shape[1],
        "left_out": LEFT_OUT,
        "whole": whole,
        "cases": cases,
    }


# ---------------------------------------------------------------- on one process, and on many


def oracle(
    computes: str, student: Tensor, teacher: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor]:
    """The sum over the rows and its gradient, of all columns, computed in this dtype."""
    if computes == "cross_entropy":
        of_labels = reference_cross_entropy(student, labels, dtype=dtype)
        return of_labels.loss.sum().item(), of_labels.grad
    if computes == "top_k_forward_kl":
        top, ids = teacher.topk(TOP_K)
        value, of_top = oracle("forward_kl", student.gather(1, ids), top, labels, dtype)
        return value, torch.zeros_like(student, dtype=dtype).scatter(1, ids, of_top)
    weight = {"adaptive_kl": None, "forward_kl": 1.0}[computes]
    result = reference_adaptive_kl(student, teacher, weight=weight, dtype=dtype)
    return result.loss.sum().item(), result.grad


def compared(
    value: float,
    gradient: Tensor,
    exact: tuple[float, Tensor],
    columns: slice = slice(None),
) -> dict[str, float]:
    """Distances from float64: that of the value, relative to it; the largest of the gradient of
    these columns, relative to the largest entry of all; and the factor by which that gradient is
    too large, by least squares."""
    exact_value, exact_gradient = exact
    own, gradient = exact_gradient[:, columns], gradient.double()
    return {
        "value_error": abs(value - exact_value) / abs(exact_value),
        "gradient_error": float((gradient - own).abs().max() / exact_gradient.abs().max()),
        "factor": float((gradient * own).sum() / own.square().sum()),
    }


def on_ranks(
    peers: Sequence[ShardPeer], problems: Sequence[Problem], world: int
) -> list[list[list[dict[str, Any]]]]:
    """What every rank finds, of every problem, of every peer."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool,
    ):
        torch.save(problems, Path(folder, "problems.pt"))
        return list(pool.map(functools.partial(_on_rank, peers, folder, world), range(world)))


def _on_rank(
    peers: Sequence[ShardPeer], folder: str, world: int, rank: int
) -> list[list[dict[str, Any]]]:
    torch.set_num_threads(1)
    problems: list[Problem] = torch.load(Path(folder, "problems.pt"), mmap=True)
    dist.init_process_group(
        *("gloo", f"file://{folder}/ranks", PATIENCE), rank=rank, world_size=world
    )
    try:
        return [[_of_peer(peer, problem, world, rank) for peer in peers] for problem in problems]
    finally:
        dist.destroy_process_group()


def _of_peer(peer: ShardPeer, problem: Problem, world: int, rank: int) -> dict[str, Any]:
    student, teacher, labels, exact = problem
    width = student.shape[1] // world
    columns = slice(rank * width, (rank + 1) * width)
    group = dist.group.WORLD
    assert group is not None
    with peer.context(), no_native_stderr():
        for _ in range(2):  # the first time, groups are made, and that takes collectives, too
            own = student[:, columns].clone().requires_grad_()
            others = teacher[:, columns].clone(), labels, group
            with record_collectives() as forward:
                loss = peer.loss(own, *others)
            with record_collectives() as backward:
                loss.backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    return {
        **compared(loss.item(), own.grad, exact[peer.computes], columns),
        "forward": [collective.name for collective in forward],
        "backward": [collective.name for collective in backward],
        "bytes": sum(collective.bytes for collective in forward + backward),
        "overwrites": not torch.equal(own, student[:, columns]),
    }


# ---------------------------------------------------------------- what it comes to


def is_right(case: dict[str, Any], data: dict[str, Any]) -> bool:
    """Whether value and gradient of every rank are no further from float64 than YARDSTICK times the
    error of fp32 in one process, whose gradient is rounded to the same dtype, plus EPSILON."""
    yardstick = _whole(data, case["computes"], case["dtype"])
    return all(
        rank[error] <= YARDSTICK * yardstick[error] + EPSILON
        for rank in case["ranks"]
        for error in ("value_error", "gradient_error")
    )


def _whole(data: dict[str, Any], computes: str, dtype: str) -> dict[str, Any]:
    (found,) = (x for x in data["whole"] if (x["computes"], x["dtype"]) == (computes, dtype))
    return dict(found)


def markdown(data: dict[str, Any]) -> str:
    parts = [
        f"{data['rows']} tokens, V = {data['vocabulary']:,}, of SmolLM2-135M and a shallow copy of "
        "it; each rank holds V / ranks columns, and calls backward on its own loss, the sum over "
        "the tokens. Errors are those of the worst rank, distances from float64 in one process: of "
        "the value, relative to it, and the largest of the gradient, relative to its largest "
        'entry. "Times" is the factor by which the gradient of the worst rank is too large. A loss '
        "is right if, on every rank, both errors are at most "
        f"{YARDSTICK:g} times those of fp32 formulas in one process, plus {EPSILON:g}. What is "
        "sent are the tensors that a rank hands to Gloo, in bytes a token. The peers are installed "
        "as `bench/inputs/shard_peers.py` says, and nothing in them is patched.",
    ]
    for computes, heading in HEADINGS.items():
        rows = list(_rows(data, computes))
        if rows:
            parts += [f"### {heading}", table(_HEAD, rows, texts=3)]
    remarks = {case["name"]: case["remark"] for case in data["cases"] if case["remark"]}
    overwriting = dict.fromkeys(
        f"{case['name']} ({case['dtype']})"
        for case in data["cases"]
        if any(rank["overwrites"] for rank in case["ranks"])
    )
    parts.append("\n".join(f"- {name}: {remark}." for name, remark in remarks.items()))
    if overwriting:
        parts.append(f"The logits that they are given are overwritten by {', '.join(overwriting)}.")
    left_out = "; ".join(f"{name} {why}" for name, why in data["left_out"].items())
    parts.append(f"Not measured: {left_out}.")
    return "\n\n".join(parts)


_HEAD = (
    *("loss", "of", "logits", "ranks", "value", "gradient", "times", "right"),
    *("forward", "backward", "bytes"),
)


def _rows(data: dict[str, Any], computes: str) -> Iterator[tuple[str, ...]]:
    for case in data["whole"]:
        if case["computes"] == computes:
            errors = _errors([case])
            yield ("fp32 formulas", "", case["dtype"], "1", *errors, "", *("none",) * 2, "0")
    for case in data["cases"]:
        if case["computes"] == computes:
            yield (
                *(case["name"], case["package"], case["dtype"], str(len(case["ranks"]))),
                *_errors(case["ranks"]),
                "yes" if is_right(case, data) else "no",
                *(_counted(case["ranks"][0][phase]) for phase in ("forward", "backward")),
                f"{max(rank['bytes'] for rank in case['ranks']) / data['rows']:,.0f}",
            )


def _errors(ranks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Those of the worst rank."""
    for error in ("value_error", "gradient_error"):
        yield f"{max(rank[error] for rank in ranks):.1e}"
    yield f"{max((rank['factor'] for rank in ranks), key=lambda factor: abs(factor - 1)):.3f}"


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "none"


def failures(data: dict[str, Any]) -> list[str]:
    """Losses of ours that are not right."""
    return [
        f"{case['name']} of {case['dtype']} logits on {len(case['ranks'])} ranks is not right"
        for case in data["cases"]
        if case["is_ours"] and not is_right(case, data)
    ]
