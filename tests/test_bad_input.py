"""Bad input: an error that names the argument, what was expected and what came, and no damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from akl_triton import adaptive_kl, forward_kl, mixed_kl

V = 8


def logits(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, **options)


STUDENT, TEACHER = logits(2, 3, V), logits(2, 3, V)
LABELS = torch.zeros(2, 3, dtype=torch.long)

# (arguments that replace good ones, error, what its message says)
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "leading shape": (
        {"teacher_logits": logits(2, 4, V)},
        ValueError,
        r"teacher_logits: expected .*\[2, 3\], got \[2, 4, 8\] float32",
    ),
    "0-d": ({"student_logits": logits()}, ValueError, r"student_logits: expected \[\.\.\., V\]"),
    "no vocabulary": ({"student_logits": logits(2, 3, 0)}, ValueError, r"student_logits.*V >= 1"),
    "integers": (
        {"student_logits": logits(2, 3, V, dtype=torch.int64)},
        TypeError,
        r"student_logits: expected float32 or bfloat16 or float16, got \[2, 3, 8\] int64",
    ),
    "float64": ({"teacher_logits": TEACHER.double()}, TypeError, r"teacher_logits.*float64"),
    "no tensor": (
        {"teacher_logits": [[0.0]]},
        TypeError,
        r"teacher_logits.*torch.Tensor, got list",
    ),
    "sparse": ({"student_logits": STUDENT.to_sparse()}, TypeError, r"student_logits: .*dense"),
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
    "labels device": ({"labels": LABELS.to("meta")}, ValueError, r"labels: expected the device"),
    "mu 0": ({"mu": 0.0}, ValueError, r"mu: expected a finite number in \(0, 1\), got 0"),
    "mu 1": ({"mu": 1}, ValueError, r"mu: expected .*got 1"),
    "mu nan": ({"mu": float("nan")}, ValueError, r"mu: expected .*got nan"),
    "mu text": ({"mu": "0.5"}, TypeError, r"mu: expected a number, got str"),
    "mu bool": ({"mu": True}, TypeError, r"mu: expected a number, got bool"),
    "temperature 0": ({"temperature": 0.0}, ValueError, r"temperature: expected .*got 0"),
    "temperature inf": ({"temperature": float("inf")}, ValueError, r"temperature: .*got inf"),
    "head": (
        {"head": "top"},
        ValueError,
        r"head: expected one of 'exclusive', 'inclusive', got 'top'",
    ),
    "ties": ({"ties": "first"}, ValueError, r"ties: expected one of 'stable', 'average'"),
    "reduction": ({"reduction": "batchmean"}, ValueError, r"reduction: expected one of 'none'"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend: expected one of 'auto'"),
    "backend that cannot run": (
        {"backend": "triton"},
        ValueError,
        r"backend: expected .*got 'triton'",
    ),
    "flag": ({"inplace": 1}, TypeError, r"inplace: expected True or False, got int"),
    "num_items 0": ({"num_items": 0}, ValueError, r"num_items: expected > 0, got 0"),
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
    "shift negative": (
        {"labels": LABELS, "shift": -1},
        ValueError,
        r"shift: expected .*>= 0, got -1",
    ),
    "shift without labels": ({"shift": 1}, ValueError, r"shift: expected 0 where labels is None"),
    "inplace leaf": (
        {"student_logits": logits(2, 3, V, requires_grad=True), "inplace": True},
        ValueError,
        r"inplace: .*a leaf that requires grad \[2, 3, 8\]",
    ),
    "inplace non-contiguous": (
        {"student_logits": logits(2, 3, 2 * V)[..., ::2], "inplace": True},
        ValueError,
        r"inplace: expected contiguous.*non-contiguous",
    ),
    "inplace expanded": (
        {"student_logits": logits(1, 1, V).expand(2, 3, V), "inplace": True},
        ValueError,
        r"inplace: expected contiguous student_logits, got an expanded",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error(case: str) -> None:
    changes, error, message = CASES[case]
    arguments = {"student_logits": STUDENT, "teacher_logits": TEACHER, "labels": None} | changes
    tensors = [
        x for x in arguments.values() if isinstance(x, torch.Tensor) and x.device.type == "cpu"
    ]
    before = [x.to_dense().clone() if x.is_sparse else x.clone() for x in tensors]
    with pytest.raises(error, match=message):
        adaptive_kl(**arguments)
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(x.to_dense() if x.is_sparse else x, old)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_weight(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight: expected a finite number in \[0, 1\]"):
        mixed_kl(STUDENT, TEACHER, weight=weight)


def test_a_fixed_weight_knows_no_head() -> None:
    with pytest.raises(TypeError, match="mu"):
        forward_kl(STUDENT, TEACHER, mu=0.5)  # type: ignore[call-arg]


def test_dtensor() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = distribute_tensor(STUDENT, init_device_mesh("cpu", (1,)), [Shard(2)])
        with pytest.raises(TypeError, match=r"student_logits: expected a plain tensor, got a DT"):
            adaptive_kl(sharded, TEACHER)
    finally:
        dist.destroy_process_group()
