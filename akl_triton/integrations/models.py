"""The loss of two causal language models, computed in the place of the student's lm_head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .. import checks
from ..divergences import AdaptiveKL, Divergence, resolve
from ..linear_losses import linear_distillation_loss
from ..losses import LossAndStats, shifted
from ..options import MODEL_LOSS_OPTIONS, ModelLossOptions, documented, resolved
from ..sharding import is_dtensor
from ..sparse import SparseTeacher
from .columns import of_same_tokens
from .heads import Found, HeadInfo, described, in_place_of, without_cache


@overload
def distillation_loss_of_models(
    student: nn.Module, teacher: nn.Module | SparseTeacher, inputs: Mapping[str, Any],
    labels: Tensor | None = None, *, divergence: Divergence | str = ..., shift: int = ...,
    tokenizers: tuple[Any, Any] | None = ..., same_vocabulary: bool = ...,
    return_stats: Literal[False] = False,
    **options: Unpack[ModelLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def distillation_loss_of_models(
    student: nn.Module, teacher: nn.Module | SparseTeacher, inputs: Mapping[str, Any],
    labels: Tensor | None = None, *, divergence: Divergence | str = ..., shift: int = ...,
    tokenizers: tuple[Any, Any] | None = ..., same_vocabulary: bool = ...,
    return_stats: Literal[True],
    **options: Unpack[ModelLossOptions],
) -> LossAndStats: ...  # fmt: skip
@overload
def distillation_loss_of_models(
    student: nn.Module, teacher: nn.Module | SparseTeacher, inputs: Mapping[str, Any],
    labels: Tensor | None = None, *, divergence: Divergence | str = ..., shift: int = ...,
    tokenizers: tuple[Any, Any] | None = ..., same_vocabulary: bool = ...,
    return_stats: bool,
    **options: Unpack[ModelLossOptions],
) -> Tensor | LossAndStats: ...  # fmt: skip
@documented(ModelLossOptions)
def distillation_loss_of_models(
    student: nn.Module,
    teacher: nn.Module | SparseTeacher,
    inputs: Mapping[str, Any],
    labels: Tensor | None = None,
    *,
    divergence: Divergence | str = AdaptiveKL(),  # noqa: B008 - it is frozen
    shift: int = 1,
    tokenizers: tuple[Any, Any] | None = None,
    same_vocabulary: bool = True,
    return_stats: bool = False,
    **options: Unpack[ModelLossOptions],
) -> Tensor | LossAndStats:
    """`distillation_loss` of the logits of two models, which are never whole.

    Math:
        ``distillation_loss(student(**inputs).logits, teacher(**inputs).logits, labels,
        shift=shift, ...)``, by `linear_distillation_loss` of the hidden states, weights and biases
        of both lm_heads, with the softcaps and scales that `describe_model` finds.

    The loss is computed in the place of the student's lm_head, and a call of the student, wrapped
    or not, returns it: gradients are reduced by DistributedDataParallel, and parameters gathered by
    ``fully_shard``, as in any other step. The adapters of PEFT are trained, also on the lm_head.
    The teacher is run first, under torch.no_grad(). Both run as they are: call ``teacher.eval()``
    if it has dropout. A teacher that is a `SparseTeacher` is not run at all.

    The first call for a model describes it, with two runs on eight tokens. After a change of its
    configuration, or for a model that does not run on tokens alone, call `describe_model`.

    Args:
        student, teacher: causal language models of transformers; the student also within PEFT,
            DistributedDataParallel or torch.compile, or after ``fully_shard``, the teacher
            likewise; one or both may be tensor parallel, with an lm_head that is column-parallel,
            over the same ranks (docs/trainers/distributed.md). Or a `SparseTeacher` ``[B, L, k]``
            in the place of the teacher: the pairs of position i are those that a teacher predicts
            there, for token i + 1, as its logits are.
        inputs: the arguments of both models, such as ``input_ids`` ``[B, L]`` and
            ``attention_mask``. With ``logits_to_keep`` the loss is that of the positions that it
            keeps.
        labels: ``[B, L]``, as in the batch of a trainer: the label of position i is token i. By
            default those in inputs. Without labels and mask, the positions count that the
            attention mask of inputs does not mask.
        divergence: a member of the family, or its name, such as "reverse_kl".
        shift: compare the logits of position i with label, mask and token weight i + shift.
        tokenizers: those of student and teacher, which have to have the same token for every id;
            None with a `SparseTeacher`, which has none.
        same_vocabulary: False where one side has more ids, which the other is taken to give the
            probability 0; True with a `SparseTeacher`.
        return_stats: also return `DivergenceStats`.
        {options}

    Shape:
        scalar, or that of labels for "none", with the positions that logits_to_keep keeps; with
        ``return_stats`` the pair (loss, stats).

    Dtype:
        models in fp32, bf16 or fp16, the two sides not necessarily alike, also under autocast. The
        loss is fp32.

    Raises:
        TypeError, ValueError: an argument is not as above, the vocabularies differ, or a loss
            cannot be computed in the place of the lm_head (see `describe_model`).

    Reference:
        See `AdaptiveKL` and `linear_distillation_loss`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from akl_triton.integrations import distillation_loss_of_models
        >>> sizes = dict(vocab_size=96, intermediate_size=32, num_hidden_layers=1)
        >>> student = LlamaForCausalLM(LlamaConfig(hidden_size=32, **sizes))
        >>> teacher = LlamaForCausalLM(LlamaConfig(hidden_size=64, **sizes))
        >>> ids = torch.randint(96, (2, 10))
        >>> loss = distillation_loss_of_models(student, teacher, {"input_ids": ids}, labels=ids)
        >>> loss.backward()
        >>> student.lm_head.weight.grad.shape
        torch.Size([96, 32])
    """
    member, given = resolved(
        "distillation_loss_of_models", resolve(divergence), MODEL_LOSS_OPTIONS, options
    )
    checks.check_flag("return_stats", return_stats)
    arguments = dict(inputs)
    labels_of_inputs = arguments.pop("labels", None)
    of_tokens = _of_tokens(
        arguments,
        labels_of_inputs if labels is None else labels,
        given.pop("mask", None),
        given.pop("token_weights", None),
        checks.check_shift("shift", shift),
        given.get("ignore_index", MODEL_LOSS_OPTIONS["ignore_index"].default),
    )
    student_found, ours = described(student, "student")
    of_teacher: dict[str, Any]
    if isinstance(teacher, SparseTeacher):
        check_no_other_side(tokenizers, same_vocabulary)
        teacher_size = None
        of_teacher = {"teacher_hidden": _kept_pairs(teacher, arguments)}
    else:
        teacher_found, theirs = described(teacher, "teacher")
        teacher_size = theirs.vocab_size
        check_vocabularies(
            ours.vocab_size, teacher_size, tokenizers, same_vocabulary, given.get("vocab_size")
        )
        of_teacher = _teacher_side(teacher, teacher_found, theirs, arguments)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        moved = {name: _on(hidden.device, x) for name, x in (of_teacher | of_tokens).items()}
        sides = {"student_weight": weight, "student_bias": bias, **moved}
        return linear_distillation_loss(
            hidden,
            divergence=member,
            return_stats=return_stats,
            student_logit_scale=ours.scale,
            student_softcap=ours.softcap,
            **of_same_tokens(sides, ours.vocab_size, teacher_size),
            **given,
        )

    with in_place_of(student, loss, "student"):
        return cast(
            "Tensor | LossAndStats", student(**{**without_cache(student_found.base), **arguments})
        )


def check_vocabularies(
    student_size: int,
    teacher_size: int,
    tokenizers: tuple[Any, Any] | None = None,
    same_vocabulary: bool = True,
    vocab_size: int | None = None,
) -> None:
    """Student and teacher have the same tokens, or an error says which ids differ.

    Without tokenizers their number alone can be compared. `vocab_size` is the option of the loss:
    the logits behind that many tokens are padding."""
    checks.check_flag("same_vocabulary", same_vocabulary)
    if vocab_size is not None:
        student_size, teacher_size = (min(x, vocab_size) for x in (student_size, teacher_size))
    common, all_of_them = sorted((student_size, teacher_size))
    if same_vocabulary and common != all_of_them:
        larger = "student" if student_size > teacher_size else "teacher"
        raise ValueError(
            f"teacher: expected the vocabulary of the student, {student_size} logits, got "
            f"{teacher_size}: the ids {common} to {all_of_them - 1} are the {larger}'s alone; if "
            "these are padding, pass vocab_size; if they are tokens that the other side never has, "
            "pass same_vocabulary=False"
        )
    if tokenizers is None:
        return
    if not (isinstance(tokenizers, tuple) and len(tokenizers) == 2):
        raise TypeError(
            "tokenizers: expected the pair (student's, teacher's), got "
            f"{checks.type_of(tokenizers)}"
        )
    different = different_ids(*tokenizers, len(tokenizers[0]), len(tokenizers[1]))
    if not same_vocabulary:
        different = [each for each in different if each[0] < common]
    if different:
        some = ", ".join(f"{i} ({ours!r} and {theirs!r})" for i, ours, theirs in different[:3])
        raise ValueError(
            "tokenizers: expected the same token for every id, got others for "
            f"{len(different)}: {some}{', ...' if len(different) > 3 else ''}; the loss compares "
            "logits of the same id: take a teacher that has the student's tokenizer"
        )


def check_no_other_side(tokenizers: object, same_vocabulary: bool) -> None:
    """Nothing compares the vocabularies where the teacher is pairs: it has none."""
    checks.check_flag("same_vocabulary", same_vocabulary)
    if tokenizers is not None or not same_vocabulary:
        name, value, given = (
            ("tokenizers", None, checks.type_of(tokenizers))
            if tokenizers is not None
            else ("same_vocabulary", True, False)
        )
        raise ValueError(
            f"{name}: expected {value} with a teacher that is pairs, whose vocabulary is not "
            f"known, got {given}; compare the tokenizers where the pairs are read "
            "(akl_triton.offline.open_pairs)"
        )


@functools.lru_cache(maxsize=4)
def different_ids(
    student: Any, teacher: Any, *_lengths: int
) -> list[tuple[int, str | None, str | None]]:
    """(id, the student's token, the teacher's) where they differ. Lengths tell whether tokens have
    been added to a tokenizer since."""
    ours, theirs = (
        {i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)
    )
    return [
        (i, ours.get(i), theirs.get(i))
        for i in sorted(ours.keys() | theirs.keys())
        if ours.get(i) != theirs.get(i)
    ]


def _of_tokens(
    inputs: Mapping[str, Any],
    labels: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    shift: int,
    ignore_index: int,
) -> dict[str, Tensor]:
    """Labels, mask and weights of the positions whose hidden states reach the lm_head."""
    given = {"labels": labels, "mask": mask, "token_weights": token_weights}
    of_tokens = {name: values for name, values in given.items() if values is not None}
    ids = inputs.get("input_ids")
    for name, values in of_tokens.items():
        checks.check_tensor(name, values)
        if ids is not None and values.shape != ids.shape:
            raise ValueError(
                f"{name}: expected shape {list(ids.shape)}, that of input_ids, got "
                f"{list(values.shape)}"
            )
    fill = {"labels": ignore_index, "mask": False, "token_weights": 0.0}
    of_positions = {name: shifted(values, shift, fill[name]) for name, values in of_tokens.items()}
    if labels is None and mask is None:
        attended = _attended(inputs)
        # Neither the padding nor what would follow the last token; nor a token after padding,
        # which that cannot predict.
        of_positions["mask"] = attended & shifted(attended, shift, False)
    keep = inputs.get("logits_to_keep", 0)
    return {name: _kept(values, keep) for name, values in of_positions.items()}


def _attended(inputs: Mapping[str, Any]) -> Tensor:
    """[B, L] bool, the tokens that are no padding."""
    ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask.bool()
    if not isinstance(ids, Tensor):
        raise ValueError(
            "labels: expected labels or a mask with inputs that have neither input_ids nor an "
            f"attention_mask [B, L], got None with {', '.join(inputs)}"
        )
    return torch.ones_like(ids, dtype=torch.bool)


def _kept(of_positions: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Those of [B, L, ...] that the argument of transformers keeps: the last few; the same ones of
    each sequence; [B, K] of each; or [B, L] bool, which gives one dimension."""
    if not isinstance(logits_to_keep, Tensor):
        return of_positions[:, -logits_to_keep:]  # all where it is 0
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype != torch.bool:
        sequences = torch.arange(len(logits_to_keep), device=logits_to_keep.device)
        return of_positions[sequences[:, None], logits_to_keep]
    return (
        of_positions[logits_to_keep]
        if logits_to_keep.dim() == 2
        else of_positions[:, logits_to_keep]
    )


