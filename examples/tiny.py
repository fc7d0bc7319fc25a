"""Common to the examples: a text that comes with Python, and language models of its bytes."""

from __future__ import annotations

import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 128  # the text is ASCII
LENGTH = 32


class ByteModel(nn.Module):
    """Logits of the next byte, from a recurrent network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size)
        self.body = nn.GRU(size, size, batch_first=True)
        self.lm_head = nn.Linear(size, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, V]"""
        hidden, _ = self.body(self.embedding(tokens))
        logits: Tensor = self.lm_head(hidden)
        return logits

    @torch.no_grad()
    def complete(self, prompt: Tensor, length: int) -> Tensor:
        """[B, P] -> [B, P + length], sampled"""
        tokens = prompt
        for _ in range(length):
            probabilities = torch.softmax(self(tokens)[:, -1], dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)
        return tokens

    def log_probs(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L - 1], ln p of each byte but the first, given those before it"""
        return -F.cross_entropy(self(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")


def batch(count: int) -> Tensor:
    """[count, LENGTH], from random places of the text"""
    starts = torch.randint(len(TEXT) - LENGTH, (count, 1))
    return TEXT[starts + torch.arange(LENGTH)]


def trained(size: int, steps: int) -> ByteModel:
    """A model that has learnt the text for some steps."""
    model = ByteModel(size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = -model.log_probs(batch(16)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _text() -> Tensor:
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    return torch.tensor(list(text[:200_000]))


TEXT = _text()
