"""Logits whose vocabulary is cut over ranks, as a tensor-parallel lm_head makes them.

torchrun --nproc-per-node 2 examples/vocabulary_shards.py     (gloo on a CPU, seconds)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from akl_triton import adaptive_kl


class AllToAll(torch.autograd.Function):
    """Sends a part of a flat tensor to every rank; its gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.back = receive, send, group
        received = flat.new_empty(sum(receive))
        dist.all_to_all_single(received, flat.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return AllToAll.apply(gradient, *ctx.back), None, None, None


def whole_rows(logits: Tensor, group: Any = None) -> Tensor:
    """[N, V / tp], some columns of all rows -> [N / tp, V], all columns of some rows.

    Each rank has equally many columns, for which a vocabulary is padded, but not rows.
    """
    ranks, width = dist.get_world_size(group), logits.shape[1]
    rows = [len(part) for part in logits.tensor_split(ranks)]
    mine = rows[dist.get_rank(group)]
    received = AllToAll.apply(
        logits.flatten(), [n * width for n in rows], [mine * width] * ranks, group
    )
    return received.view(ranks, mine, width).transpose(0, 1).reshape(mine, ranks * width)


def of_my_rows(of_tokens: Tensor, group: Any = None) -> Tensor:
    """[N] -> [N / tp], the labels, mask or token weights of `whole_rows`."""
    return of_tokens.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]


def loss_of_rows(student: Tensor, teacher: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """What this rank adds to the mean over all N tokens, of logits that are [N, V / tp]."""
    return adaptive_kl(
        whole_rows(student),
        whole_rows(teacher),
        of_my_rows(labels),
        num_items=(labels != -100).sum(),  # of all rows: labels are whole on every rank
        vocab_size=vocab_size,  # without the padding
        inplace=True,  # the rows are a copy already, which the gradient may replace
    )


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same logits everywhere, of which every rank takes its columns
    vocab_size, padded = 50 * ranks - 3, 50 * ranks
    student, teacher = 4.0 * torch.randn(2, 2 * ranks + 1, padded)
    labels = torch.randint(vocab_size, (2 * ranks + 1,))
    labels[0] = -100

    student.requires_grad_()
    whole = adaptive_kl(student, teacher, labels, vocab_size=vocab_size)
    (expected,) = torch.autograd.grad(whole, student)

    my_student, my_teacher, my_expected = (
        x.detach().chunk(ranks, dim=1)[rank] for x in (student, teacher, expected)
    )
    my_student.requires_grad_()
    loss = loss_of_rows(my_student, my_teacher, labels, vocab_size)
    (gradient,) = torch.autograd.grad(loss, my_student)
    error = (gradient - my_expected).norm() / my_expected.norm()
    total = loss.detach()
    dist.all_reduce(total)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"loss {total:.4f} of {whole:.4f}, gradients off by {float(error):.1e} of them")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
