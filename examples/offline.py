"""A teacher that runs once: its pairs are written to disk, and a student trains from there.

python examples/offline.py     (a CPU, some minutes)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import TrainingArguments

from akl_triton import AdaptiveKL
from akl_triton.cli.smollm2 import forward_kl_of, load_teacher, read_text, shallow_copy
from akl_triton.integrations import PairCollator
from akl_triton.integrations.transformers import DistillationTrainer
from akl_triton.offline import PairWriter, open_pairs, write_pairs


def main(steps: int) -> None:
    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher)  # 12 of the 30 layers
    train, held_out = read_text(tokenizer)  # [sequences, 128]
    exam = {"input_ids": held_out}
    before = forward_kl_of(student, teacher, exam)

    with tempfile.TemporaryDirectory() as folder:
        # Begun again after an interruption, the writer goes on behind what it has written.
        store = Path(folder, "pairs")
        with PairWriter(store, k=64, tokenizer=tokenizer, teacher=teacher) as writer:
            documents = [(str(i), ids.tolist()) for i, ids in enumerate(train[: 2 * steps])]
            write_pairs(writer, teacher, documents, context=128, batch=4)
        size = sum(file.stat().st_size for file in store.iterdir())
        print(f"{size / sum(writer.done.values()):.0f} bytes a token on disk")

        trainer = DistillationTrainer(
            student,
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=5e-4,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=open_pairs(store, tokenizer=tokenizer, cache_dir=folder),
            data_collator=PairCollator(),
            divergence=AdaptiveKL(mu=0.5),
        )
        trainer.train()  # no teacher runs
    print(f"held out, before: forward KL {before:.4f}")
    print(f"held out, after:  forward KL {forward_kl_of(student, teacher, exam):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
