"""Losses of tensor-parallel lm_heads: each rank has a part of the vocabulary, of every token.

torchrun --nproc-per-node 2 examples/vocabulary_parallel.py     (gloo on a CPU, seconds)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from akl_triton import adaptive_kl, linear_adaptive_kl


def loss_of_columns(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Of plain tensors [B, L, V / tp], the columns that this rank has."""
    return adaptive_kl(student_logits, teacher_logits, labels, shift=1, group=group)


def loss_of_dtensors(student_logits: DTensor, teacher_logits: DTensor, labels: Tensor) -> Tensor:
    """Of DTensors [B, L, V] with Shard(-1), which know the group."""
    return adaptive_kl(student_logits, teacher_logits, labels, shift=1)


def loss_of_hidden_states(
    student_hidden: Tensor,
    student_head: nn.Linear,
    teacher_hidden: Tensor,
    teacher_head: nn.Linear,
    labels: Tensor,
) -> Tensor:
    """Of weights that are DTensors [V, H] with Shard(0), without the logits of all tokens."""
    heads = student_head.weight, teacher_head.weight
    return linear_adaptive_kl(student_hidden, heads[0], teacher_hidden, heads[1], labels, shift=1)


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # tensor-parallel ranks have the same tokens
    vocabulary = 50 * ranks - 3  # the last rank has fewer columns
    hidden, teacher_hidden = torch.randn(2, 8, 16), torch.randn(2, 8, 24)
    labels = torch.randint(vocabulary, (2, 8))
    student, teacher = (nn.Linear(size, vocabulary, bias=False) for size in (16, 24))
    teacher.requires_grad_(False)

    whole = adaptive_kl(student(hidden), teacher(teacher_hidden), labels, shift=1)
    (expected,) = torch.autograd.grad(whole, student.weight)

    mesh = init_device_mesh("cpu", (ranks,))
    for head in (student, teacher):
        style = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(head, mesh, style)
    logits, teacher_logits = student(hidden), teacher(teacher_hidden)
    losses = {
        "columns": loss_of_columns(
            logits.to_local(), teacher_logits.to_local(), labels, mesh.get_group()
        ),
        "DTensors": loss_of_dtensors(logits, teacher_logits, labels),
        "hidden states": loss_of_hidden_states(hidden, student, teacher_hidden, teacher, labels),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, student.weight, retain_graph=True)
        error = (gradient.full_tensor() - expected).norm() / expected.norm()
        if rank == 0:
            print(f"{name}: loss {loss:.4f} of {whole:.4f}, gradient off by {error:.1e} of it")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
