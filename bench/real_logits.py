"""Logits of a real language model and of a shallow copy of it, on real text.

The teacher is SmolLM2-135M-Instruct (V = 49,152), the student that model with the layers that
`akl-triton demo` keeps, the text the running Python's own language reference.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

from akl_triton.cli.demo import load_teacher, shallow_copy


def real_logits(rows: int = 256, topic: str = "objects") -> tuple[Tensor, Tensor]:
    """Student and teacher logits [rows, 49152] in fp32; needs the extra "demo"."""
    teacher, tokenize = load_teacher()
    tokens = torch.tensor([tokenize(topics[topic])[:rows]])
    if tokens.shape[1] < rows:
        raise ValueError(f"topic: {topic!r} has {tokens.shape[1]} tokens, {rows} are asked for")
    with torch.no_grad():
        student = shallow_copy(teacher).eval()
        return student(tokens).logits[0].contiguous(), teacher(tokens).logits[0].contiguous()
