"""Conversations: the loss is that of the assistant's tokens alone, which the chat template marks.

python examples/chat_template.py     (a CPU, some minutes)
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from transformers import DataCollatorForSeq2Seq, TrainingArguments

from akl_triton.cli.smollm2 import load_teacher, read_conversations, shallow_copy
from akl_triton.integrations.transformers import DistillationTrainer

# The template of SmolLM2, with {% generation %} around what the assistant is to say: its end, too.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
)


def main(steps: int) -> None:
    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher)  # 12 of the 30 layers

    def encode(conversation: list[dict[str, str]]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(
            conversation,
            chat_template=TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        labels = [token if of_assistant else -100 for token, of_assistant in pairs]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    train, held_out = ([encode(x) for x in part] for part in read_conversations())
    counted = [token for token in held_out[0]["labels"] if token != -100]
    print(f"tokens that count: {tokenizer.decode(counted)!r}")

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
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the labels with -100
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
