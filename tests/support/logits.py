"""Random logits of a vocabulary of any size."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of_vocabulary(vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher), fp32 [10, vocabulary]: peaked, Zipf, flat, one-hot, tied, near, far."""
    g = generator(seed)

    def noise(scale: float) -> Tensor:
        return torch.randn(vocabulary, generator=g) * scale

    zipf = -1.2 * torch.arange(1, vocabulary + 1).log()
    zipf = zipf[torch.randperm(vocabulary, generator=g)]
    one_hot = torch.zeros(vocabulary)
    one_hot[vocabulary // 2] = 40.0
    equal = torch.full((vocabulary,), 3.0)
    pairs = [
        (noise(8.0), noise(8.0)),
        (zipf + noise(0.7), zipf + noise(0.3)),
        (noise(0.02), noise(0.02)),
        (noise(1.0), one_hot),
        (one_hot, noise(1.0)),
        (noise(1.0), equal),
        (equal, equal),
        (noise(1.0), noise(1.0).mul(2.0).round()),
        (noise(2.0), zipf.round() - 30.0),
    ]
    near = noise(2.0)
    pairs.append((near + noise(1e-3), near))
    student, teacher = zip(*pairs, strict=True)
    return torch.stack(student), torch.stack(teacher)
