"""Bad input: an error that names the argument, what was expected and what came, and no damage.

Every case is tried with and without inplace: whatever is wrong, nothing may have been overwritten.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from akl_triton import adaptive_kl, forward_kl, mixed_kl

V = 8


def logits(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, **options)


TEACHER = logits(2, 3, V)
LABELS = torch.zeros(2, 3, dtype=torch.long)


def computed() -> torch.Tensor:
    """Student logits as a model gives them: all is well, but for what a case replaces."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, V, generator=g, requires_grad=True) * 2


# (arguments that replace good ones, error, what its message says)
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "leading shape": (
        {"teacher_logits": logits(2, 4, V)},
        ValueError,
        r"teacher_logits: expected .*\[2, 3\], got \[2, 4, 8\] float32",
    ),
    "leading dimensions": (
        {"teacher_logits": logits(6, V)},
        ValueError,
        r"teacher_logits: expected .*\[2, 3\], got \[6, 8\] float32",
    ),
    "0-d": (
        {"student_logits": logits()},
        ValueError,
        r"student_logits: expected \[\.\.\., V\] with V >= 1, got \[\] float32",
    ),
    "no vocabulary": ({"student_logits": logits(2, 3, 0)}, ValueError, r"student_logits.*V >= 1"),
    "integers": (
        {"student_logits": logits(2, 3, V, dtype=torch.int64)},
        TypeError,
        r"student_logits: expected float32 or bfloat16 or float16, got \[2, 3, 8\] int64",
    ),
    "integer teacher": (
        {"teacher_logits": logits(2, 3, V, dtype=torch.int32)},
        TypeError,
        r"teacher_logits: expected float32 or .*, got \[2, 3, 8\] int32",
    ),
    "float64": ({"teacher_logits": TEACHER.double()}, TypeError, r"teacher_logits.*float64"),
    "no tensor": (
        {"teacher_logits": [[0.0]]},
        TypeError,
        r"teacher_logits.*torch.Tensor, got list",
    ),
    "no student": (
        {"student_logits": None},
        TypeError,
        r"student_logits: expected a torch.Tensor, got NoneType",
    ),
    "no labels": (
        {"labels": [[0, 0, 0], [0, 0, 0]]},
        TypeError,
        r"labels: expected a torch.Tensor, got list",
    ),
    "sparse": (
        {"student_logits": TEACHER.to_sparse()},
        TypeError,
        r"student_logits: expected a dense tensor, got \[2, 3, 8\] float32 of torch.sparse_coo",
    ),
    "device": (
        {"teacher_logits": logits(2, 3, V, device="meta")},
        ValueError,
        r"teacher_logits: expected the device of student_logits, cpu, got meta",
    ),
    "teacher requires grad": (
        {"teacher_logits": logits(2, 3, V, requires_grad=True)},
        ValueError,
        r"teacher_logits: .*not require grad.*got \[2, 3, 8\] float32 with requires_grad=True",
    ),
    "labels shape": (
        {"labels": LABELS[:, :2]},
        ValueError,
        r"labels: expected shape \[2, 3\].*got \[2, 2\]",
    ),
    "labels dtype": (
        {"labels": LABELS.float()},
        TypeError,
        r"labels: expected int64 or int32, got",
    ),
    "labels bool": (
        {"labels": LABELS.bool()},
        TypeError,
        r"labels: expected int64 or int32, got \[2, 3\] bool",
    ),
    "labels device": ({"labels": LABELS.to("meta")}, ValueError, r"labels: expected the device"),
    "mu 0": ({"mu": 0.0}, ValueError, r"mu: expected a finite number in \(0, 1\), got 0"),
    "mu 1": ({"mu": 1}, ValueError, r"mu: expected .*got 1"),
    "mu nan": ({"mu": float("nan")}, ValueError, r"mu: expected .*got nan"),
    "mu text": ({"mu": "0.5"}, TypeError, r"mu: expected a number, got str"),
    "mu bool": ({"mu": True}, TypeError, r"mu: expected a number, got bool"),
    "temperature 0": ({"temperature": 0.0}, ValueError, r"temperature: expected .*got 0"),
    "temperature negative": ({"temperature": -1.0}, ValueError, r"temperature: .*got -1"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, r"temperature: .*got nan"),
    "temperature bool": ({"temperature": True}, TypeError, r"temperature: .*number, got bool"),
    "temperature tensor": (
        {"temperature": torch.tensor(1.0)},
        TypeError,
        r"temperature: expected a number, got Tensor",
    ),
    "temperature inf": ({"temperature": float("inf")}, ValueError, r"temperature: .*got inf"),
    "softcap 0": ({"student_softcap": 0}, ValueError, r"student_softcap: expected .*got 0"),
    "softcap negative": ({"teacher_softcap": -5.0}, ValueError, r"teacher_softcap: .*got -5"),
    "softcap inf": ({"teacher_softcap": float("inf")}, ValueError, r"teacher_softcap: .*got inf"),
    "softcap bool": ({"student_softcap": True}, TypeError, r"student_softcap: .*number, got bool"),
    "scale 0": (
        {"student_logit_scale": 0.0},
        ValueError,
        r"student_logit_scale: expected a finite number in \(0, inf\), got 0",
    ),
    "scale None": (
        {"teacher_logit_scale": None},
        TypeError,
        r"teacher_logit_scale: expected a number, got NoneType",
    ),
    "head": (
        {"head": "top"},
        ValueError,
        r"head: expected one of 'exclusive', 'inclusive', got 'top'",
    ),
    "ties": ({"ties": "first"}, ValueError, r"ties: expected one of 'stable', 'average'"),
    "head tensor": (
        {"head": torch.ones(2)},
        ValueError,
        r"head: expected one of 'exclusive', 'inclusive', got Tensor$",
    ),
    "temperature of no fp32": (
        {"temperature": 10**400},
        ValueError,
        r"temperature: expected a finite number in \(0, inf\)",
    ),
    "reduction": ({"reduction": "batchmean"}, ValueError, r"reduction: expected one of 'none'"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend: expected one of 'auto'"),
    "scale_by_t2": ({"scale_by_t2": None}, TypeError, r"scale_by_t2: .*False, got NoneType"),
    "return_stats": ({"return_stats": "yes"}, TypeError, r"return_stats: .*False, got str"),
    "inplace": ({"inplace": 1}, TypeError, r"inplace: expected True or False, got int"),
    "ignore_index": (
        {"labels": LABELS, "ignore_index": None},
        TypeError,
        r"ignore_index: expected an int, got NoneType",
    ),
    "num_items 0": ({"num_items": 0}, ValueError, r"num_items: expected > 0, got 0"),
    "num_items negative": ({"num_items": -3}, ValueError, r"num_items: expected > 0, got -3"),
    "num_items tensor": (
        {"num_items": torch.tensor(-3)},
        ValueError,
        r"num_items: expected > 0, got -3",
    ),
    "num_items bool": ({"num_items": True}, TypeError, r"num_items: expected an int, got bool"),
    "num_items complex": (
        {"num_items": torch.tensor(1, dtype=torch.complex128)},
        ValueError,
        r"num_items: expected an int or a 0-d tensor, got \[\] complex128",
    ),
    "num_items device": (
        {"num_items": torch.tensor(1, device="meta")},
        ValueError,
        r"num_items: expected the device of student_logits, cpu, got meta",
    ),
    "num_items float": ({"num_items": 2.0}, TypeError, r"num_items: expected an int, got float"),
    "num_items vector": ({"num_items": torch.ones(2)}, ValueError, r"num_items: .*0-d.*got \[2\]"),
    "num_items of a sum": (
        {"num_items": 3, "reduction": "sum"},
        ValueError,
        r"num_items: expected None with reduction='sum'",
    ),
    "shift too long": (
        {"labels": LABELS, "shift": 3},
        ValueError,
        r"shift: expected less than .*got 3",
    ),
    "shift of one token": (
        {
            "student_logits": logits(V),
            "teacher_logits": logits(V),
            "labels": LABELS[0, 0],
            "shift": 1,
        },
        ValueError,
        r"shift: expected less than .*\[\] int64, got 1",
    ),
    "shift float": (
        {"labels": LABELS, "shift": 1.0},
        TypeError,
        r"shift: expected an int, got float",
    ),
    "shift negative": (
        {"labels": LABELS, "shift": -1},
        ValueError,
        r"shift: expected .*>= 0, got -1",
    ),
    "shift without labels": ({"shift": 1}, ValueError, r"shift: expected 0 where labels is None"),
}

