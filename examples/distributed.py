"""Several processes, each with batches of its own: DistributedDataParallel or FSDP2.

torchrun --nproc-per-node 2 examples/distributed.py --strategy ddp
torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2

(gloo on a CPU, some minutes; nccl where there are GPUs)
"""

from __future__ import annotations

import argparse
import os
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from akl_triton.cli.smollm2 import forward_kl_of, load_teacher, read_text, shallow_copy
from akl_triton.integrations import distillation_loss_of_models


def wrapped(student: Any, strategy: str) -> Any:
    if strategy == "ddp":
        return DistributedDataParallel(student)
    for layer in student.model.layers:
        fully_shard(layer)
    return fully_shard(student)


def main(steps: int, strategy: str) -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    teacher, tokenizer = load_teacher()
    student = wrapped(shallow_copy(teacher).to(device), strategy)
    teacher.to(device)  # may be sharded likewise
    # Before any forward, after which FSDP2 may leave whole parameters in place of the shards.
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    train, held_out = read_text(tokenizer)  # [sequences, 128]
    exam = {"input_ids": held_out}
    before = forward_kl_of(student, teacher, exam)

    loader = DataLoader(train, batch_size=2, sampler=DistributedSampler(train, seed=0))
    for batch in islice(loader, steps):
        input_ids = batch.to(device)
        # Gradients are averaged over the processes: the tokens of all of them, divided by their
        # number. Without num_items each process takes the mean over its own tokens.
        tokens = torch.tensor(input_ids[:, 1:].numel(), device=device)
        dist.all_reduce(tokens)
        loss = distillation_loss_of_models(
            student, teacher, {"input_ids": input_ids}, num_items=tokens / processes
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    after = forward_kl_of(student, teacher, exam)
    if rank == 0:
        print(f"held out, before: forward KL {before:.4f}")
        print(f"held out, after:  forward KL {after:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.strategy)
