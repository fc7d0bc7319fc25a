"""The question about losses of shards, asked on two ranks about losses whose faults are known."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from akl_triton.reference import reference_cross_entropy
from bench.inputs.shard_peers import SHARD_PEERS, ShardPeer
from bench.questions import Unanswerable, vocabulary_parallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

N, V, RANKS = 6, 40, 2


class OfAllColumns(torch.autograd.Function):
    """Cross-entropy of all columns, which every rank gathers; the gradient of its own ones is
    multiplied by a factor."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, labels: Tensor, group: dist.ProcessGroup, factor: float
    ) -> Tensor:
        parts = [torch.empty_like(student) for _ in range(group.size())]
        dist.all_gather(parts, student, group=group)
        found = reference_cross_entropy(torch.cat(parts, 1), labels, dtype=torch.float32)
        ctx.gradient = factor * found.grad.chunk(group.size(), dim=1)[group.rank()]
        return found.loss.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream * ctx.gradient, None, None, None


def gathered(
    student: Tensor, teacher: Tensor, labels: Tensor, group: dist.ProcessGroup, *, fault: str
) -> Tensor:
    last = group.rank() == group.size() - 1
    factors = {"none": 1.0, "times the ranks": float(group.size()), "one rank": 1.0 + 0.01 * last}
    if fault == "value" and last:
        return gathered(student, teacher, labels, group, fault="none") + 0.01
    loss: Tensor = OfAllColumns.apply(student, labels, group, factors.get(fault, 1.0))
    return loss


FAULTS = ("none", "times the ranks", "one rank", "value")
PEERS = [
    *(
        ShardPeer(fault, "akl-triton", "cross_entropy", functools.partial(gathered, fault=fault))
        for fault in FAULTS
    ),
    *(peer for peer in SHARD_PEERS if peer.package == "torch"),
]


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    student, teacher = 2 * torch.randn(2, N, V, generator=torch.Generator().manual_seed(0))
    data = vocabulary_parallel.measured(PEERS, student, teacher, [RANKS], ["float32"])
    stored: dict[str, Any] = json.loads(json.dumps(data))
    return stored


def case_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    (case,) = (case for case in data["cases"] if case["name"] == name)
    return dict(case)


def test_a_gradient_that_is_wrong_by_a_factor_is_noticed(answer: dict[str, Any]) -> None:
    for rank in case_of(answer, "times the ranks")["ranks"]:
        assert rank["factor"] == pytest.approx(RANKS, rel=1e-5)
        assert 0.5 < rank["gradient_error"] <= 1.001
        assert rank["value_error"] < 1e-6
    right, wrong = (rank["factor"] for rank in case_of(answer, "one rank")["ranks"])
    assert right == pytest.approx(1.0, rel=1e-5) and wrong == pytest.approx(1.01, rel=1e-5)


def test_whoever_is_wrong_on_one_rank_is_not_right(answer: dict[str, Any]) -> None:
    right = {case["name"]: vocabulary_parallel.is_right(case, answer) for case in answer["cases"]}
    assert right.pop("PyTorch loss_parallel")
    assert right == {fault: fault == "none" for fault in FAULTS}
    assert [line.split(" of ")[0] for line in vocabulary_parallel.failures(answer)] == [*FAULTS[1:]]


def test_a_peer_that_is_wrong_is_no_failure_and_nan_is_not_right(answer: dict[str, Any]) -> None:
    data = copy.deepcopy(answer)
    for case in data["cases"]:
        case["is_ours"] = case["name"] == "none"
    assert vocabulary_parallel.failures(data) == []
    case_of(data, "none")["ranks"][1]["gradient_error"] = float("nan")
    assert vocabulary_parallel.failures(data) == ["none of float32 logits on 2 ranks is not right"]


def test_what_is_sent_is_counted_on_every_rank(answer: dict[str, Any]) -> None:
    for rank in case_of(answer, "none")["ranks"]:
        assert (rank["forward"], rank["backward"]) == (["all_gather"], [])
        assert rank["bytes"] == 4 * N * V // RANKS
    for rank in case_of(answer, "PyTorch loss_parallel")["ranks"]:
        assert (rank["forward"], rank["backward"]) == (["all_reduce"] * 3, [])
        assert rank["bytes"] == 3 * 4 * N


def test_the_answer_has_a_line_for_each_case(answer: dict[str, Any]) -> None:
    lines = vocabulary_parallel.markdown(answer).splitlines()
    (line,) = (line for line in lines if line.startswith("| times the ranks |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3:5] == ["float32", "2"] and cells[7:12] == [
        *("2.000", "no", "1 all_gather", "none", f"{4 * V // RANKS}")
    ]
    for case in answer["cases"]:
        assert sum(line.startswith(f"| {case['name']} |") for line in lines) == 1


def test_an_overwritten_tensor_is_named(answer: dict[str, Any]) -> None:
    assert not any(rank["overwrites"] for case in answer["cases"] for rank in case["ranks"])
    assert "overwritten" not in vocabulary_parallel.markdown(answer)
    data = copy.deepcopy(answer)
    case_of(data, "none")["ranks"][1]["overwrites"] = True
    assert "overwritten by none (float32)." in vocabulary_parallel.markdown(data)


def test_the_most_probable_are_a_forward_kl_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_parallel, "TOP_K", 3)
    student, teacher = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    leaf = student.clone().requires_grad_()
    log_p, log_q = (x.gather(1, teacher.topk(3).indices).log_softmax(1) for x in (teacher, leaf))
    (log_p.exp() * (log_p - log_q)).sum().backward()
    labels = torch.zeros(2, dtype=torch.long)
    _, gradient = vocabulary_parallel.oracle(
        "top_k_forward_kl", student, teacher, labels, torch.float64
    )
    torch.testing.assert_close(gradient, leaf.grad)


def test_an_uneven_share_is_refused() -> None:
    logits = torch.zeros(1, 9)
    with pytest.raises(ValueError, match="ranks: V = 9 is no multiple of 2"):
        vocabulary_parallel.measured(PEERS, logits, logits, [2], ["float32"])


def test_every_loss_has_a_heading_and_a_name_of_its_own() -> None:
    assert {peer.computes for peer in SHARD_PEERS} == vocabulary_parallel.HEADINGS.keys()
    assert len({peer.name for peer in SHARD_PEERS}) == len(SHARD_PEERS)


def test_another_version_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.inputs import shard_peers

    monkeypatch.setattr(shard_peers, "version_obstacle", lambda package: f"another {package}")
    with pytest.raises(Unanswerable, match="another"):
        vocabulary_parallel.collect()
