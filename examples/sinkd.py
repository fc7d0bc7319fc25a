"""Distil with cross-entropy and the Sinkhorn distance between the tokens of a batch.

python examples/sinkd.py     (a CPU, seconds)
"""

from __future__ import annotations

import torch
from tiny import ByteModel, batch, trained

from akl_triton import forward_kl
from akl_triton.extras import sinkd_loss

STEPS = 20
WEIGHT = 1.0  # of the Sinkhorn distance; the paper tunes it per task


def main() -> None:
    torch.manual_seed(0)
    teacher, student = trained(size=64, steps=60), ByteModel(size=32)
    held_out = batch(16)
    print(f"held out, before: forward KL {distance(student, teacher, held_out):.4f}")
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(STEPS):
        tokens = batch(8)
        logits = student(tokens[:, :-1])
        with torch.no_grad():
            teacher_logits = teacher(tokens[:, :-1])
        cross_entropy = -student.log_probs(tokens).mean()
        loss = cross_entropy + WEIGHT * sinkd_loss(logits, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"held out, after:  forward KL {distance(student, teacher, held_out):.4f}")


@torch.no_grad()
def distance(student: ByteModel, teacher: ByteModel, tokens: torch.Tensor) -> float:
    """The mean KL(teacher || student) over the tokens."""
    return float(forward_kl(student(tokens), teacher(tokens)))


if __name__ == "__main__":
    main()