# The same, of inplace=True alone.
INPLACE_CASES: dict[str, tuple[torch.Tensor, str]] = {
    "leaf": (
        logits(2, 3, V, requires_grad=True),
        r"inplace: expected .* computed by a model, got a leaf that requires grad \[2, 3, 8\]",
    ),
    "view of a leaf": (
        logits(6, V, requires_grad=True).view(2, 3, V),
        r"inplace: .*got a view of a leaf that requires grad \[2, 3, 8\]",
    ),
    "non-contiguous": (
        logits(2, 3, 2 * V)[..., ::2],
        r"inplace: expected contiguous student_logits, got a non-contiguous tensor \[2, 3, 8\]",
    ),
    "slice": (
        logits(2, 4, V)[:, :-1],
        r"inplace: .*got a non-contiguous tensor \[2, 3, 8\] float32 with strides \[32, 8, 1\]",
    ),
    "expanded": (
        logits(1, 1, V).expand(2, 3, V),
        r"inplace: expected contiguous student_logits, got an expanded tensor \[2, 3, 8\]",
    ),
}


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_teacher_that_would_be_overwritten(shift: int) -> None:
    memory = logits(5, V)
    student, teacher = memory[:3], memory[shift : shift + 3]
    before = memory.clone()
    with pytest.raises(ValueError, match=r"^inplace: expected teacher_logits that share no memory"):
        adaptive_kl(student, teacher, inplace=True)
    assert torch.equal(memory, before)
    adaptive_kl(memory[:2], memory[2:4], inplace=True)  # of one batch


