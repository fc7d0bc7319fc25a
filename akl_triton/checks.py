"""Every check of user input, made once at the public door, before anything is launched or written.

Messages name the argument, what was expected and what came: shapes and dtypes, never values of
tensors. Nothing here reads data on a device, so nothing waits for one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32)
LARGEST = torch.finfo(torch.float32).max
# What to do instead of passing a part of a tensor.
LOCAL = "pass .full_tensor(), or .to_local() where it is not sharded over the vocabulary"
GATHER = (
    "gather it: call the loss in the forward of the module that fully_shard (or ZeRO-3, after "
    "register_external_parameter) gathers it for; see linear_adaptive_kl, Sharded parameters"
)


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Dtypes, devices and shapes of the two logits; the teacher must not ask for a gradient."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_tensor(name, logits)
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name}: expected {_join(LOGIT_DTYPES)}, got {_describe(logits)}")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected [..., V] with V >= 1, got {_describe(logits)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "teacher_logits: expected the leading dimensions of student_logits, "
            f"{list(student.shape[:-1])}, got {_describe(teacher)}"
        )
    check_device("teacher_logits", teacher, student)
    check_teacher("teacher_logits", teacher)


def check_teacher(name: str, teacher: Tensor) -> None:
    """The teacher gets no gradient."""
    if teacher.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that does not require grad (the teacher gets no "
            f"gradient: compute it under torch.no_grad() or pass {name}.detach()), "
            f"got {_describe(teacher)} with requires_grad=True"
        )


def check_projection(
    side: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    student_hidden: Tensor,
    autocast: bool,
) -> None:
    """hidden @ weight^T + bias of one side can be computed where student_hidden is."""
    tensors = {f"{side}_hidden": hidden, f"{side}_weight": weight}
    if bias is not None:
        tensors[f"{side}_bias"] = bias
    for name, tensor in tensors.items():
        check_tensor(name, tensor, GATHER)
        if tensor.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name}: expected {_join(LOGIT_DTYPES)}, got {_describe(tensor)}")
        if name != f"{side}_hidden" and tensor.numel() == 0:
            raise ValueError(
                f"{name}: expected the whole parameter, got {_describe(tensor)}, which is empty; "
                f"{GATHER}"
            )
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name}: expected a tensor with data, got {_describe(tensor)} on meta"
            )
        check_device(name, tensor, student_hidden, "student_hidden")
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


def check_chunk_bytes(chunk_bytes: object, bytes_per_row: int) -> None:
    """At least one row of logits of both sides."""
    check_integer("chunk_bytes", chunk_bytes)
    if chunk_bytes < bytes_per_row:  # type: ignore[operator]
        raise ValueError(
            f"chunk_bytes: expected at least {bytes_per_row}, the logits of one token on both "
            f"sides, got {chunk_bytes}"
        )


def check_accum_dtype(dtype: object) -> None:
    """A dtype that gradients can be summed in."""
    if dtype not in LOGIT_DTYPES:
        raise TypeError(f"accum_dtype: expected {_join(LOGIT_DTYPES)}, got {dtype}")


def check_labels(
    labels: Tensor | None,
    student: Tensor,
    shift: int,
    ignore_index: int,
    of: str = "student_logits",
) -> None:
    """Labels have the logits' leading shape; a shift needs them, and a sequence that is longer."""
    check_integer("ignore_index", ignore_index)
    check_integer("shift", shift)
    if shift < 0:
        raise ValueError(f"shift: expected an integer >= 0, got {shift}")
    if labels is None:
        if shift:
            raise ValueError(f"shift: expected 0 where labels is None, got {shift}")
        return
    check_tensor("labels", labels)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels: expected {_join(LABEL_DTYPES)}, got {_describe(labels)}")
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {list(student.shape[:-1])}, that of {of} without "
            f"the last dimension, got {_describe(labels)}"
        )
    check_device("labels", labels, student, of)
    if shift and (labels.dim() == 0 or shift >= labels.shape[-1]):
        raise ValueError(
            f"shift: expected less than the sequence length of labels {_describe(labels)}, "
            f"got {shift}"
        )


def check_num_items(
    num_items: int | Tensor | None, reduction: str, student: Tensor, of: str = "student_logits"
) -> None:
    """A count of tokens that replaces that of this batch in the mean."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items: expected None with reduction={reduction!r}, got a count")
    if isinstance(num_items, Tensor):
        check_tensor("num_items", num_items)
        if num_items.dim() != 0 or num_items.dtype == torch.bool or num_items.is_complex():
            raise ValueError(
                f"num_items: expected an int or a 0-d tensor, got {_describe(num_items)}"
            )
        if num_items.device.type != "cpu":
            check_device("num_items", num_items, student, of)
            return
        if torch.compiler.is_compiling():
            return
        num_items = num_items.item()  # type: ignore[assignment]
    else:
        check_integer("num_items", num_items)
    if not num_items > 0:  # also NaN
        raise ValueError(f"num_items: expected > 0, got {num_items}")


def check_inplace(student: Tensor, teacher: Tensor) -> None:
    """The student logits may be overwritten: nobody else's elements, and no parameter."""
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
    if not torch.compiler.is_compiling() and _overlap(student, teacher):
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
    if not torch.compiler.is_compiling() and tensor.is_inference():
        raise ValueError(
            f"{name}: expected a tensor that autograd can keep for the backward (compute it under "
            f"torch.no_grad(), or pass {name}.clone()), got {_describe(tensor)} made under "
            "torch.inference_mode()"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        came = repr(value) if isinstance(value, (str, int)) else type(value).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {came}")


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    closed: bool = False,
) -> None:
    """A number of fp32 strictly between the bounds, or between and including them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    inside = above <= value <= below if closed else above < value < below
    # NaN, too, is refused; math.isfinite would break a graph of torch.compile(dynamic=True).
    if not inside or not -LARGEST <= value <= LARGEST:
        brackets = "[]" if closed else "()"
        raise ValueError(
            f"{name}: expected a finite number in {brackets[0]}{above:g}, {below:g}{brackets[1]}, "
            f"got {value}"
        )


def check_logit_map(side: str, softcap: object, logit_scale: object) -> None:
    """Both > 0: the logits keep their order."""
    if softcap is not None:
        check_number(f"{side}_softcap", softcap, above=0.0)
    check_number(f"{side}_logit_scale", logit_scale, above=0.0)


def check_integer(name: str, value: object) -> None:
    """A Python int (a torch.SymInt under torch.compile)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_tensor(name: str, value: object, instead_of_dtensor: str = LOCAL) -> None:
    """A plain strided tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; {instead_of_dtensor}")
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got {_describe(value)} of {value.layout}"
        )


def check_device(name: str, tensor: Tensor, student: Tensor, of: str = "student_logits") -> None:
    """The device of the student."""
    if tensor.device != student.device:
        raise ValueError(
            f"{name}: expected the device of {of}, {student.device}, got {tensor.device}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _join(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
