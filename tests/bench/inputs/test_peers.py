"""The table of peers: each computes the loss that it names, or says why it cannot."""

from __future__ import annotations

import importlib.metadata
import os

import pytest
import torch
from torch import Tensor

from akl_triton.reference import reference_adaptive_kl
from bench.inputs import peers
from bench.inputs.peers import PEERS, Peer
from bench.lab import ptxcpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the peers' kernels are compiled"
)
# Ours has its own tests, and compiling it takes a minute.
MEASURED = [peer for peer in PEERS if not peer.is_ours and peer.kind != "compiled"]


def logits() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    return 2 * student, 2 * teacher


def expected(peer: Peer, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient, by the float64 oracle or, for the JSD, by its formula."""
    if peer.computes == "jsd":
        s = student.double().requires_grad_()
        log_p, log_q = teacher.double().log_softmax(-1), s.log_softmax(-1)
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        both = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
        loss = both.sum(-1).mean() / 2
        return loss.detach(), torch.autograd.grad(loss, s)[0]
    weight = {"adaptive_kl": None, "forward_kl": 1.0, "reverse_kl": 0.0}[peer.computes]
    oracle = reference_adaptive_kl(student, teacher, weight=weight)
    return oracle.loss.mean(), oracle.grad / len(student)


@pytest.mark.parametrize("peer", MEASURED, ids=lambda peer: peer.name)
def test_a_peer_computes_what_it_says(peer: Peer) -> None:
    student, teacher = logits()
    with ptxcpu.active(arch=90):
        if obstacle := peer.obstacle("cpu"):
            pytest.skip(obstacle)
        leaf = student.clone().requires_grad_()
        loss = peer.loss(leaf, teacher)
        loss.backward()
    assert loss.shape == ()
    expected_loss, gradient = expected(peer, student, teacher)
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=1e-5, atol=0)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-3, atol=1e-8)


def test_compiled_rows_are_the_eager_ones_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_compiled", lambda loss: lambda s, t: 2 * loss(s, t))
    eager = {peer.computes: peer for peer in PEERS if peer.kind == "eager"}
    for peer in PEERS:
        if peer.kind == "compiled":
            pair = logits()
            assert peer.loss(*pair) == 2 * eager[peer.computes].loss(*pair)


def test_every_name_is_once_in_the_table_and_ours_has_each_like() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert {peer.computes for peer in PEERS} - {"jsd"} == {p.computes for p in PEERS if p.is_ours}


@pytest.mark.parametrize("installed", ["0.0.1", None])
def test_another_version_is_an_obstacle(
    installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    (liger, *_) = (peer for peer in PEERS if peer.package == "liger-kernel")
    with ptxcpu.active(arch=90):
        obstacle = liger.obstacle("cpu")
        assert obstacle is not None
        assert "liger-kernel 0.8.5" in obstacle and (installed or "none") in obstacle
        assert liger not in peers.runnable("cpu")


def test_tiles_are_no_wider_than_the_row() -> None:
    assert peers.speculators_tile(151_936) == (8_192, 8)
    assert peers.speculators_tile(32_000) == (16_384, 16)
    assert peers.speculators_tile(1_000)[0] == 1_024
