"""The sizes and dtypes of logits that questions are asked about."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Llama 2, SmolLM2, GPT-2, Llama 3, Qwen 2.5 up to 3B and above.
VOCABULARIES = (32_000, 49_152, 50_257, 128_256, 151_936, 152_064)
PEER_VOCABULARIES = (32_000, 128_256, 151_936)
MAIN_VOCABULARY = 151_936

ALIGNMENT_CLASSES = {
    "V a multiple of 16": (32_000, 49_152, 128_256, 151_936, 152_064),
    "V a multiple of 8": (32_008, 50_264, 151_944),
    "any other V": (32_001, 50_257, 50_258, 128_259, 151_935),
}

SMOLLM2_VOCABULARY, SMOLLM2_HIDDEN = 49_152, 576  # of SmolLM2-135M
