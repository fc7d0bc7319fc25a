"""The distillation Trainers of TRL with a loss of ours, and TRL's own ones patched to have it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor, nn

from ..divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, resolve
from ..losses import shifted
from .models import distillation_loss_of_models

TESTED = ("1.16",)  # the versions of TRL
_EXPECTED = f"trl: expected version {' or '.join(TESTED)}, those that are tested"

try:
    from trl import DistillationTrainer as _TheirDistillation
    from trl.experimental.gkd import GKDTrainer as _TheirGKD
    from trl.models.utils import unwrap_model_for_generation
except ImportError as error:
    raise ImportError(f"{_EXPECTED}, got {trl.__version__}, where {error}") from error

if TYPE_CHECKING:
    from transformers import Trainer as _Distillation
    from transformers import Trainer as _GKD
else:
    _GKD, _Distillation = _TheirGKD, _TheirDistillation

_IGNORED = -100  # the label of every collator and Trainer
# What is replaced or called in TRL, as it is in the versions that are tested.
_SIGNATURES = {
    (_TheirGKD, "compute_loss"): (
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)"
    ),
    (_TheirGKD, "training_step"): "(self, model, inputs, num_items_in_batch=None)",
    (_TheirGKD, "generate_on_policy_outputs"): "(model, inputs, generation_config)",
    (_TheirDistillation, "compute_loss"): (
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)"
    ),
}
# What a batch of TRL's DistillationTrainer has for models of images, besides tokens.
_OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class GKDTrainer(_GKD):
    """TRL's `GKDTrainer`, whose loss is computed in the place of the student's lm_head.

    Math:
        With the n tokens of a step that have a label, those of all its micro-batches and
        processes, ``loss = 1/n sum_i D_i``. By default D is that of TRL's beta: `ForwardKL` where
        it is 0, `ReverseKL` where it is 1, and `JensenShannon(beta)` between. TRL's temperature is
        that of the sampling alone: both distributions are at T = 1.

    Data, prompts, collators, sampling of the student with probability lmbda and ``seq_kd`` are
    TRL's, and draw the same tokens from the same seed. Two things differ, both in the number of
    tokens that TRL divides by. It counts those of the dataset, also where it has sampled others;
    here all micro-batches of a step are sampled before the first of them is trained on, and the
    tokens that are trained on are counted. With P processes TRL's gradient is 1/P of that of the
    mean; here it is that of the mean. TRL's constructor refuses PEFT on the lm_head.

    Args:
        divergence: a member of the family, or its name, such as "adaptive_kl"; by default that of
            ``args.beta``.
        args, kwargs: all others are TRL's.

    Raises:
        ImportError: a version of TRL that is not tested.
        TypeError, ValueError: an argument is not as above; in the first step: the vocabularies
            differ, or a loss cannot be computed in the place of the lm_head (see
            `describe_model`).

    Reference:
        Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649).

    Example:
        >>> from akl_triton.integrations.trl import GKDTrainer
        >>> trainer = GKDTrainer(  # doctest: +SKIP
        ...     student, teacher, args, train_dataset=dataset, processing_class=tokenizer,
        ...     divergence="adaptive_kl",
        ... )
    """

    # `compute_loss` has divided by the tokens of all micro-batches.
    loss_is_scaled_for_ga = True
    teacher_model: nn.Module
    lmbda: float
    seq_kd: bool

    def __init__(
        self, *args: Any, divergence: Divergence | str | None = None, **kwargs: Any
    ) -> None:
        check_trl()
        self.divergence = None if divergence is None else resolve(divergence)
        super().__init__(*args, **kwargs)
        self.teacher_model.eval()  # it may sample before its first loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step, sampled where TRL would, and the number of tokens that its
        loss is the mean of, for a process of those whose gradients are averaged."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._sampled(batch) for batch in batches]
        counts = [(shifted(x["labels"], 1, _IGNORED) != _IGNORED).sum() for x in batches]
        count = torch.stack(counts).sum().to(device) if counts else torch.zeros((), device=device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum() / self.accelerator.num_processes
        return batches, count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        above: Any = super(_GKD, self)  # what TRL's calls once it has sampled
        loss: Tensor = above.training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch, whose tokens are divided by num_items_in_batch, or by their
        own number; with return_outputs the pair (loss, outputs of the student)."""
        return _gkd_loss(self, self.divergence, model, inputs, return_outputs, num_items_in_batch)

    def _sampled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What TRL's training_step makes of a batch before its loss."""
        of_student: dict[str, Any] = {
            "gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs
        }
        trainer: Any = self
        if random.random() <= self.lmbda:
            model, options = self.model_wrapped, of_student
        elif self.seq_kd:
            model, options = self.teacher_model, {}
        else:
            return batch
        with unwrap_model_for_generation(
            model, self.accelerator, generation_kwargs=trainer.generation_kwargs, **options
        ) as unwrapped:
            sampled = trainer.generate_on_policy_outputs(
                unwrapped, batch, trainer.generation_config
            )
        names = ("input_ids", "attention_mask", "labels")
        return {**batch, **dict(zip(names, sampled, strict=True))}


