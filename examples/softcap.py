"""A model that caps its logits, as Gemma 2 does: the cap is found on the model and is in the loss.

python examples/softcap.py     (a CPU, seconds: the models are small and random)
"""

from __future__ import annotations

import argparse

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from akl_triton.cli.smollm2 import forward_kl_of
from akl_triton.integrations import describe_model, distillation_loss_of_models

VOCABULARY = 512


def gemma2(hidden_size: int) -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=5.0,
        initializer_range=0.5,  # large logits, which the cap bends
    )
    return Gemma2ForCausalLM(config)


def main(steps: int) -> None:
    torch.manual_seed(0)
    teacher, student = gemma2(64).eval(), gemma2(32)
    for name, model in {"teacher": teacher, "student": student}.items():
        head = describe_model(model)
        print(f"{name}: {head.name} [{head.vocab_size}, {head.hidden_size}], cap {head.softcap}")

    exam = {"input_ids": torch.randint(VOCABULARY, (8, 32))}
    print(f"held out, before: forward KL {forward_kl_of(student, teacher, exam):.4f}")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(steps):
        inputs = {"input_ids": torch.randint(VOCABULARY, (8, 32))}
        loss = distillation_loss_of_models(student, teacher, inputs)  # nothing to pass
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"held out, after:  forward KL {forward_kl_of(student, teacher, exam):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
