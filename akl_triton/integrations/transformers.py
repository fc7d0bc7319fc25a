"""The Trainer of transformers with the loss of a teacher: a mixin, and the two together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..divergences import AdaptiveKL, Divergence, resolve
from ..losses import distillation_loss, shifted
from ..options import MODEL_LOSS_OPTIONS, resolved
from ..sharding import is_dtensor
from ..sparse import SparseTeacher, check_supported
from .heads import described, innermost
from .models import check_no_other_side, check_vocabularies, distillation_loss_of_models
from .pairs import COLUMNS, TEMPERATURE, teacher_of

# The oldest version whose Trainer accumulates gradients rightly: those before 5.5.4 divide them by
# the number of micro-batches once more.
OLDEST = "5.6"
_IGNORED = -100  # the label of every collator and Trainer
# Those that a call does not give, and that the Trainer does not decide.
_OPTIONS = {
    name: option
    for name, option in MODEL_LOSS_OPTIONS.items()
    if option.check is not None and name not in ("ignore_index", "reduction")
}

if TYPE_CHECKING:
    _AnyTrainer = transformers.Trainer
else:
    _AnyTrainer = object


class DistillationMixin(_AnyTrainer):
    """A Trainer whose loss is that of a teacher: write it before any Trainer among the bases.

    Math:
        With the n tokens of a step, those of all its micro-batches and processes whose label is
        not -100, ``loss = 1/n sum_i loss_i``, where loss_i is `distillation_loss` of token i. The
        sum of what `compute_loss` returns, over the micro-batches and averaged over the processes
        as their gradients are, is this loss, however the tokens are distributed. With
        ``average_tokens_across_devices=False`` each process divides by its own tokens.

    The loss is computed by `distillation_loss_of_models` in the place of the student's lm_head, so
    that neither model has whole logits. Batches have ``labels``, where label i is token i or -100,
    as `DataCollatorForLanguageModeling` makes them. The teacher is put in eval mode and on the
    device of each process, unless ``device_map`` or ``fully_shard`` have placed it, and runs in the
    same autocast as the student; it is not saved with the student.

    Without a teacher_model the batches have the teacher's pairs, which were computed before:
    ``teacher_ids`` and ``teacher_log_probs`` ``[B, L, k]``, and ``teacher_log_tail`` ``[B, L]``,
    where the pairs of position i are of the distribution of token i + 1. `PairCollator` makes such
    batches of the datasets that `akl_triton.offline.open_pairs` opens. With
    ``teacher_temperature`` ``[B]`` in them, which those datasets have, the first batch of a
    training or an evaluation is compared with temperature.

    Every log of the training has the means of `DivergenceStats` over the tokens of all processes
    since the last one; none of them waits for the device before that. `evaluate` has the same,
    and the loss, over the tokens of the dataset: ``eval_loss`` depends neither on the batch size
    nor on the number of processes. Where logits are asked for, by ``compute_metrics``, `predict`
    or ``return_outputs``, the student is run once more for them, without gradients.

    Args:
        teacher_model: a causal language model of transformers, as for
            `distillation_loss_of_models`, or None where the batches have its pairs.
        divergence: a member of the family, or its name, such as "reverse_kl".
        tokenizers: those of student and teacher, which have to have the same token for every id.
        same_vocabulary: False where one side has more ids, which the other is taken to give the
            probability 0.
        temperature, kd_ratio, scale_by_t2, backend, chunk_bytes, accum_dtype: as for
            `distillation_loss_of_models`.
        args, kwargs: all others are the Trainer's.

    Raises:
        TypeError, ValueError: an argument is not as above; the vocabularies differ; a loss cannot
            be computed in the place of the lm_head (see `describe_model`); the Trainer is to
            change the loss (``compute_loss_func``, ``label_smoothing_factor``), or to spread a
            batch or a model over devices other than by data parallelism with a process for each.
            With FSDP and DeepSpeed, models are looked at in the first step. A batch has no labels;
            it has pairs besides a teacher_model, or neither there is; the pairs are of another
            temperature.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from akl_triton.integrations.transformers import DistillationMixin
        >>> class MyTrainer(DistillationMixin, Trainer):
        ...     pass
        >>> sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        >>> student, teacher = (LlamaForCausalLM(LlamaConfig(**sizes)) for _ in range(2))
        >>> arguments = TrainingArguments(report_to="none", use_cpu=True)
        >>> trainer = MyTrainer(
        ...     student, arguments, teacher_model=teacher, divergence="reverse_kl", kd_ratio=0.9
        ... )
        >>> trainer.divergence
        ReverseKL()
    """

    # `compute_loss` has divided by the tokens of all micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module | None = None,
        divergence: Divergence | str = AdaptiveKL(),  # noqa: B008 - it is frozen
        tokenizers: tuple[Any, Any] | None = None,
        same_vocabulary: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        self.divergence, options = resolved(
            type(self).__name__, resolve(divergence), _OPTIONS, given
        )
        self._loss_arguments: dict[str, Any] = {
            "divergence": self.divergence,
            "tokenizers": tokenizers,
            "same_vocabulary": same_vocabulary,
            **options,
        }
        self._statistics = _known_statistics(self.divergence, options.get("kd_ratio", 1.0))
        super().__init__(*args, **kwargs)
        # Before there was `loss_is_scaled_for_ga`, this said the same.
        self.model_accepts_loss_kwargs = True
        _check_trainer(self)
        model: Any = self.model
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        # Otherwise a parameter may be on no device yet, or not be whole.
        ours = described(model, "model")[1] if whole else None
        if teacher_model is None:
            check_no_other_side(tokenizers, same_vocabulary)
            check_supported(self.divergence, "bucket")
        else:
            if innermost(teacher_model, "teacher_model") is innermost(model, "model"):
                raise ValueError(
                    "teacher_model: expected a model apart from the student, got the same one; "
                    "pass copy.deepcopy(model)"
                )
            teacher_model = _placed(teacher_model.eval(), self.args.device)
            if ours is not None:
                _, theirs = described(teacher_model, "teacher_model")
                check_vocabularies(
                    ours.vocab_size,
                    theirs.vocab_size,
                    tokenizers,
                    same_vocabulary,
                    options.get("vocab_size"),
                )
        self.teacher_model = teacher_model
        self._temperature: float = options.get("temperature", 1.0)
        self._temperature_is_checked = False
        self._trained = self._no_sums()
        self._evaluated = self._no_sums("loss")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._temperature_is_checked = False
        self._trained = self._no_sums()
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step, and the number of tokens that its loss is the mean of."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [_valid(batch).sum().to(device) for batch in batches]
        count = torch.stack(counts).sum() if counts else torch.zeros((), device=device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, whose tokens are divided by num_items_in_batch, or by their
        own number; with return_outputs the pair (loss, outputs of the student)."""
        num_items: Tensor | float | None = num_items_in_batch
        if num_items is not None and self.args.average_tokens_across_devices:
            num_items = num_items / self.accelerator.num_processes  # DDP averages the gradients
        loss, columns = self._distil(model, inputs, num_items=num_items)
        if model.training:
            self._trained += torch.stack(columns).sum((1, 2))
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**_of_model(inputs))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, columns = self._distil(model, inputs, reduction="none")
        # By sequence: those that fill up the last batch are dropped where they are gathered.
        sequences = torch.stack([losses, *columns], -1).sum(1)
        self._evaluated += self.gather_function(sequences).sum(0)
        loss = losses.sum() / sequences[:, -1].sum().clamp(min=1.0)
        if prediction_loss_only:
            return loss, None, None
        _, logits, _ = super().prediction_step(model, _of_model(inputs), False, ignore_keys)
        return loss, logits, inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._temperature_is_checked = False
        self._evaluated = self._no_sums("loss")
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = _means(["loss", *self._statistics], self._evaluated)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training, not of evaluation or a summary
            sums = self.accelerator.gather(self._trained[None]).sum(0)
            self._trained = self._no_sums()
            logs.update(_means(self._statistics, sums))
        super().log(logs, start_time)

    def _distil(
        self, model: nn.Module, inputs: Mapping[str, Any], **options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss; the statistics [B, L] that are logged and, last of them, which tokens count."""
        valid = _valid(inputs)
        teacher = self._teacher_of(inputs)
        with self.accelerator.autocast():  # the student has its own, the teacher none
            loss, stats = distillation_loss_of_models(
                model,
                teacher,
                {**_of_model(inputs), "labels": inputs["labels"]},
                return_stats=True,
                **self._loss_arguments,
                **options,
            )
        columns = [*(getattr(stats, name) for name in self._statistics), valid.float()]
        device = self.args.device  # a device_map may have put the lm_head on another
        return loss.to(device), [x.to(device) for x in columns]

    def _teacher_of(self, inputs: Mapping[str, Any]) -> nn.Module | SparseTeacher:
        """The teacher_model, or the pairs of the batch."""
        columns = [name for name in (*COLUMNS, TEMPERATURE) if name in inputs]
        if self.teacher_model is not None:
            if columns:
                raise ValueError(
                    "teacher_model: expected None where the batch has the teacher's pairs, got "
                    f"{type(self.teacher_model).__name__} and a batch with {', '.join(columns)}; "
                    "pass one of the two"
                )
            return self.teacher_model
        if "teacher_ids" not in inputs:
            raise ValueError(
                "teacher_model: expected a model, or batches that have its pairs (teacher_ids, "
                f"teacher_log_probs), got None and a batch of {', '.join(inputs)}"
            )
        if TEMPERATURE in inputs and not self._temperature_is_checked:
            # Once, as it waits for the device.
            self._temperature_is_checked = True
            for found in inputs[TEMPERATURE].unique().tolist():
                if not math.isclose(found, self._temperature, rel_tol=1e-6):
                    raise ValueError(
                        f"temperature: expected {found:g}, that of the pairs in the batch, got "
                        f"{self._temperature:g}; pass temperature={found:g}, or pairs of another"
                    )
        return teacher_of(inputs, self._temperature)

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of a dataset that ``remove_unused_columns`` leaves."""
        super()._set_signature_columns_if_needed()
        known: Any = self._signature_columns
        known += [name for name in (*COLUMNS, TEMPERATURE) if name not in known]

    def _no_sums(self, *others: str) -> Tensor:
        """A sum for each statistic, and the number of tokens."""
        return torch.zeros(len(others) + len(self._statistics) + 1, device=self.args.device)


class DistillationTrainer(DistillationMixin, transformers.Trainer):
    """`transformers.Trainer` with the loss of a teacher: see `DistillationMixin`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from akl_triton.integrations.transformers import DistillationTrainer
        >>> sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        >>> student, teacher = (LlamaForCausalLM(LlamaConfig(**sizes)) for _ in range(2))
        >>> ids = torch.arange(8)
        >>> trainer = DistillationTrainer(
        ...     student,
        ...     TrainingArguments(max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True),
        ...     train_dataset=[{"input_ids": ids, "labels": ids}],
        ...     teacher_model=teacher,
        ... )
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        2
    """


def _check_trainer(trainer: transformers.Trainer) -> None:
    """Refuse what would change the loss, or would be ignored by it."""
    if Version(transformers.__version__) < Version(OLDEST):
        raise ImportError(
            f"transformers: expected {OLDEST} or newer, as the Trainer of older ones divides "
            f"accumulated gradients once more, got {transformers.__version__}; pip install "
            f"'transformers>={OLDEST}'"
        )
    args = trainer.args
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: expected None, as the loss is that of the divergence, got "
            f"{trainer.compute_loss_func!r}; a divergence of your own can be registered "
            "(akl_triton.register)"
        )
    if args.label_smoothing_factor != 0.0:
        raise ValueError(
            "args.label_smoothing_factor: expected 0, as the teacher says how likely other tokens "
            f"are, got {args.label_smoothing_factor}"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"args: expected one device for each process, got {args.n_gpu}, over which a Trainer "
            "spreads a batch by nn.DataParallel; start a process for each with torchrun or "
            "accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )
    sizes = {
        "tensor": trainer.get_tp_size(),
        "context": trainer.get_cp_size(),
        "sequence": trainer.get_sp_size(),
    }
    for kind, size in sizes.items():
        if size > 1:
            raise ValueError(
                "args.parallelism_config: expected data parallelism alone (DDP or FSDP), got "
                f"{kind} parallelism of size {size}"
            )


def _known_statistics(divergence: Divergence, kd_ratio: float) -> list[str]:
    """Those of `DivergenceStats` that a loss has; the others are NaN, whatever the logits."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    _, stats = distillation_loss(
        logits,
        logits.flip(-1),
        torch.zeros(1, dtype=torch.int64),
        divergence=divergence,
        kd_ratio=kd_ratio,
        return_stats=True,
    )
    return [name for name, x in stats._asdict().items() if not x.isnan()]


def _placed(teacher: nn.Module, device: torch.device) -> nn.Module:
    """The teacher on the device, unless others have placed its parts."""
    mapped = getattr(teacher, "hf_device_map", None) is not None
    return teacher if mapped or any(map(is_dtensor, teacher.parameters())) else teacher.to(device)


def _valid(inputs: Mapping[str, Any]) -> Tensor:
    """[B, L] bool, the positions whose next token has a label."""
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError(
            "inputs: expected labels [B, L], token i or -100 for each i, such as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes, got a batch of "
            f"{', '.join(inputs)}"
        )
    return shifted(labels, 1, _IGNORED) != _IGNORED


def _of_model(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the student is called with: neither labels nor the teacher's pairs."""
    others = ("labels", *COLUMNS, TEMPERATURE)
    return {name: value for name, value in inputs.items() if name not in others}


def _means(names: list[str], sums: Tensor) -> dict[str, float]:
    """The means of sums, whose last one is the number of tokens."""
    *values, count = sums.tolist()
    return {name: value / max(count, 1.0) for name, value in zip(names, values, strict=True)}