def test_teacher_that_autograd_cannot_keep() -> None:
    with torch.inference_mode():
        teacher = TEACHER * 1
    with pytest.raises(ValueError, match=r"^teacher_logits: .*autograd can keep.*inference_mode"):
        adaptive_kl(computed(), teacher)
    adaptive_kl(computed(), teacher, inplace=True).backward()
    adaptive_kl(computed().detach(), teacher)


def dense(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to_dense().clone() if x.is_sparse else x.detach().clone()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_error(case: str, inplace: bool) -> None:
    changes, error, message = CASES[case]
    arguments: dict[str, Any] = {
        "student_logits": computed(),
        "teacher_logits": TEACHER,
        "inplace": inplace,
    } | changes
    tensors = [
        x for x in arguments.values() if isinstance(x, torch.Tensor) and x.device.type == "cpu"
    ]
    before = [dense(x) for x in tensors]
    with pytest.raises(error, match=f"^{message}"):
        adaptive_kl(**arguments)
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(dense(x), old)


@pytest.mark.parametrize("case", INPLACE_CASES)
def test_inplace_error(case: str) -> None:
    student, message = INPLACE_CASES[case]
    before = student.detach().clone()
    with pytest.raises(ValueError, match=f"^{message}"):
        adaptive_kl(student, TEACHER, inplace=True)
    assert torch.equal(student, before)
    adaptive_kl(student, TEACHER, inplace=False)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels run on CPU tensors"
)
@pytest.mark.parametrize("inplace", [False, True])
def test_triton_where_it_cannot_run(inplace: bool) -> None:
    student = computed()
    before = dense(student)
    with pytest.raises(ValueError, match=r"^backend: expected one that can run here, got 'triton'"):
        adaptive_kl(student, TEACHER, inplace=inplace, backend="triton")
    assert torch.equal(student, before)


def test_messages_hold_no_values() -> None:
    """Shapes and dtypes say enough, and logits may be anyone's."""
    student = torch.full((2, 3, V), 1234.5)
    with pytest.raises(ValueError) as error:
        adaptive_kl(student, torch.full((2, 4, V), 1234.5))
    assert "1234" not in str(error.value)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_weight(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight: expected a finite number in \[0, 1\]"):
        mixed_kl(computed(), TEACHER, weight=weight)


def test_a_fixed_weight_knows_no_head() -> None:
    with pytest.raises(TypeError, match="mu"):
        forward_kl(computed(), TEACHER, mu=0.5)  # type: ignore[call-arg]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "labels"])
def test_dtensor(name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        arguments: dict[str, Any] = {
            "student_logits": computed(),
            "teacher_logits": TEACHER,
            "labels": LABELS,
        }
        mesh = init_device_mesh("cpu", (1,))
        arguments[name] = distribute_tensor(arguments[name].detach(), mesh, [Replicate()])
        with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor, got a DTensor"):
            adaptive_kl(**arguments)
    finally:
        dist.destroy_process_group()
