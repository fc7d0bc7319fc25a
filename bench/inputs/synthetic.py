"""Random logits, and random hidden states that give them, where values matter less than shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Logits that fall by this much where the rank of a token grows e-fold: the probabilities then are
# those of a Poisson-Dirichlet process with alpha = 1 / DECAY, whose largest is above 1/2 in
# sin(pi alpha) / (pi alpha) of the rows. With this value that is one half: as many rows need a
# search for the boundary of their head as do not.
DECAY = 1.657
CHUNK = 2**26  # logits that are drawn at a time, in fp32


def make_pair(
    rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """(student, a leaf that requires grad; teacher), both [rows, vocabulary].

    teacher = DECAY * Exp(1), which orders no rank, as -ln(rank / V) of a random token is Exp(1);
    student = teacher + N(0, 1).
    """
    generator = torch.Generator(device).manual_seed(seed)
    student, teacher = (torch.empty(rows, vocabulary, device=device, dtype=dtype) for _ in "st")
    step = max(1, CHUNK // vocabulary)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        logits = torch.empty(len(teacher[part]), vocabulary, device=device)
        teacher[part] = logits.exponential_(generator=generator).mul_(DECAY)
        noise = torch.empty_like(logits).normal_(generator=generator)
        student[part] = logits.add_(noise)
    return student.requires_grad_(), teacher


class HiddenStates(NamedTuple):
    """The inputs of the fused losses; the student's two are leaves that require grad."""

    student_hidden: Tensor  # [N, H]
    student_weight: Tensor  # [V, H]
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        """The leaves."""
        return self.student_hidden, self.student_weight


def make_hidden_states(
    rows: int, vocabulary: int, hidden: int, device: torch.device, dtype: torch.dtype, seed: int
) -> HiddenStates:
    """Random hidden states and weights whose logits are N(0, 9): no few tokens hold half of the
    mass."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(size: int, deviation: float) -> Tensor:
        x = torch.empty(size, hidden, device=device, dtype=dtype)
        return x.normal_(std=deviation, generator=generator)

    sizes = ((rows, 1.0), (vocabulary, 3.0 / hidden**0.5))
    student, teacher = ([normal(*size) for size in sizes] for _ in "st")
    return HiddenStates(*(x.requires_grad_() for x in student), *teacher)
