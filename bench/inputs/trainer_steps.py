"""Ways to compute the loss of a step of training, from tokens: TRL's two, and ours.

A loss is called with the student, the teacher, a batch as a Trainer has it, and TRL's beta: 0 is
the forward KL, and what is between 0 and 1 the generalised Jensen-Shannon divergence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from akl_triton import ForwardKL, JensenShannon
from akl_triton.cli.smollm2 import load_teacher, read_text, shallow_copy
from akl_triton.integrations import distillation_loss_of_models
from bench.inputs.peers import OURS, version_obstacle

StepLoss = Callable[[Any, Any, Mapping[str, Tensor], float], Tensor]


@dataclass(frozen=True, slots=True)
class StepPeer:
    """One way to compute the loss of a step."""

    name: str
    package: str  # the distribution it comes from
    loss: StepLoss

    def obstacle(self) -> str | None:
        """The reason why it is not measured here; None if it is."""
        return version_obstacle(self.package)


@dataclass(frozen=True, slots=True)
class Setting:
    """Two models and a batch."""

    student: Any
    teacher: Any
    batch: dict[str, Tensor]  # input_ids, attention_mask and labels, [B, L]


def smollm2_setting(sequences: int, length: int) -> Setting:
    """SmolLM2 and the student of `akl-triton demo`, on its text: every token but the first of a
    sequence is a label."""
    teacher, tokenizer = load_teacher()
    text, _ = read_text(tokenizer)
    if text.numel() < sequences * length:
        raise ValueError(f"sequences: the text has {text.numel()} tokens, not {sequences * length}")
    ids = text.flatten()[: sequences * length].view(sequences, length)
    return Setting(shallow_copy(teacher), teacher.requires_grad_(False), batch_of(ids))


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextlib.contextmanager
def without_layers(setting: Setting) -> Iterator[None]:
    """Both models without their layers: a step is then that of the loss, and of next to nothing
    else."""
    bodies = [model.get_decoder() for model in (setting.student, setting.teacher)]
    layers = [body.layers for body in bodies]
    for body in bodies:
        body.layers = nn.ModuleList()
    try:
        yield
    finally:
        for body, its_own in zip(bodies, layers, strict=True):
            body.layers = its_own


def _whole_logits(student: Any, teacher: Any, batch: Mapping[str, Tensor], beta: float) -> Tensor:
    """TRL's method, with what it reads of its Trainer."""
    from trl.experimental.gkd import GKDTrainer

    trainer = SimpleNamespace(
        teacher_model=teacher, beta=beta, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss
    )
    loss: Tensor = GKDTrainer.compute_loss(trainer, student, batch)
    return loss


def _chunked_divergence(
    student: Any, teacher: Any, batch: Mapping[str, Tensor], beta: float
) -> Tensor:
    """What TRL's DistillationTrainer makes of the hidden states of both models."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = student.get_decoder()(**tokens).last_hidden_state[:, :-1]
    with torch.no_grad():
        teacher_hidden = teacher.get_decoder()(**tokens).last_hidden_state[:, :-1]
    loss: Tensor
    loss, _, _ = _chunked_divergence_loss(
        hidden,
        teacher_hidden,
        student.lm_head.weight,
        teacher.lm_head.weight,
        batch["labels"][:, 1:] != -100,
        beta,
    )
    return loss


def _ours(
    student: Any, teacher: Any, batch: Mapping[str, Tensor], beta: float, **options: Any
) -> Tensor:
    loss: Tensor = distillation_loss_of_models(
        student,
        teacher,
        batch,
        divergence=JensenShannon(beta) if beta else ForwardKL(),
        **options,
    )
    return loss


def step_peers(chunk_bytes: int) -> list[StepPeer]:
    """All of these ways, first that of whole logits; ours by default, and with smaller chunks."""
    return [
        StepPeer("TRL GKDTrainer, whole logits", "trl", _whole_logits),
        StepPeer("TRL DistillationTrainer, chunked divergence", "trl", _chunked_divergence),
        StepPeer("distillation_loss_of_models", OURS, _ours),
        StepPeer(
            f"distillation_loss_of_models, chunk_bytes of {chunk_bytes // 2**20} MiB",
            OURS,
            partial(_ours, chunk_bytes=chunk_bytes),
        ),
    ]
