"""Every check of user input, made once at the public door, before anything is launched or written.

Messages name the argument, what was expected and what came: shapes and dtypes, never values of
tensors. Nothing here reads data on a device, so nothing waits for one.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from .divergences import Rule

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32)
LARGEST = torch.finfo(torch.float32).max
# The advice where a part of a tensor is passed.
LOCAL = "pass .full_tensor(), or .to_local() where it is not sharded over the vocabulary"
DENSE = {
    "AsyncCollectiveTensor": "pass .wait()",
    "MaskedTensor": "pass .get_data(), and what it masks as labels equal to ignore_index",
    "NestedTensor": "pass torch.nested.to_padded_tensor(...), and its padding as ignored labels",
}
# Subclasses that stand for a plain tensor while PyTorch traces.
TRACED = ("FakeTensor", "FunctionalTensor")
GATHER = (
    "gather it: call the loss in the forward of the module that fully_shard (or ZeRO-3, after "
    "register_external_parameter) gathers it for; see linear_adaptive_kl, Sharded parameters"
)


def check_logits(student: Tensor, teacher: Tensor, sharded: bool = False) -> None:
    """Dtypes, devices and shapes of the two logits; the teacher must not ask for a gradient."""
    check_vocabulary("student_logits", student, sharded)
    check_vocabulary("teacher_logits", teacher, sharded)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "teacher_logits: expected the leading dimensions of student_logits, "
            f"{list(student.shape[:-1])}, got {_describe(teacher)}"
        )
    check_device("teacher_logits", teacher, student)
    check_teacher("teacher_logits", teacher)


def check_vocabulary(name: str, logits: Tensor, sharded: bool = False) -> None:
    """Logits of at least one token, but for a shard, in a dtype that they may have."""
    check_tensor(name, logits)
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}: expected {_join(LOGIT_DTYPES)}, got {_describe(logits)}")
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not sharded):
        raise ValueError(f"{name}: expected [..., V] with V >= 1, got {_describe(logits)}")


def check_pairs(
    ids: Tensor, log_probs: Tensor, log_tail: Tensor | None, outside: str, most: int
) -> None:
    """Dtypes, devices and shapes of a teacher's pairs, which ask for no gradient."""
    check_tensor("ids", ids)
    if ids.dtype not in LABEL_DTYPES:
        raise TypeError(f"ids: expected {_join(LABEL_DTYPES)}, got {_describe(ids)}")
    if ids.dim() == 0 or not 1 <= ids.shape[-1] <= most:
        raise ValueError(f"ids: expected [..., k] with 1 <= k <= {most}, got {_describe(ids)}")
    shapes = {"log_probs": (log_probs, ids.shape), "log_tail": (log_tail, ids.shape[:-1])}
    for name, (values, shape) in shapes.items():
        if values is None and name == "log_tail":
            continue
        check_tensor(name, values)
        assert values is not None
        if values.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name}: expected {_join(LOGIT_DTYPES)}, got {_describe(values)}")
        if values.shape != shape:
            raise ValueError(
                f"{name}: expected {list(shape)}, for ids {_describe(ids)}, got {_describe(values)}"
            )
        check_device(name, values, ids, "ids")
        check_teacher(name, values)
    if log_tail is not None and outside != "bucket":
        raise ValueError(
            f"log_tail: expected None with outside={outside!r}, where the teacher has nothing but "
            f"its pairs, got {_describe(log_tail)}; use outside='bucket'"
        )


def check_ids(ids: Tensor, valid: Tensor | None, vocabulary: int) -> None:
    """The pairs [N, k] of the rows that count are tokens: values are read on a CPU only."""
    if ids.device.type != "cpu" or is_traced(ids):
        return
    no_token = (ids >= vocabulary) & (ids != torch.iinfo(ids.dtype).max)  # the last is no pair
    if valid is not None:
        no_token &= valid[:, None]
    if bool(no_token.any()):
        raise ValueError(
            f"ids: expected tokens from 0 to {vocabulary - 1}, those of the student, or negative "
            f"ids where there is no pair, got {int(ids[no_token][0])}"
        )


