"""A draft model for speculative decoding with a part of the teacher's vocabulary, as in EAGLE-3.

python examples/draft_vocabulary.py     (a CPU, some minutes)
"""

from __future__ import annotations

import argparse
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from akl_triton import linear_distillation_loss, linear_forward_kl
from akl_triton.cli.smollm2 import load_teacher, read_text

SIZE = 2048  # tokens of the draft's vocabulary, at most half of the teacher's


def vocabulary_maps(ids: Tensor, vocab_size: int, size: int) -> tuple[Tensor, Tensor]:
    """t2d [V] bool, whether the draft has the token; d2t [V_d], what to add to its id there."""
    kept = ids.flatten().bincount(minlength=vocab_size).topk(size).indices.sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(size)


def draft_labels(labels: Tensor, t2d: Tensor) -> Tensor:
    """Labels as ids of the draft, -100 where they are none."""
    draft_ids = torch.where(t2d, t2d.cumsum(0) - 1, -100)
    return draft_ids[labels.clamp(min=0)].where(labels >= 0, -100)


def draft_first(teacher_weight: Tensor, t2d: Tensor) -> Tensor:
    """[V, H], the draft's tokens before all others: ids of the draft are then ids of both."""
    return torch.cat([teacher_weight[t2d], teacher_weight[~t2d]])


class Draft(nn.Module):
    """From the teacher's features of a token and the embedding of the next to hidden states."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        hidden: Tensor = self.body(torch.cat([features[:, :-1], embeddings[:, 1:]], dim=-1))
        return hidden


@torch.no_grad()
def inputs_of(teacher: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, L, 3 H] of three depths, embeddings [B, L, H], last hidden states [B, L, H]."""
    output = teacher.model(ids, output_hidden_states=True)
    states = output.hidden_states
    features = torch.cat([states[2], states[len(states) // 2], states[-3]], dim=-1)
    return features, states[0], output.last_hidden_state


def main(steps: int) -> None:
    torch.manual_seed(0)
    teacher, tokenizer = load_teacher()
    train, held_out = read_text(tokenizer)  # [sequences, 128]
    teacher_weight = teacher.lm_head.weight.detach()
    vocab_size, width = teacher_weight.shape
    t2d, d2t = vocabulary_maps(train, vocab_size, min(SIZE, vocab_size // 2))
    draft = Draft(width, len(d2t))
    draft.lm_head.load_state_dict({"weight": teacher_weight[t2d]})

    in_draft, whole = teacher_weight[t2d], draft_first(teacher_weight, t2d)  # once, not every step

    @torch.no_grad()
    def rejected() -> float:
        """How often speculative decoding would refuse the draft's token, on text held out."""
        features, embeddings, last = inputs_of(teacher, held_out)
        loss = linear_distillation_loss(
            draft(features, embeddings),
            draft.lm_head.weight,
            last[:, 1:],
            whole,
            divergence="total_variation",
        )
        return loss.item()

    print(f"held out, before: rejected {rejected():.4f}")
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-3)
    for ids in islice(DataLoader(train, batch_size=2, shuffle=True), steps):
        features, embeddings, last = inputs_of(teacher, ids)
        loss = linear_forward_kl(
            draft(features, embeddings),
            draft.lm_head.weight,
            last[:, 1:],
            in_draft,
            draft_labels(ids[:, 1:], t2d),
            shift=1,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"held out, after:  rejected {rejected():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
