"""A row of packed documents that is cut over ranks: the labels are shifted before the cut.

torchrun --nproc-per-node 2 examples/context_parallel.py     (gloo on a CPU, seconds)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from akl_triton import adaptive_kl


def next_labels(labels: Tensor, position_ids: Tensor) -> Tensor:
    """[B, L]: at each position the label of the next one, -100 where a document ends."""
    labels = labels.masked_fill(position_ids == 0, -100)  # nothing predicts a first token
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def shard(x: Tensor, rank: int, ranks: int) -> Tensor:
    """[B, L, ...] -> [B, L / ranks, ...]: an early and a late part of every row.

    Under a causal mask late positions cost more than early ones; cut so, all ranks do equal work.
    """
    parts = x.chunk(2 * ranks, dim=1)
    return torch.cat([parts[rank], parts[-1 - rank]], dim=1)


def loss_of_shard(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """What this rank adds to the mean over all tokens; `labels` are a shard of `next_labels`."""
    num_items = (labels != -100).sum()
    dist.all_reduce(num_items)
    return adaptive_kl(student_logits, teacher_logits, labels, num_items=num_items)


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # one batch, of which every rank takes its shard
    hidden = torch.randn(2, 8 * ranks, 16)
    weight = torch.randn(100, 16, requires_grad=True)  # the student's lm_head, whole on every rank
    teacher_logits = 4.0 * torch.randn(2, 8 * ranks, 100)
    labels = torch.randint(100, (2, 8 * ranks))
    labels[0, :7] = -100  # a prompt
    position_ids = torch.cat([torch.arange(3), torch.arange(8 * ranks - 3)]).expand(2, -1)

    targets = next_labels(labels, position_ids)
    whole = adaptive_kl(hidden @ weight.T, teacher_logits, targets)
    (expected,) = torch.autograd.grad(whole, weight)

    here, there, ours, cut = (
        shard(x, rank, ranks) for x in (hidden, teacher_logits, targets, labels)
    )
    ways = {
        "shifted before the cut": loss_of_shard(here @ weight.T, there, ours),
        "shifted after the cut": adaptive_kl(here @ weight.T, there, cut, shift=1) / ranks,
    }
    for name, loss in ways.items():
        (gradient,) = torch.autograd.grad(loss, weight)
        total = loss.detach()
        dist.all_reduce(total)
        dist.all_reduce(gradient)
        error = float((gradient - expected).norm() / expected.norm())
        if rank == 0:
            print(f"{name}: loss {total:.4f} of {whole:.4f}, gradient off by {error:.1e} of it")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