def check_sums(
    ids: Tensor, log_probs: Tensor, log_tail: Tensor | None, outside: str, tolerance: float
) -> None:
    """No ascending id comes twice, and probabilities sum to 1 at most, with a tail to 1: values are
    read on a CPU only."""
    if ids.device.type != "cpu" or is_traced(ids, log_probs) or not ids.numel():
        return
    largest = torch.iinfo(ids.dtype).max  # of those that are no pair
    if bool(((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] != largest)).any()):
        raise ValueError("ids: expected ids of which no row has one twice, got one that has")
    if outside == "renormalise":
        return
    logs = log_probs.float()
    p = logs.exp()
    total = p.sum(-1)
    # What is fp32 here may have been stored in fp16.
    eps = max(torch.finfo(log_probs.dtype).eps, torch.finfo(torch.float16).eps)
    rounding = eps * (p * logs.clamp(min=-100.0)).abs().sum(-1)
    if log_tail is not None:
        total = total + log_tail.float().exp()
    excess = (total - 1.0).where(ids[..., 0] != largest, 0.0)
    if bool((excess > tolerance + rounding).any()):
        raise ValueError(
            "log_probs: expected probabilities that sum to no more than 1 in each row"
            f"{' with log_tail' if log_tail is not None else ''}, got a sum of "
            f"{1.0 + float(excess.max()):.4g}; they are natural logarithms of a softmax"
        )
    if log_tail is not None and bool((-excess > tolerance + rounding).any()):
        raise ValueError(
            "log_tail: expected ln of the mass of all tokens that are no pair, with which the "
            f"probabilities of each row sum to 1, got a sum of {1.0 + float(excess.min()):.4g}"
        )


def check_teacher(name: str, teacher: Tensor) -> None:
    """The teacher gets no gradient."""
    if wants_gradient(teacher):
        raise ValueError(
            f"{name}: expected a tensor that does not require grad (the teacher gets no "
            f"gradient: compute it under torch.no_grad() or pass {name}.detach()), "
            f"got {_describe(teacher)} with requires_grad=True"
        )


def check_no_projection(weight: Tensor | None, bias: Tensor | None) -> None:
    """A teacher that is pairs has neither a weight nor a bias."""
    for name, tensor in {"teacher_weight": weight, "teacher_bias": bias}.items():
        if tensor is not None:
            raise ValueError(
                f"{name}: expected None with a SparseTeacher, of which nothing is projected, got "
                f"{_describe(tensor) if isinstance(tensor, Tensor) else type_of(tensor)}"
            )


def check_projection(
    side: str,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    student_hidden: Tensor,
    autocast: bool,
    sharded: bool = False,
) -> None:
    """hidden @ weight^T + bias of one side can be computed where student_hidden is."""
    if weight is None:
        raise TypeError(
            f"{side}_weight: expected a torch.Tensor, got NoneType; only a SparseTeacher in the "
            "place of teacher_hidden does without"
        )
    tensors = {f"{side}_hidden": hidden, f"{side}_weight": weight}
    if bias is not None:
        tensors[f"{side}_bias"] = bias
    for name, tensor in tensors.items():
        check_tensor(name, tensor, GATHER)
        if tensor.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name}: expected {_join(LOGIT_DTYPES)}, got {_describe(tensor)}")
        if name != f"{side}_hidden" and tensor.numel() == 0 and not sharded:
            raise ValueError(
                f"{name}: expected the whole parameter, got {_describe(tensor)}, which is empty; "
                f"{GATHER}"
            )
        check_device(name, tensor, student_hidden, "student_hidden")
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name}: expected a tensor with data, got {_describe(tensor)} on meta"
            )
        if side == "teacher":
            check_teacher(name, tensor)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{side}_hidden: expected [..., H] with H >= 1, got {_describe(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight: expected [V, {hidden.shape[-1]}], for {side}_hidden "
            f"{_describe(hidden)}, got {_describe(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side}_bias: expected [{weight.shape[0]}], for {side}_weight {_describe(weight)}, "
            f"got {_describe(bias)}"
        )
    if hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"{side}_hidden: expected the leading dimensions of student_hidden, "
            f"{list(student_hidden.shape[:-1])}, got {_describe(hidden)}"
        )
    for name, tensor in tensors.items():
        if not autocast and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected the dtype of {side}_hidden {_describe(hidden)} (or autocast), "
                f"got {_describe(tensor)}"
            )


def check_chunk(chunk_bytes: int, bytes_per_row: int) -> None:
    """At least one row of logits of both sides."""
    if chunk_bytes < bytes_per_row:
        raise ValueError(
            f"chunk_bytes: expected at least {bytes_per_row}, the logits of one token on both "
            f"sides, got {chunk_bytes}"
        )


