"""Reinforce vowels, while the reverse KL over the whole vocabulary keeps the policy near its start.

python examples/policy.py     (a CPU, seconds)
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from tiny import ByteModel, batch, trained

from akl_triton.extras import kl_regularised_policy_loss

STEPS = 20
PROMPT, COMPLETION = 8, 16
VOWELS = torch.tensor(list(b"aeiou"))


def main() -> None:
    torch.manual_seed(0)
    reference = trained(size=32, steps=60)
    policy = copy.deepcopy(reference)
    print(f"before: share of vowels {share_of_vowels(policy):.4f}")
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(STEPS):
        tokens = policy.complete(batch(32)[:, :PROMPT], COMPLETION)
        inputs, sampled = tokens[:, :-1], tokens[:, 1:]
        logits = policy(inputs)
        with torch.no_grad():
            reference_logits = reference(inputs)
        rewards = torch.isin(sampled, VOWELS).float()
        mask = (torch.arange(1, PROMPT + COMPLETION) >= PROMPT).expand_as(sampled)
        loss, stats = kl_regularised_policy_loss(
            -F.cross_entropy(logits.mT, sampled, reduction="none"),
            rewards - rewards[mask].mean(),
            logits,
            reference_logits,
            coefficient=0.5,
            mask=mask,
            return_stats=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after:  share of vowels {share_of_vowels(policy):.4f}")
    print(f"KL(policy || reference) of a token: {float(stats.penalty[mask].mean()):.4f}")


def share_of_vowels(model: ByteModel) -> float:
    completions = model.complete(batch(64)[:, :PROMPT], COMPLETION)[:, PROMPT:]
    return float(torch.isin(completions, VOWELS).float().mean())


if __name__ == "__main__":
    main()
