"""Distil by preference: the teacher's completion of a prompt over the student's own.

python examples/dpkd.py     (a CPU, seconds)
"""

from __future__ import annotations

import torch
from tiny import ByteModel, batch, trained

from akl_triton.extras import dpkd_loss

STEPS = 20
PROMPT, COMPLETION = 8, 16


def main() -> None:
    torch.manual_seed(0)
    teacher, student = trained(size=64, steps=60), trained(size=32, steps=10)
    held_out = pairs(student, teacher, count=32)
    print(f"held out, before: loss {loss_of(student, teacher, *held_out).item():.4f}")
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    for _ in range(STEPS):
        loss = loss_of(student, teacher, *pairs(student, teacher, count=16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"held out, after:  loss {loss_of(student, teacher, *held_out).item():.4f}")


def pairs(student: ByteModel, teacher: ByteModel, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, each completed by the teacher (chosen) and by the student (rejected)."""
    prompts = batch(count)[:, :PROMPT]
    return teacher.complete(prompts, COMPLETION), student.complete(prompts, COMPLETION)


def loss_of(
    student: ByteModel, teacher: ByteModel, chosen: torch.Tensor, rejected: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        teacher_logps = teacher.log_probs(chosen), teacher.log_probs(rejected)
    of_completion = (torch.arange(1, PROMPT + COMPLETION) >= PROMPT).expand(len(chosen), -1)
    return dpkd_loss(
        student.log_probs(chosen),
        student.log_probs(rejected),
        *teacher_logps,
        beta=0.1,
        chosen_mask=of_completion,
        rejected_mask=of_completion,
    )


if __name__ == "__main__":
    main()
