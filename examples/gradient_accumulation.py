"""Gradient accumulation whose sum is the gradient of the undivided batch: `num_items`.

python examples/gradient_accumulation.py     (a CPU, some minutes)
"""

from __future__ import annotations

import argparse
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from akl_triton.cli.smollm2 import forward_kl_of, load_teacher, read_text, shallow_copy
from akl_triton.integrations import distillation_loss_of_models

BATCH, MICRO_BATCH = 4, 1  # sequences


def main(steps: int) -> None:
    torch.manual_seed(0)
    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher)  # 12 of the 30 layers
    train, held_out = read_text(tokenizer)  # [sequences, 128]
    exam = {"input_ids": held_out}
    print(f"held out, before: forward KL {forward_kl_of(student, teacher, exam):.4f}")

    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=5e-4)
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    for step, ids in enumerate(islice(loader, steps)):
        labels = without_some(ids)
        # The tokens of the whole step that count; nothing predicts the first of a sequence.
        num_items = (labels[:, 1:] != -100).sum()
        for i in range(0, BATCH, MICRO_BATCH):
            batch = {"input_ids": ids[i : i + MICRO_BATCH], "labels": labels[i : i + MICRO_BATCH]}
            loss = distillation_loss_of_models(student, teacher, batch, num_items=num_items)
            loss.backward()
        if step == 0:
            compare(student, teacher, ids, labels)
        optimizer.step()
        optimizer.zero_grad()
    print(f"held out, after:  forward KL {forward_kl_of(student, teacher, exam):.4f}")


def without_some(ids: Tensor) -> Tensor:
    """Labels for a quarter of the first sequence, two quarters of the second, and so on."""
    counted = torch.linspace(0, ids.shape[1], len(ids) + 1)[1:, None]
    return ids.where(torch.arange(ids.shape[1]) < counted, -100)


def compare(student: Any, teacher: Any, ids: Tensor, labels: Tensor) -> None:
    """The gradients that have been accumulated are those of the batch as a whole."""
    trained = [p for p in student.parameters() if p.requires_grad]
    whole = distillation_loss_of_models(student, teacher, {"input_ids": ids}, labels)
    expected = torch.autograd.grad(whole, trained)
    error = max(
        float((p.grad - x).norm() / x.norm()) for p, x in zip(trained, expected, strict=True)
    )
    print(f"difference from the gradient of the undivided batch: {error:.1e} of it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