def check_accum_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """A dtype that gradients can be summed in."""
    if dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}: expected {_join(LOGIT_DTYPES)}, got {dtype}")
    return dtype


def check_tokens(
    labels: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    shift: int,
    student: Tensor,
    of: str = "student_logits",
) -> None:
    """Labels, mask and weights have the logits' leading shape, and a fitting dtype."""
    given = {"labels": labels, "mask": mask, "token_weights": token_weights}
    of_tokens = {name: values for name, values in given.items() if values is not None}
    for name, values in of_tokens.items():
        check_tensor(name, values)
    if labels is not None and labels.dtype not in LABEL_DTYPES:
        hint = "; pass booleans as mask" if labels.dtype == torch.bool else ""
        raise TypeError(f"labels: expected {_join(LABEL_DTYPES)}, got {_describe(labels)}{hint}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            "mask: expected bool, True for the tokens that count (pass mask.bool()), got "
            f"{_describe(mask)}"
        )
    if token_weights is not None:
        if not token_weights.dtype.is_floating_point:
            raise TypeError(
                f"token_weights: expected a floating dtype, got {_describe(token_weights)}; pass "
                "booleans as mask"
            )
        if wants_gradient(token_weights):
            raise ValueError(
                "token_weights: expected a tensor that does not require grad (pass .detach()), "
                f"got {_describe(token_weights)} with requires_grad=True"
            )
    for name, values in of_tokens.items():
        if values.shape != student.shape[:-1]:
            raise ValueError(
                f"{name}: expected shape {list(student.shape[:-1])}, that of {of} without "
                f"the last dimension, got {_describe(values)}"
            )
        check_device(name, values, student, of)
        if shift and values.dim() == 0:
            raise ValueError(
                f"shift: expected 0 where {name} have no sequence, {_describe(values)}, got {shift}"
            )
    if shift and not of_tokens:
        raise ValueError(f"shift: expected 0 where {', '.join(given)} are None, got {shift}")


def check_vocab_size(vocab_size: int | None, widths: Mapping[str, int]) -> int:
    """The number of tokens, which both sides have; without it those of the student, the first."""
    if vocab_size is None:
        return next(iter(widths.values()))
    if vocab_size < 1 or any(vocab_size > width for width in widths.values()):
        of_each = ", ".join(f"{width} of {name}" for name, width in widths.items())
        raise ValueError(
            f"vocab_size: expected an integer from 1 to {min(widths.values())}, of {of_each}, got "
            f"{vocab_size}"
        )
    return vocab_size


def check_targets(
    labels: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
    ignore_index: int,
    vocabulary: int,
) -> None:
    """Labels that the loss needs are tokens of the student. Their values are read on a CPU only."""
    if not rule.needs_labels:
        return
    name = type(rule.divergence).__name__
    if labels is None and rule.divergence.needs_labels:
        raise ValueError(f"labels: expected the token of each position for {name}, got None")
    if labels is None:
        raise ValueError(
            "kd_ratio: expected 1 without labels, of which the cross-entropy would be, got "
            f"{1.0 - rule.label_weight:g}"
        )
    if labels.device.type != "cpu" or is_traced(labels):
        return
    no_token = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if mask is not None:
        no_token &= mask
    if no_token.any():
        raise ValueError(
            f"labels: expected {ignore_index} or tokens from 0 to {vocabulary - 1}, those of the "
            f"student, as {'kd_ratio is not 1' if rule.label_weight else f'{name} needs them'}, "
            f"got {int(labels[no_token][0])}"
        )


def check_shift(name: str, shift: object) -> int:
    """Check the number of positions by which a label is ahead of the logits that predict it."""
    checked = check_integer(name, shift)
    if checked < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {checked}")
    return checked