class DistillationTrainer(_Distillation):
    """TRL's `DistillationTrainer`, whose loss is computed in the place of the student's lm_head.

    Math:
        With the n tokens of a step that the student has sampled, those of all its micro-batches
        and processes, ``loss = 1/n sum_i D_i``. By default D is that of TRL's beta: `ForwardKL`
        where it is 0, `ReverseKL` where it is 1, and `JensenShannon(beta)` between. TRL's
        temperature divides the logits of both sides, and D is not multiplied by its square.

    Prompts, tools, sampling and the logs are TRL's; the entropy in them is the student's, at that
    temperature. TRL counts the tokens right. With ``bf16=True`` both models run in autocast, as in
    any other Trainer; TRL's run in the dtype of their weights. Its constructor refuses PEFT on the
    lm_head.

    Args:
        divergence: a member of the family, or its name, such as "adaptive_kl"; by default that of
            ``args.beta``.
        args, kwargs: all others are TRL's.

    Raises:
        ImportError: a version of TRL that is not tested.
        TypeError, ValueError: an argument is not as above; in the first step: the vocabularies
            differ, or a loss cannot be computed in the place of the lm_head (see
            `describe_model`).

    Reference:
        Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649).

    Example:
        >>> from akl_triton.integrations.trl import DistillationTrainer
        >>> trainer = DistillationTrainer(  # doctest: +SKIP
        ...     student, teacher, args, train_dataset=prompts, processing_class=tokenizer,
        ...     divergence="adaptive_kl",
        ... )
    """

    def __init__(
        self, *args: Any, divergence: Divergence | str | None = None, **kwargs: Any
    ) -> None:
        check_trl()
        self.divergence = None if divergence is None else resolve(divergence)
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch, whose tokens are divided by those of its step, or in
        evaluation by their own number; with return_outputs the pair (loss, None)."""
        return _distillation_loss(
            self, self.divergence, model, inputs, return_outputs, num_items_in_batch
        )


@contextmanager
def patch_trl(divergence: Divergence | str | None = None) -> Iterator[None]:
    """Give TRL's own `GKDTrainer` and `DistillationTrainer` the loss of ours, for a script.

    Math:
        As TRL's, which is ``1/n sum_i D_i`` with the n that TRL has counted: see `GKDTrainer` for
        D, and for where that n is not the number of tokens. Only with ``bf16=True`` and weights
        in fp32 is the loss of TRL's `DistillationTrainer` another: see `DistillationTrainer`.

    Within the context, also Trainers that were made before it have the loss, and those classes of
    TRL that inherit it; `GKDTrainer` and `DistillationTrainer` of this module keep their own.

    Args:
        divergence: a member of the family, or its name, such as "adaptive_kl"; by default that of
            the beta of each Trainer.

    Raises:
        ImportError: a version of TRL that is not tested, or whose methods have other arguments.
        TypeError, ValueError: divergence is not as above.

    Example:
        >>> from akl_triton.integrations.trl import patch_trl
        >>> with patch_trl():  # doctest: +SKIP
        ...     trl.experimental.gkd.GKDTrainer(student, teacher, args, ...).train()
    """
    check_trl()
    member = None if divergence is None else resolve(divergence)

    def with_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(
            self: Any,
            model: nn.Module,
            inputs: Mapping[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            return loss(self, member, model, inputs, return_outputs, num_items_in_batch)

        return compute_loss

    theirs = {kind: kind.compute_loss for kind in (_TheirGKD, _TheirDistillation)}
    _TheirGKD.compute_loss = with_loss(_gkd_loss)
    _TheirDistillation.compute_loss = with_loss(_distillation_loss)
    try:
        yield
    finally:
        for kind, compute_loss in theirs.items():
            kind.compute_loss = compute_loss


def check_trl() -> None:
    """The installed TRL is one that is tested, or an error says which are."""
    if ".".join(trl.__version__.split(".")[:2]) not in TESTED:
        raise ImportError(f"{_EXPECTED}, got {trl.__version__}; install trl~={TESTED[-1]}.0")
    for (kind, name), expected in _SIGNATURES.items():
        found = _without_annotations(getattr(kind, name))
        if found != expected:
            raise ImportError(
                f"{_EXPECTED}, in which {kind.__name__}.{name} is {expected}, got "
                f"{trl.__version__} with {found}; undo what else has replaced it, or install "
                f"trl~={TESTED[-1]}.0"
            )


def _without_annotations(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parameters = [
        x.replace(annotation=inspect.Parameter.empty) for x in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))


def _of_beta(beta: float) -> Divergence:
    """The divergence of TRL's beta, which is the weight of the teacher in the mixture, and at its
    ends a KL."""
    ends: dict[float, Divergence] = {0.0: ForwardKL(), 1.0: ReverseKL()}
    return ends[beta] if beta in ends else JensenShannon(beta)


def _gkd_loss(
    trainer: Any,
    divergence: Divergence | None,
    model: nn.Module,
    inputs: Mapping[str, Any],
    return_outputs: bool,
    num_items_in_batch: Any,
) -> Any:
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    trainer.teacher_model.eval()
    loss = distillation_loss_of_models(
        model,
        trainer.teacher_model,
        tokens,
        inputs["labels"],
        divergence=divergence or _of_beta(trainer.beta),
        num_items=num_items_in_batch,
    )
    if not return_outputs:
        return loss
    with torch.no_grad():
        return loss, model(**tokens)


def _distillation_loss(
    trainer: Any,
    divergence: Divergence | None,
    model: nn.Module,
    inputs: Mapping[str, Any],
    return_outputs: bool,
    num_items_in_batch: Any,
) -> Any:
    mode = "train" if trainer.model.training else "eval"
    if mode == "train":  # the tokens that were sampled for the step, on all processes
        num_items_in_batch = inputs["num_items_in_batch"] / trainer.accelerator.num_processes
    prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
    counts = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    trainer.teacher_model.eval()
    loss, stats = distillation_loss_of_models(
        model,
        trainer.teacher_model,
        {
            "input_ids": torch.cat([prompt, completion], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            **{name: inputs[name] for name in _OF_IMAGES if name in inputs},
        },
        torch.cat([torch.full_like(prompt, _IGNORED), completion.where(counts, _IGNORED)], 1),
        divergence=divergence or _of_beta(trainer.beta),
        temperature=trainer.temperature,
        num_items=num_items_in_batch,
        return_stats=True,
    )
    sums = torch.stack([stats.student_entropy.sum(), counts.sum().to(loss.device)])
    entropy, count = trainer.accelerator.gather(sums[None]).sum(0).tolist()
    trainer._metrics[mode]["entropy"].append(entropy / max(count, 1.0))
    return (loss, None) if return_outputs else loss
