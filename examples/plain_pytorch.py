"""A loop of your own: the loss of two models, neither of which ever holds whole logits.

python examples/plain_pytorch.py     (a CPU, some minutes)
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from torch.utils.data import DataLoader

from akl_triton.cli.smollm2 import forward_kl_of, load_teacher, read_text, shallow_copy
from akl_triton.integrations import distillation_loss_of_models


def main(steps: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher).to(device)  # 12 of the 30 layers
    teacher.to(device).eval()
    train, held_out = read_text(tokenizer)  # [sequences, 128]
    exam = {"input_ids": held_out}
    print(f"held out, before: forward KL {forward_kl_of(student, teacher, exam):.4f}")

    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    loader = DataLoader(train, batch_size=2, shuffle=True)
    for step, input_ids in enumerate(islice(loader, steps), start=1):
        batch = {"input_ids": input_ids.to(device)}  # every token counts: there are no labels
        loss = distillation_loss_of_models(student, teacher, batch, divergence="adaptive_kl")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    print(f"held out, after:  forward KL {forward_kl_of(student, teacher, exam):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
