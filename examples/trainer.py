"""The Trainer of transformers with the loss of a teacher, and the statistics that it logs.

python examples/trainer.py     (a CPU, some minutes)
"""

from __future__ import annotations

import argparse
import tempfile

from transformers import TrainingArguments

from akl_triton import AdaptiveKL
from akl_triton.cli.smollm2 import as_dataset, load_teacher, read_text, shallow_copy
from akl_triton.integrations.transformers import DistillationTrainer


def main(steps: int) -> None:
    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher)  # 12 of the 30 layers
    train, held_out = read_text(tokenizer)  # [sequences, 128]

    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=5e-4,
                logging_steps=min(steps, 5),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=as_dataset(train),  # {"input_ids": ..., "labels": ...} for each sequence
            eval_dataset=as_dataset(held_out),
            teacher_model=teacher,
            divergence=AdaptiveKL(mu=0.5),
        )
        before = trainer.evaluate()
        trainer.train()  # logs forward_kl, reverse_kl, forward_weight, gap and entropies
        after = trainer.evaluate()
    print(f"held out, before: forward KL {before['eval_forward_kl']:.4f}")
    print(f"held out, after:  forward KL {after['eval_forward_kl']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
