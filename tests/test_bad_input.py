"""Bad input gives an error that names the argument, what was expected and what was given, and does
no damage. Every case is tried with and without inplace: whatever is wrong, nothing may have been
overwritten.
"""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.masked

from akl_triton import (
    AdaptiveKL,
    AdaptiveKLLoss,
    LinearDistillationLoss,
    MixedKL,
    adaptive_kl,
    distillation_loss,
    divergence,
    forward_kl,
    linear_adaptive_kl,
    mixed_kl,
)

V = 8


def logits(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, **options)


TEACHER = logits(2, 3, V)
LABELS = torch.zeros(2, 3, dtype=torch.long)


def computed() -> torch.Tensor:
    """Student logits as a model computes them; all arguments are good, except those that a case
    replaces."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, V, generator=g, requires_grad=True) * 2


# (arguments that replace good ones, error, pattern of its message)
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
        r"temperature: expected a number, got torch.Tensor",
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
    "temperature of numpy": (
        {"temperature": np.float32(-1.0)},
        ValueError,
        r"temperature: expected a finite number in \(0, inf\), got -1",
    ),
    "temperature of a vector": (
        {"temperature": np.ones(1)},
        TypeError,
        r"temperature: expected a number, got numpy.ndarray",
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
    "num_items negative": ({"num_items": -3}, ValueError, r"num_items: expected >= 0, got -3"),
    "num_items tensor": (
        {"num_items": torch.tensor(-3)},
        ValueError,
        r"num_items: expected >= 0, got -3",
    ),
    "num_items nan": (
        {"num_items": float("nan")},
        ValueError,
        r"num_items: expected a finite number .*got nan",
    ),
    "num_items inf": (
        {"num_items": float("inf")},
        ValueError,
        r"num_items: expected a finite number",
    ),
    "num_items bool": ({"num_items": True}, TypeError, r"num_items: expected a number, got bool"),
    "num_items complex": (
        {"num_items": torch.tensor(1, dtype=torch.complex128)},
        ValueError,
        r"num_items: expected a number or a 0-d tensor, got \[\] complex128",
    ),
    "num_items device": (
        {"num_items": torch.tensor(1, device="meta")},
        ValueError,
        r"num_items: expected the device of student_logits, cpu, got meta",
    ),
    "num_items vector": ({"num_items": torch.ones(2)}, ValueError, r"num_items: .*0-d.*got \[2\]"),
    "num_items of a sum": (
        {"num_items": 3, "reduction": "sum"},
        ValueError,
        r"num_items: expected None with reduction='sum'",
    ),
    "shift of one token": (
        {
            "student_logits": logits(V),
            "teacher_logits": logits(V),
            "labels": LABELS[0, 0],
            "shift": 1,
        },
        ValueError,
        r"shift: expected 0 where labels have no sequence, \[\] int64, got 1",
    ),
    "boolean labels": (
        {"labels": LABELS.bool()},
        TypeError,
        r"labels: expected int64 or int32, got \[2, 3\] bool; pass booleans as mask",
    ),
    "mask of integers": (
        {"mask": LABELS},
        TypeError,
        r"mask: expected bool, True for the tokens that count \(pass mask.bool\(\)\), got",
    ),
    "mask shape": ({"mask": LABELS[:1].bool()}, ValueError, r"mask: expected shape \[2, 3\]"),
    "boolean weights": (
        {"token_weights": LABELS.bool()},
        TypeError,
        r"token_weights: expected a floating dtype, got \[2, 3\] bool; pass booleans as mask",
    ),
    "trained weights": (
        {"token_weights": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        r"token_weights: expected a tensor that does not require grad \(pass .detach\(\)\)",
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
    "shift without labels": (
        {"shift": 1},
        ValueError,
        r"shift: expected 0 where labels, mask, token_weights are None, got 1",
    ),
}

# The same for inplace=True alone.
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


def test_a_strided_teacher_is_as_long_as_its_strides() -> None:
    """Rows 0, 2 and 4 of a buffer whose rows 3, 4 and 5 would be overwritten."""
    memory = torch.randn(6, V)
    with pytest.raises(ValueError, match=r"^inplace: expected teacher_logits that share no memory"):
        adaptive_kl(memory[3:], memory[::2], inplace=True)
    adaptive_kl(memory[3:], memory[:3], inplace=True)


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
    """An error shows shapes and dtypes only, as logits may be confidential."""
    student = torch.full((2, 3, V), 1234.5)
    with pytest.raises(ValueError) as error:
        adaptive_kl(student, torch.full((2, 4, V), 1234.5))
    assert "1234" not in str(error.value)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha: expected a finite number in \[0, 1\]"):
        mixed_kl(computed(), TEACHER, alpha=alpha)


def test_a_misspelt_option_is_told_what_it_may_have_meant() -> None:
    with pytest.raises(TypeError, match=r"^adaptive_kl: .*got temprature; did you mean temperat"):
        adaptive_kl(computed(), TEACHER, temprature=2.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"^MixedKL: expected options among alpha, got alhpa; did"):
        divergence("mixed_kl", alhpa=0.5)


def test_an_unknown_divergence_is_told_the_family() -> None:
    with pytest.raises(
        ValueError, match=r"^divergence: expected one of 'reverse_kl', .*got 'revers"
    ):
        distillation_loss(computed(), TEACHER, divergence="revers_kl")
    with pytest.raises(
        TypeError, match=r"^divergence: .*a member .*got the class MixedKL.*MixedKL\(\)$"
    ):
        distillation_loss(computed(), TEACHER, divergence=MixedKL)  # type: ignore[call-overload]


def test_a_fixed_weight_knows_no_head() -> None:
    with pytest.raises(TypeError, match="mu"):
        forward_kl(computed(), TEACHER, mu=0.5)  # type: ignore[call-overload]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    "name, message",
    [
        ("teacher_logits", "student_logits: expected a DTensor, as teacher_logits is one"),
        ("labels", "labels: expected a plain tensor, got a DTensor"),
        ("mask", "mask: expected a plain tensor, got a DTensor"),
    ],
)
def test_dtensor(name: str, message: str) -> None:
    """Next to plain logits; what becomes of DTensors is in test_vocabulary_parallel.py."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        arguments: dict[str, Any] = {
            "student_logits": computed(),
            "teacher_logits": TEACHER,
            "labels": LABELS,
            "mask": torch.ones_like(LABELS, dtype=torch.bool),
        }
        mesh = init_device_mesh("cpu", (1,))
        arguments[name] = distribute_tensor(arguments[name].detach(), mesh, [Replicate()])
        with pytest.raises(TypeError, match=rf"^{message}"):
            adaptive_kl(**arguments)
    finally:
        dist.destroy_process_group()