def check_num_items(
    num_items: object, reduction: str, student: Tensor, of: str = "student_logits"
) -> float | Tensor | None:
    """The number that replaces the count of this batch in the mean; 0, which a step without tokens
    has, is taken as 1.

    A tensor stays a tensor, so that nobody waits for it."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f"num_items: expected None with reduction={reduction!r}, got a count")
    if not isinstance(num_items, Tensor):
        count = check_number("num_items", num_items)
        if count < 0:
            raise ValueError(f"num_items: expected >= 0, got {num_items}")
        return count if count else 1.0
    check_tensor("num_items", num_items)
    if num_items.dim() != 0 or num_items.dtype == torch.bool or num_items.is_complex():
        raise ValueError(
            f"num_items: expected a number or a 0-d tensor, got {_describe(num_items)}"
        )
    if num_items.device.type != "cpu":
        check_device("num_items", num_items, student, of)
    elif not (is_traced(num_items) or num_items >= 0):  # also NaN
        raise ValueError(f"num_items: expected >= 0, got {num_items.item()}")
    items = num_items.float()
    return items.masked_fill(items == 0, 1.0)


def check_inplace(student: Tensor, teacher: Tensor) -> None:
    """The student logits may be overwritten: nobody else's elements, and no parameter."""
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_get_level(student) > 0:
        raise ValueError(
            "inplace: expected student_logits that no transform of torch.func has wrapped (they "
            "cannot be overwritten: pass inplace=False), got "
            f"{_describe(student)} under torch.func"
        )
    if not student.is_contiguous():
        what = "an expanded" if 0 in student.stride() else "a non-contiguous"
        raise ValueError(
            f"inplace: expected contiguous student_logits, got {what} tensor {_describe(student)} "
            f"with strides {list(student.stride())}"
        )
    owner = student if student._base is None else student._base
    if student.requires_grad and owner.is_leaf and owner.requires_grad:
        what = "a leaf" if owner is student else "a view of a leaf"
        raise ValueError(
            f"inplace: expected student_logits computed by a model, got {what} that requires grad "
            f"{_describe(student)}, which must not be overwritten"
        )
    if not is_traced(student, teacher) and _overlap(student, teacher):
        raise ValueError(
            "inplace: expected teacher_logits that share no memory with student_logits, got "
            f"{_describe(teacher)}, of which some would be overwritten"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes from the first to the last element of both have any in common."""
    if a.device.type == "meta" or not a.numel() or not b.numel():
        return False
    (first_a, end_a), (first_b, end_b) = _span(a), _span(b)
    return first_a < end_b and first_b < end_a


def _span(x: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def check_can_be_saved(name: str, tensor: Tensor) -> None:
    """Autograd keeps no tensors of torch.inference_mode() for a backward."""
    # A compiled graph cannot ask, and says so itself where it keeps one.
    if not is_traced(tensor) and tensor.is_inference():
        raise ValueError(
            f"{name}: expected a tensor that autograd can keep for the backward (compute it under "
            f"torch.no_grad(), or pass {name}.clone()), got {_describe(tensor)} made under "
            "torch.inference_mode()"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        came = repr(value) if isinstance(value, (str, int)) else type(value).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {came}")
    return value


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    closed: bool = False,
    instead: str = "",
    without: Mapping[float, str] | None = None,
) -> float:
    """A number of fp32 strictly between the bounds, or between and including them.

    `instead` is what the message says to use where it is not; `without` are numbers that are
    refused, each with what to use in its place."""
    # torch.compile knows its own numbers, but not that they are numbers.Real.
    if isinstance(value, bool) or not isinstance(
        value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
    ):
        raise TypeError(f"{name}: expected a number, got {type_of(value)}")
    number: Any = value
    inside = above <= number <= below if closed else above < number < below
    # NaN, too, is refused; math.isfinite would break a graph of torch.compile(dynamic=True).
    if not inside or not -LARGEST <= number <= LARGEST:
        brackets = ("[" if closed else "(") + ("]" if closed and below < math.inf else ")")
        raise ValueError(
            f"{name}: expected a finite number in {brackets[0]}{above:g}, {below:g}{brackets[1]}, "
            f"got {value}{instead and f'; {instead}'}"
        )
    if without and number in without:
        excluded = " or ".join(f"{x:g}" for x in without)
        raise ValueError(
            f"{name}: expected a number that is not {excluded}, got {value}; use {without[number]}"
        )
    return float(number)


def check_softcap(name: str, value: object) -> float | None:
    """None, or > 0: the logits keep their order."""
    return None if value is None else check_number(name, value, above=0.0)


def check_integer(name: str, value: object) -> int:
    """An int, or what Python would take for one as an index (a torch.SymInt is kept)."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if value is True or value is False or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type_of(value)}") from None


def check_optional_integer(name: str, value: object) -> int | None:
    """None, or an int."""
    return None if value is None else check_integer(name, value)


