"""GKDTrainer of TRL with adaptive KL: half of the answers are the student's own.

python examples/trl_gkd.py     (a CPU, some minutes; needs trl)
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from trl.experimental.gkd import GKDConfig

from akl_triton.cli.smollm2 import (
    forward_kl_of,
    load_teacher,
    read_conversations,
    read_text,
    shallow_copy,
)
from akl_triton.integrations.trl import GKDTrainer


def main(steps: int) -> None:
    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher)  # 12 of the 30 layers
    conversations, _ = read_conversations()
    exam = {"input_ids": read_text(tokenizer)[1]}
    before = forward_kl_of(student, teacher, exam)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            student,
            teacher,
            GKDConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=5e-4,
                lmbda=0.5,  # the share of the batches that the student samples
                max_new_tokens=32,
                logging_steps=min(steps, 5),
                save_strategy="no",
                report_to="none",
                activation_checkpointing=False,
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_dict({"messages": conversations}),
            processing_class=tokenizer,
            divergence="adaptive_kl",  # without it that of TRL's beta
        )
        trainer.train()
    print(f"held out, before: forward KL {before:.4f}")
    print(f"held out, after:  forward KL {forward_kl_of(student, teacher, exam):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