class Quantised(torch.Tensor):
    """A tensor that can be read through dispatch only, as torchao's are."""

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"an error of our own comes before {func}")


class Tagged(torch.Tensor):
    """A subclass that is a plain tensor in every respect that matters."""


def subclasses() -> dict[str, tuple[Any, str]]:
    plain = torch.randn(2, 3, V)
    masked = torch.masked.masked_tensor(plain, plain > 0)
    parts = [torch.randn(3, V), torch.randn(2, V)]
    collective = torch.distributed._functional_collectives.AsyncCollectiveTensor
    return {
        "quantised": (Quantised(plain), r"got a Quantised; pass .dequantize\(\)"),
        "masked": (masked, r"got a MaskedTensor; pass .get_data\(\)"),
        "nested": (torch.nested.nested_tensor(parts), r"nested one; pass .*to_padded_tensor"),
        "jagged": (
            torch.nested.nested_tensor(parts, layout=torch.jagged),
            r"nested one; pass .*to_padded_tensor",
        ),
        "collective": (collective(plain), r"got an AsyncCollectiveTensor; pass .wait\(\)"),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of:UserWarning")
@pytest.mark.parametrize("kind", ["quantised", "masked", "nested", "jagged", "collective"])
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "labels", "num_items"])
def test_subclasses_are_named(name: str, kind: str) -> None:
    value, message = subclasses()[kind]
    arguments = {"student_logits": computed(), "teacher_logits": TEACHER, name: value}
    with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor, .*{message}"):
        adaptive_kl(**arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of:UserWarning")
@pytest.mark.parametrize("kind", ["quantised", "masked", "nested", "jagged", "collective"])
@pytest.mark.parametrize("place", range(4))
def test_subclasses_are_named_by_the_linear_form(place: int, kind: str) -> None:
    value, message = subclasses()[kind]
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    tensors = [torch.randn(2, 3, V), torch.randn(5, V), torch.randn(2, 3, V), torch.randn(5, V)]
    tensors[place] = value
    with pytest.raises(TypeError, match=rf"^{names[place]}: expected a plain tensor, .*{message}"):
        linear_adaptive_kl(*tensors)


def test_subclasses_that_are_plain_are_taken() -> None:
    student = computed().detach()
    expected = adaptive_kl(student, TEACHER)
    tagged = student.as_subclass(Tagged)
    assert torch.equal(torch.Tensor(adaptive_kl(tagged, TEACHER)), expected)
    assert torch.equal(adaptive_kl(torch.nn.Parameter(student), TEACHER), expected)


@pytest.mark.parametrize(
    "option",
    [
        *({"temperature": np.float32(2.0)}, {"temperature": np.int64(2)}),
        *({"temperature": Fraction(2)}, {"shift": np.int64(1)}, {"shift": torch.tensor(1)}),
        {"ignore_index": np.int32(-100)},
    ],
    ids=str,
)
def test_numbers_of_any_type(option: dict[str, Any]) -> None:
    labels = torch.arange(6).view(2, 3)
    plain: dict[str, Any] = {name: int(value) for name, value in option.items()}
    expected = adaptive_kl(computed(), TEACHER, labels, **plain)
    assert torch.equal(adaptive_kl(computed(), TEACHER, labels, **option), expected)


@pytest.mark.parametrize("module", [AdaptiveKLLoss, LinearDistillationLoss])
@pytest.mark.parametrize(
    "case",
    [
        *("mu 1", "temperature 0", "temperature tensor", "softcap bool", "scale 0", "head", "ties"),
        *("reduction", "backend", "scale_by_t2", "return_stats", "shift float", "shift negative"),
        *("temperature of numpy", "temperature of a vector"),
    ],
)
def test_modules_check_their_options_when_they_are_made(module: Any, case: str) -> None:
    """A call of the loss comes after both models have run."""
    changes, error, message = CASES[case]
    with pytest.raises(error, match=f"^{message}"):
        options = {name: value for name, value in changes.items() if name != "labels"}
        if module is LinearDistillationLoss and options.keys() & {"mu", "head", "ties"}:
            module(AdaptiveKL(**options))
        module(**options)


def test_modules_check_their_own_options_too() -> None:
    with pytest.raises(ValueError, match=r"^alpha: "):
        MixedKL(alpha=1.5)
    with pytest.raises(TypeError, match=r"^inplace: "):
        AdaptiveKLLoss(inplace=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^chunk_bytes: "):
        LinearDistillationLoss(chunk_bytes=1e9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^accum_dtype: "):
        LinearDistillationLoss(accum_dtype=torch.int64)
