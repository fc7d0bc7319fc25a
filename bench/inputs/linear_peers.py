"""Ways to compute a mean loss from hidden states: ours, and the chunked losses of others.

A loss is called with the hidden states and the lm_head's weight of the student, then those of the
teacher, in the order of `HiddenStates`. Peers are optional; their versions are those of
`bench.inputs.peers.VERSIONS`:

    pip install liger-kernel==0.8.5 trl==1.16.0
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from akl_triton import adaptive_kl, linear_adaptive_kl, linear_forward_kl
from akl_triton.reference import authors_adaptive_kl
from bench.inputs.peers import OURS, version_obstacle

PEER_CHUNK = 1024  # tokens: Liger's default

LinearLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LinearPeer:
    """One way to compute a loss from hidden states."""

    name: str
    package: str  # the distribution it comes from
    computes: str
    loss: LinearLoss
    remark: str = ""

    def obstacle(self) -> str | None:
        """The reason why it is not measured here; None if it is."""
        return version_obstacle(self.package)


def authors(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Tensor:
    """The authors' code on all logits."""
    return authors_adaptive_kl(
        F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight)
    )


def adaptive_kl_of_all_logits(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    **options: Any,
) -> Tensor:
    """What one does without a fused loss: all logits exist, and the gradient overwrites the
    student's."""
    student = F.linear(student_hidden, student_weight)
    teacher = F.linear(teacher_hidden, teacher_weight)
    loss: Tensor = adaptive_kl(student, teacher, inplace=True, **options)
    return loss


def _checkpointed(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    rows: int,
) -> Tensor:
    """The authors' computation, chunk by chunk, each computed again in the backward pass."""

    def of_chunk(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        return authors(h, w, ht, wt) * len(h)

    both = (torch.split(hidden, rows) for hidden in (student_hidden, teacher_hidden))
    losses: list[Tensor] = [
        checkpoint(of_chunk, h, student_weight, ht, teacher_weight, use_reentrant=False)
        for h, ht in zip(*both, strict=True)
    ]
    return torch.stack(losses).sum() / len(student_hidden)


def _liger(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        compiled=student_hidden.is_cuda,
        chunk_size=PEER_CHUNK,
    )
    labels = torch.zeros(len(student_hidden), dtype=torch.long, device=student_hidden.device)
    loss: Tensor = loss_function(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels
    )
    return loss


def _trl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float,
) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, beta
    )
    loss: Tensor = divergence.mean()
    return loss


def linear_peers(chunk_rows: int) -> list[LinearPeer]:
    """All of these ways; `chunk_rows` is the chunk of the authors' code under checkpointing."""
    on_cpu = "" if torch.cuda.is_available() else "on a CPU without its torch.compile"
    tiles = "" if torch.cuda.is_available() else "on a CPU its tiles are folded by PyTorch"
    return [
        LinearPeer("linear_adaptive_kl", OURS, "AKL", linear_adaptive_kl),
        LinearPeer("linear_forward_kl", OURS, "forward KL", linear_forward_kl),
        LinearPeer("adaptive_kl of all logits, in place", OURS, "AKL", adaptive_kl_of_all_logits),
        LinearPeer(
            f"authors' code under checkpointing, {chunk_rows} tokens a chunk",
            "torch",
            "AKL",
            functools.partial(_checkpointed, rows=chunk_rows),
        ),
        LinearPeer(
            f"Liger LigerFusedLinearJSDLoss(beta=0), {PEER_CHUNK} tokens a chunk",
            "liger-kernel",
            "forward KL",
            functools.partial(_liger, beta=0.0),
            on_cpu,
        ),
        LinearPeer(
            f"Liger LigerFusedLinearJSDLoss(beta=0.5), {PEER_CHUNK} tokens a chunk",
            "liger-kernel",
            "Jensen-Shannon",
            functools.partial(_liger, beta=0.5),
            on_cpu,
        ),
        LinearPeer(
            "TRL ChunkedDivergenceFunction(beta=0), tiles of 4,096 x 32,768",
            "trl",
            "forward KL",
            functools.partial(_trl, beta=0.0),
            tiles,
        ),
    ]