def check_flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def check_group(name: str, group: object) -> str | None:
    """A process group that this rank is in, as its name; None where it is alone in it."""
    if group is None:
        return None
    if isinstance(group, str):
        try:
            group = distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
        except RuntimeError as error:
            raise ValueError(
                f"{name}: expected a process group or the name of one, got {group!r}"
            ) from error
    if not isinstance(group, distributed_c10d.ProcessGroup):
        outside = group is distributed_c10d.GroupMember.NON_GROUP_MEMBER
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup or the name of one, got "
            f"{'one that this rank is not in' if outside else type_of(group)}"
        )
    return group.group_name if group.size() > 1 else None


# torch.compiler.assume_constant_result sets this, too, but imports all of torch._dynamo.
check_group._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_tensor(name: str, value: object, instead_of_dtensor: str = LOCAL) -> None:
    """A plain strided tensor, of whose derivatives there are only those that exist."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type_of(value)}")
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; {instead_of_dtensor}")
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a plain tensor, got a nested one; {DENSE['NestedTensor']}"
        )
    kind = type(value)
    # A subclass with a dispatch of its own has no data that a kernel could read.
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and kind.__name__ not in TRACED:
        instead = DENSE.get(kind.__name__, "pass .dequantize(), or the plain tensor it stands for")
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{name}: expected a plain tensor, got {article} {kind.__name__}; {instead}"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got {_describe(value)} of {value.layout}"
        )
    _check_transforms(name, value)


def _check_transforms(name: str, tensor: Tensor) -> None:
    """Refuse the derivatives that the operators have no formula for.

    Without this, forward mode would give 0 without a word, and torch.func.grad an error of
    PyTorch's about how the operators are written. Reverse mode and vmap have their rules."""
    if torch.compiler.is_compiling():
        came = _unsupported_transform()
    else:
        came = _unsupported_derivative(tensor)
    if came is not None:
        raise RuntimeError(
            f"akl_triton: {name}: expected a tensor whose gradient loss.backward() or "
            f"torch.autograd.grad asks for, the only derivative that the losses have, got {came}"
        )


FORWARD_MODE = "one with a tangent (torch.func.jvp, or forward-mode AD)"
TRANSFORMED = "one that torch.func.grad (or vjp) differentiates"


def _unsupported_transform() -> str | None:
    """While compiling, all transforms of torch.func count: whose tensors they are is not known."""
    found = {i.key().name for i in torch._C._functorch.get_interpreter_stack() or ()}
    if "Jvp" in found:
        return FORWARD_MODE
    return TRANSFORMED if "Grad" in found else None


# torch.compiler.assume_constant_result sets this, too, but imports all of torch._dynamo.
_unsupported_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unsupported_derivative(tensor: Tensor) -> str | None:
    functorch = torch._C._functorch
    # A tensor that vmap has wrapped cannot be asked for a tangent.
    dual = forward_ad._current_level >= 0 and not functorch.is_batchedtensor(tensor)
    if dual and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        return FORWARD_MODE
    transforms = {i.level(): i.key().name for i in functorch.get_interpreter_stack() or ()}
    outermost = tensor
    while functorch.is_functorch_wrapped_tensor(tensor):
        transform = transforms.get(functorch.maybe_get_level(tensor))
        if transform == "Grad" and tensor.requires_grad:
            return TRANSFORMED
        # The tangent of an inner level cannot be asked for, so that any is taken to have one.
        if transform == "Jvp" and tensor is not outermost:
            return FORWARD_MODE
        tensor = functorch.get_unwrapped(tensor)
    return None


def wants_gradient(tensor: Tensor) -> bool:
    """Whether the tensor requires grad or, inside vmap, the tensor of which it is a slice does."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_batchedtensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def is_traced(*tensors: Tensor) -> bool:
    """Whether a tensor has no data to look at: under torch.compile, export or torch.func."""
    return torch.compiler.is_compiling() or any(
        isinstance(x, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(x)
        for x in tensors
    )


def check_device(name: str, tensor: Tensor, student: Tensor, of: str = "student_logits") -> None:
    """The device of the student."""
    if tensor.device != student.device:
        raise ValueError(
            f"{name}: expected the device of {of}, {student.device}, got {tensor.device}"
        )


def type_of(value: object) -> str:
    """The type as an error names it: float32 alone could be anybody's."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _join(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
