"""A student and a teacher from this disk, what is known about them, and the lines that distil them.

A model is a folder of transformers, a GGUF file, or SmolLM2 by one of the names in `WORDS`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from akl_triton.cli import UsageError
from akl_triton.cli.smollm2 import load_teacher, shallow_copy
from akl_triton.integrations import (
    HeadInfo,
    check_vocabularies,
    describe_model,
    in_place_of_head,
)
from akl_triton.integrations.heads import without_cache
from akl_triton.integrations.models import different_ids

WORDS: dict[str, Callable[[Any], Any]] = {
    "smollm2": lambda model: model,
    "smollm2-12": lambda model: shallow_copy(model).eval(),
}
_HIDDEN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Side:
    """A model that is loaded, and its lm_head or the reason why it was refused."""

    role: str  # student | teacher
    source: str  # as the user gave it
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    head: HeadInfo | None
    refused: str | None

    @property
    def name(self) -> str:
        """Its source without the folders above it."""
        return self.source if self.source in WORDS else Path(self.source).resolve().name

    @property
    def vocab_size(self) -> int:
        """V; of the configuration where the head was refused."""
        if self.head is not None:
            return self.head.vocab_size
        size: int = self.model.config.get_text_config().vocab_size
        return size

    @property
    def context(self) -> int | None:
        """The longest sequence, where the configuration limits it."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


@dataclass(frozen=True)
class Vocabularies:
    """Whether the logits of the same id are of the same token."""

    agree: bool  # on every id that both sides have
    same_vocabulary: bool  # no side has ids that the other lacks
    message: str | None  # of `check_vocabularies`, unless both are True
    different: list[tuple[int, str | None, str | None]]  # id, the student's token, the teacher's


