"""Student and teacher are tensor parallel: each process has some rows of the lm_heads.

torchrun --nproc-per-node 2 examples/tensor_parallel.py     (gloo on a CPU, some minutes)
"""

from __future__ import annotations

import argparse
import os
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from akl_triton.cli.smollm2 import forward_kl_of, load_teacher, read_text, shallow_copy
from akl_triton.integrations import distillation_loss_of_models

# SmolLM2 has 9 heads of attention, which two processes cannot share equally.
PLAN = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}


def parallel(model: Any, mesh: DeviceMesh) -> Any:
    parallelize_module(model, mesh, PLAN)
    # The weight of the head is that of the embeddings: parallelize_module has parted them.
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def main(steps: int) -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))

    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher).to(device)
    teacher.to(device)
    train, held_out = read_text(tokenizer)  # [sequences, 128], the same in every process
    exam = {"input_ids": held_out}
    alone = forward_kl_of(student, teacher, exam)

    student, teacher = parallel(student, mesh), parallel(teacher, mesh)
    before = forward_kl_of(student, teacher, exam)
    trained = [p for p in student.parameters() if p.requires_grad]
    # foreach would mix DTensors with the plain parameters of the layers that are not parallel.
    optimizer = torch.optim.AdamW(trained, lr=5e-4, foreach=False)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(train, batch_size=2, shuffle=True, generator=order)
    for batch in islice(loader, steps):
        input_ids = batch.to(device)
        loss = distillation_loss_of_models(student, teacher, {"input_ids": input_ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    after = forward_kl_of(student, teacher, exam)
    if dist.get_rank() == 0:
        head = student.lm_head.weight
        print(f"lm_head {list(head.shape)}, {list(head.to_local().shape)} of it in this process")
        print(f"held out, models whole: forward KL {alone:.4f}")
        print(f"held out, before: forward KL {before:.4f}")
        print(f"held out, after:  forward KL {after:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