def _kept_pairs(teacher: SparseTeacher, inputs: Mapping[str, Any]) -> SparseTeacher:
    """The pairs of the positions whose hidden states reach the lm_head."""
    ids, keep = inputs.get("input_ids"), inputs.get("logits_to_keep", 0)
    if ids is not None and teacher.shape != ids.shape:
        raise ValueError(
            f"teacher: expected pairs {list(ids.shape)}, of every position of input_ids, got a "
            f"SparseTeacher of {list(teacher.shape)}"
        )
    if isinstance(keep, int) and keep == 0:  # all
        return teacher
    return _of_each(teacher, lambda x: _kept(x, keep))


def _on(device: torch.device, x: Any) -> Any:
    """A tensor or pairs on the device, and what is neither as it is."""
    if isinstance(x, SparseTeacher) and x.device != device:
        return x.to(device)
    return x.to(device) if isinstance(x, Tensor) else x


def _of_each(teacher: SparseTeacher, function: Callable[[Tensor], Tensor]) -> SparseTeacher:
    """The pairs whose tensors are the function of those of the teacher."""
    tail = teacher.log_tail
    return dataclasses.replace(
        teacher,
        ids=function(teacher.ids),
        log_probs=function(teacher.log_probs),
        log_tail=None if tail is None else function(tail),
    )


def _teacher_side(
    teacher: nn.Module, found: Found, info: HeadInfo, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `linear_distillation_loss` that are of the teacher."""

    outer = found.linear.weight

    def parts(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        mine = [None if x is None else x.detach() for x in (weight, bias)]
        if is_dtensor(outer) and found.linear.weight is not outer:
            # Gathered for the forward, by FSDP2, and freed at its end.
            mine = [None if x is None else x.clone() for x in mine]
        return hidden, *mine

    device = found.base.device
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value
        for name, value in inputs.items()
    }
    with torch.no_grad(), in_place_of(teacher, parts, "teacher"):
        hidden, weight, bias = cast(
            "tuple[Tensor, Tensor, Tensor | None]",
            teacher(**{**without_cache(found.base), **arguments}),
        )
    return {
        "teacher_hidden": hidden,
        "teacher_weight": weight,
        "teacher_bias": bias,
        "teacher_logit_scale": info.scale,
        "teacher_softcap": info.softcap,
    }