def load_pair(
    student: str, teacher: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[Side, Side]:
    """Both models in eval mode on the device; UsageError with one line where one is none."""
    smollm2 = _smollm2() if student in WORDS or teacher in WORDS else None
    sides = []
    for role, source in (("student", student), ("teacher", teacher)):
        model, tokenizer = load_model(role, source, smollm2)
        model = model.eval().to(device=device, dtype=dtype)
        head, refused = None, None
        try:
            head = describe_model(model)
        except (TypeError, ValueError) as error:
            refused = str(error)
        sides.append(Side(role, source, model, tokenizer, head, refused))
    return sides[0], sides[1]


def load_model(role: str, source: str, smollm2: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer; smollm2 is what `load_teacher` has returned, if it was called."""
    if source not in WORDS:
        return _load(role, source)
    model, tokenizer = _smollm2() if smollm2 is None else smollm2
    return WORDS[source](model), tokenizer


def _smollm2() -> tuple[Any, Any]:
    try:
        return load_teacher()
    except ImportError as error:
        raise UsageError(_first_line(error)) from error


def _load(role: str, source: str) -> tuple[Any, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder must not become a download
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    what, path = f"{role} {source}", Path(source).expanduser()
    of_file: dict[str, Any] = {}
    if path.is_file():
        path, of_file = path.parent, {"gguf_file": path.name}
    elif not path.is_dir():
        raise UsageError(
            f"{what}: expected a folder of transformers, a GGUF file, or one of "
            f"{', '.join(WORDS)}, got no such folder or file"
        )
    try:
        if not of_file:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            if type(config) not in AutoModelForCausalLM._model_mapping:
                raise UsageError(
                    f"{what}: expected a causal language model of transformers, got the "
                    f"model_type {config.model_type!r}"
                )
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of its own
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", local_files_only=True, output_loading_info=True, **of_file
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UsageError(f"{what}: expected a model, got: {_first_line(error)}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise UsageError(
            f"{what}: expected the weights of a causal language model, got none for "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, **of_file)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"{what}: expected a tokenizer beside the model, got: {_first_line(error)}"
        ) from error
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def compare_vocabularies(student: Side, teacher: Side) -> Vocabularies:
    """What `check_vocabularies` says of the two, with and without ids of one side alone."""
    tokenizers = student.tokenizer, teacher.tokenizer
    sizes = student.vocab_size, teacher.vocab_size
    different = different_ids(*tokenizers, *map(len, tokenizers))
    try:
        check_vocabularies(*sizes, tokenizers)
        return Vocabularies(True, True, None, different)
    except ValueError as error:
        message = str(error)
    try:
        check_vocabularies(*sizes, tokenizers, same_vocabulary=False)
        return Vocabularies(True, False, message, different)
    except ValueError as error:
        return Vocabularies(False, sizes[0] == sizes[1], str(error), different)


def lines_to_paste(
    student: Side, teacher: Side, vocabularies: Vocabularies, ids: Tensor
) -> dict[str, str]:
    """Python that distils this pair, by what it is for; none where the tokens differ.

    The names that it reads are student, teacher, and those that its comments explain. `ids` are
    tokens [1, L] on which both models run."""
    if not vocabularies.agree:
        return {}
    if student.head is None or teacher.head is None:
        return {"logits": _OF_LOGITS}
    same = "" if vocabularies.same_vocabulary else ", same_vocabulary=False"
    lines = {
        "trainer": _OF_TRAINER.format(same=same),
        "loop": _OF_LOOP.format(same=same),
    }
    if all(_hidden_states_are_public(side.model, ids) for side in (student, teacher)):
        lines["linear"] = _of_linear(student, teacher)
    return lines


_OF_TRAINER = """\
# args: TrainingArguments; dataset: input_ids and labels
from akl_triton.integrations.transformers import DistillationTrainer

trainer = DistillationTrainer(
    student, args, teacher_model=teacher, train_dataset=dataset{same}
)
trainer.train()
"""
_OF_LOOP = """\
# batch: input_ids, attention_mask and labels
from akl_triton.integrations import distillation_loss_of_models

loss = distillation_loss_of_models(student, teacher, batch{same})
loss.backward()
"""
_OF_LOGITS = """\
# inputs: input_ids and attention_mask; labels: [B, L]
import torch
from akl_triton import adaptive_kl

with torch.no_grad():
    teacher_logits = teacher(**inputs).logits
loss = adaptive_kl(student(**inputs).logits, teacher_logits, labels, shift=1)
loss.backward()
"""


def _of_linear(student: Side, teacher: Side) -> str:
    arguments = [
        "student_hidden",
        _of_head(student, "weight"),
        "teacher_hidden",
        f"{_of_head(teacher, 'weight')}.detach()",
        "labels",
        "shift=1",
    ]
    for side in (student, teacher):
        head = side.head
        assert head is not None
        if head.bias:
            detach = ".detach()" if side.role == "teacher" else ""
            arguments.append(f"{side.role}_bias={_of_head(side, 'bias')}{detach}")
        if head.softcap is not None:
            arguments.append(f"{side.role}_softcap={_number(head.softcap)}")
        if (scale := _number(head.scale)) != "1.0":
            arguments.append(f"{side.role}_logit_scale={scale}")
    passed = "".join(f"    {argument},\n" for argument in arguments)
    return f"""\
# inputs: input_ids and attention_mask; labels: [B, L]
import torch
from akl_triton import linear_adaptive_kl

student_hidden = student.base_model(**inputs).last_hidden_state
with torch.no_grad():
    teacher_hidden = teacher.base_model(**inputs).last_hidden_state
loss = linear_adaptive_kl(
{passed})
loss.backward()
"""


def _of_head(side: Side, parameter: str) -> str:
    """The expression that is the weight or bias, without the rows that pad it."""
    assert side.head is not None
    rows = len(side.model.get_output_embeddings().weight)
    padded = rows != side.head.vocab_size
    padding = f"[:{side.head.vocab_size}]" if padded else ""
    return f"{side.role}.{side.head.name}.{parameter}{padding}"


def _number(x: float) -> str:
    """A number that is known with the precision of fp32."""
    return repr(float(f"{x:.7g}"))


@torch.no_grad()
def _hidden_states_are_public(model: Any, ids: Tensor) -> bool:
    """Whether the last hidden states of the model without its head are the head's input: some
    models transform or scale them in between."""
    arguments = {"input_ids": ids, **without_cache(model)}
    with in_place_of_head(model, lambda hidden, weight, bias: hidden):
        expected: Any = model(**arguments)
    found = getattr(model.base_model(input_ids=ids), "last_hidden_state", None)
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=_HIDDEN_TOLERANCE, atol=_HIDDEN_TOLERANCE)
    )
