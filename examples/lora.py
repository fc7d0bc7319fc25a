"""LoRA of PEFT on the projections of attention and on the lm_head, taught by the whole model.

python examples/lora.py     (a CPU, some minutes; needs peft)
"""

from __future__ import annotations

import argparse
import tempfile

from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from akl_triton.cli.smollm2 import as_dataset, load_teacher, read_text, shallow_copy
from akl_triton.integrations import describe_model
from akl_triton.integrations.transformers import DistillationTrainer


def main(steps: int) -> None:
    teacher, tokenizer = load_teacher()
    train, held_out = read_text(tokenizer)  # [sequences, 128]
    student = get_peft_model(
        shallow_copy(teacher),  # 12 of the 30 layers
        LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            # PEFT warns that the embeddings, whose weight the lm_head shares, have no adapter.
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        ),
    )
    student.print_trainable_parameters()
    print(f"the student's lm_head: {describe_model(student).kind}")

    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=3e-3,
                logging_steps=min(steps, 5),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=as_dataset(train),
            eval_dataset=as_dataset(held_out),
            teacher_model=teacher,
            divergence="adaptive_kl",
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    print(f"held out, before: forward KL {before['eval_forward_kl']:.4f}")
    print(f"held out, after:  forward KL {after['eval_forward_kl']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
