"""Fine-tuning with a KL penalty that keeps the policy near the frozen reference it starts from: the
loss is (1 - kd_ratio) cross-entropy + kd_ratio KL(policy || reference), in one pass.

python examples/kl_penalty.py     (a CPU, some minutes; policy.py has a policy gradient instead)
"""

from __future__ import annotations

import argparse
import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from akl_triton.cli.smollm2 import load_teacher, read_text
from akl_triton.integrations import distillation_loss_of_models


def main(steps: int) -> None:
    reference, tokenizer = load_teacher()
    train, held_out = read_text(tokenizer)  # [sequences, 128]
    print(f"held out, before: {examined(reference, copy.deepcopy(reference), held_out)}")
    for kd_ratio in (0.0, 0.5):
        policy = fine_tuned(reference, train, steps, kd_ratio)
        print(f"held out, kd_ratio {kd_ratio}: {examined(policy, reference, held_out)}")


def fine_tuned(reference: Any, train: Tensor, steps: int, kd_ratio: float) -> Any:
    """The reference after some steps of (1 - kd_ratio) cross-entropy + kd_ratio KL."""
    torch.manual_seed(0)
    policy = copy.deepcopy(reference).train()
    policy.get_input_embeddings().requires_grad_(False)  # also the lm_head
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=1e-4)
    for ids in islice(DataLoader(train, batch_size=2, shuffle=True), steps):
        loss = distillation_loss_of_models(
            policy, reference, {"input_ids": ids}, ids, divergence="reverse_kl", kd_ratio=kd_ratio
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.eval()


@torch.no_grad()
def examined(policy: Any, reference: Any, ids: Tensor) -> str:
    _, stats = distillation_loss_of_models(
        policy,
        reference,
        {"input_ids": ids},
        ids,
        divergence="reverse_kl",
        kd_ratio=0.5,  # the statistics have both
        return_stats=True,
    )
    tokens = ids[:, 1:].numel()
    cross_entropy, kl = stats.cross_entropy.sum() / tokens, stats.reverse_kl.sum() / tokens
    return f"cross-entropy {cross_entropy:.4f}, KL(policy || reference) {kl:.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
