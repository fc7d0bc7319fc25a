"""The functions and modules: the meaning of reductions, labels, shifts, shapes and in-place
gradients. The tests run with both backends; test_eager.py and kernels/ compare the numbers
themselves more finely.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import akl_triton.rows
from akl_triton import (
    AdaptiveKL,
    AdaptiveKLLoss,
    DistillationLoss,
    DivergenceStats,
    ForwardKL,
    MixedKL,
    ReverseKL,
    adaptive_kl,
    eager,
    forward_kl,
    mixed_kl,
    reverse_kl,
)
from akl_triton.kernels.layout import STATISTICS
from akl_triton.reference import ReferenceResult, reference_adaptive_kl
from akl_triton.rows import as_rows
from tests.support.near import assert_near
from tests.support.trace import WAITS, Trace

V = 200  # every kernel is compiled for few shapes: a new one costs seconds
SHAPE = (3, 3)
TOKENS = 9
IGNORED = -100
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [pytest.param(FP32, id="fp32"), pytest.param(BF16, id="bf16")]
REDUCTIONS = ("none", "sum", "mean")
LOSSES: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "adaptive_kl": (adaptive_kl, {}),
    "forward_kl": (forward_kl, {"weight": 1.0}),
    "reverse_kl": (reverse_kl, {"weight": 0.0}),
    "mixed_kl": (mixed_kl, {"weight": 0.5}),
}


def logits(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = FP32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=g)).to(device, dtype)


def pair(
    device: torch.device,
    shape: tuple[int, ...] = SHAPE,
    *,
    v_s: int = V,
    v_t: int = V,
    dtype: torch.dtype = FP32,
) -> tuple[Tensor, Tensor]:
    """(student, a leaf that requires grad; teacher)."""
    student = logits(*shape, v_s, seed=1, device=device, dtype=dtype).requires_grad_()
    return student, logits(*shape, v_t, seed=2, device=device, dtype=dtype)


def labels_of(device: torch.device, *ignored: tuple[int, ...]) -> Tensor:
    """[3, 3] int64 of valid tokens, except for those in `ignored`."""
    labels = torch.arange(TOKENS, device=device).view(SHAPE)
    for where in ignored:
        labels[where] = IGNORED
    return labels


def oracle(student: Tensor, teacher: Tensor, **options: Any) -> ReferenceResult:
    """The float64 oracle, every field in the shape of the tokens and on the logits' device."""
    rows = (x.detach().cpu().reshape(-1, x.shape[-1]) for x in (student, teacher))
    tokens = student.shape[:-1]
    fields = (
        x.to(student.device).view((*tokens, *x.shape[1:]))
        for x in reference_adaptive_kl(*rows, **options)
    )
    return ReferenceResult(*fields)


def gradient(loss: Tensor, student: Tensor, upstream: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(loss, student, upstream)[0]


def loss_of(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The loss alone, from a call with statistics: that is the masked kernel that most tests
    build."""
    loss, _ = adaptive_kl(student, teacher, labels, return_stats=True, **options)
    return loss


# ---- reductions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduction(backend, device, reduction, dtype):
    student, teacher = pair(device, dtype=dtype)
    expected = oracle(student, teacher)
    loss = adaptive_kl(student, teacher, reduction=reduction, backend=backend)
    if reduction == "none":
        upstream = logits(*SHAPE, seed=3, device=device)
        assert_near(loss, expected.loss)
        grad = gradient(loss, student, upstream)
        assert_near(grad, upstream[..., None] * expected.grad)
    else:
        tokens = TOKENS if reduction == "mean" else 1
        assert_near(loss, expected.loss.sum() / tokens)
        grad = gradient(loss, student)
        assert_near(grad, expected.grad / tokens)
    assert loss.dtype == FP32
    assert grad.dtype == dtype


@pytest.mark.parametrize("head", ["exclusive", "inclusive"])
@pytest.mark.parametrize("ties", ["stable", "average"])
def test_options_of_the_head(head, ties):
    """The logits are integers, so that ties are split; the kernels' own tests compare theirs."""
    g = torch.Generator().manual_seed(4)
    student, teacher = torch.randint(-2, 3, (2, 40, 17), generator=g).float()
    options: dict[str, Any] = {"mu": 0.6, "temperature": 2.0, "head": head, "ties": ties}
    loss = adaptive_kl(student, teacher, reduction="none", backend="torch", **options)
    assert_near(loss, oracle(student, teacher, **options).loss)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(
    "dtype", [pytest.param(None, id="int"), pytest.param(torch.int64, id="int64"), DTYPES[0]]
)
def test_num_items_replaces_the_count(backend, device, dtype, on_host):
    student, teacher = pair(device)
    place = "cpu" if on_host else device
    num_items = 5 if dtype is None else torch.tensor(5, dtype=dtype, device=place)
    labels = labels_of(device, (0, 0))
    loss = loss_of(student, teacher, labels, num_items=num_items, backend=backend)
    total = loss_of(student, teacher, labels, reduction="sum", backend=backend)
    assert_near(loss, total / 5)
    assert_near(gradient(loss, student), gradient(total, student) / 5)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_accumulation_is_exact(backend, device, inplace):
    """The gradients of micro-batches of different numbers of tokens add up, in a leaf, to that of
    the whole batch."""
    hidden = logits(*SHAPE, 8, seed=5, device=device)
    _, teacher = pair(device)
    labels = labels_of(device, (0, 0), (0, 1))
    head = torch.nn.Linear(8, V, device=device)

    def weight_gradient(*batches: slice) -> Tensor:
        head.zero_grad()
        for batch in batches:
            loss = loss_of(
                head(hidden[batch]),
                teacher[batch],
                labels[batch],
                num_items=TOKENS - 2,
                inplace=inplace,
                backend=backend,
            )
            loss.backward()
        return cast(Tensor, head.weight.grad).clone()

    whole = weight_gradient(slice(0, 3))
    assert whole.abs().max() > 1e-3
    assert_near(weight_gradient(slice(0, 1), slice(1, 3)), whole)


def test_scale_by_t2(backend, device):
    student, teacher = pair(device)

    def run(scale_by_t2: bool) -> tuple[Tensor, Tensor, DivergenceStats]:
        loss, stats = adaptive_kl(
            student,
            teacher,
            temperature=3.0,
            scale_by_t2=scale_by_t2,
            return_stats=True,
            backend=backend,
        )
        return loss, gradient(loss, student), stats

    loss, grad, stats = run(False)
    scaled_loss, scaled_grad, scaled_stats = run(True)
    assert_near(scaled_loss, 9 * loss)
    assert_near(scaled_grad, 9 * grad)
    assert torch.equal(scaled_stats.forward_kl, stats.forward_kl)  # statistics are not scaled


# ---- labels


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shift_is_slicing(backend, device, reduction, shift):
    """Position i is compared where label i + shift counts."""
    student, teacher = pair(device)
    labels = labels_of(device, (0, 1), (1, 0))
    options = {"reduction": reduction, "return_stats": True, "backend": backend}
    loss, stats = adaptive_kl(student, teacher, labels, shift=shift, **options)
    end = SHAPE[1] - shift
    sliced, sliced_stats = adaptive_kl(
        student[:, :end], teacher[:, :end], labels[:, shift:], **options
    )
    if reduction == "none":
        assert loss.shape == labels.shape
        assert (loss[:, end:] == 0).all()
        loss = loss[:, :end]
    assert_near(loss, sliced)
    upstream = torch.ones_like(sliced)
    assert_near(gradient(loss, student, upstream), gradient(sliced, student, upstream))
    for field, sliced_field in zip(stats, sliced_stats, strict=True):
        assert field.shape == labels.shape
        torch.testing.assert_close(field[:, :end], sliced_field, rtol=0, atol=0, equal_nan=True)
        assert (field[:, end:] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_tokens_may_hold_anything(backend, device, inplace):
    """NaN and inf on either side of an ignored token change no bit of loss or gradient."""
    student, teacher = pair(device)
    labels = labels_of(device, (0, 1), (1, 2))
    with torch.no_grad():
        student[0, 1], teacher[0, 1] = torch.nan, torch.inf
        student[1, 2, 5], teacher[1, 2, 7] = -torch.inf, torch.nan
    loss, stats = adaptive_kl(
        student * 1, teacher, labels, inplace=inplace, return_stats=True, backend=backend
    )
    grad = gradient(loss, student)
    valid = labels != IGNORED
    expected = oracle(student, teacher)
    assert_near(loss, expected.loss[valid].mean())
    assert_near(grad[valid], expected.grad[valid] / (TOKENS - 2))
    assert (grad[~valid] == 0).all()
    for field in stats:
        assert (field[~valid] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(backend, device, reduction, inplace):
    """The loss is 0, with a live graph: the step of a batch without answers must not fail."""
    student, teacher = pair(device)
    labels = torch.full(SHAPE, IGNORED, device=device)
    with torch.no_grad():
        student.fill_(torch.nan)
    loss = loss_of(
        student * 1, teacher, labels, reduction=reduction, inplace=inplace, backend=backend
    )
    assert (loss == 0).all()
    grad = gradient(loss, student, torch.ones_like(loss))
    assert (grad == 0).all()


def test_ignore_index_and_int32_labels(backend, device):
    student, teacher = pair(device)
    labels = labels_of(device)  # 0 .. 8: exactly one is 4
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    plain = adaptive_kl(student, teacher, **options)
    other = loss_of(student, teacher, labels.int(), ignore_index=4, **options)
    assert other[1, 1] == 0
    assert torch.equal(other[labels != 4], plain[labels != 4])


# ---- shapes


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 2, 3)], ids=str)
def test_any_leading_shape(backend, device, shape):
    student, teacher = pair(device, shape)
    loss = adaptive_kl(student, teacher, reduction="none", backend=backend)
    expected = oracle(student, teacher)
    assert loss.shape == shape
    assert_near(loss, expected.loss)
    assert_near(gradient(loss, student, torch.ones_like(loss)), expected.grad)


def _prefix_of_sequences(x: Tensor) -> Tensor:
    """[B, S-1, V] of [B, S, V], as next-token losses take it."""
    longer = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2]), torch.nan)
    longer[:, :-1] = x
    return longer[:, :-1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "prefix of sequences": _prefix_of_sequences,
    "columns": lambda x: torch.nn.functional.pad(x, (8, 24), value=torch.nan)[..., 8:-24],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "contiguous": lambda x: x,
}


@pytest.mark.parametrize("of_teacher", LAYOUTS)
@pytest.mark.parametrize("of_student", LAYOUTS)
def test_strided_logits(backend, device, of_student, of_teacher):
    """Logits of any strides, on either side, give the same as contiguous ones."""
    student, teacher = pair(device)
    student, teacher = LAYOUTS[of_student](student.detach()), LAYOUTS[of_teacher](teacher)
    contiguous = student.contiguous(), teacher.contiguous()
    upstream = logits(*SHAPE, seed=3, device=device)

    def run(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s.requires_grad_()
        loss = adaptive_kl(s, t, reduction="none", backend=backend)
        return loss, gradient(loss, s, upstream)

    loss, grad = run(student, teacher)
    expected_loss, expected_grad = run(*contiguous)
    assert_near(loss, expected_loss)
    assert_near(grad, expected_grad)


@pytest.mark.parametrize("layout", ["prefix of sequences", "columns", "sequence first", "expanded"])
def test_batches_of_sequences_are_not_copied(layout):
    x = LAYOUTS[layout](torch.randn(*SHAPE, V))
    other = torch.randn(*SHAPE, V)
    for pair_of_logits in ((x, other), (other, x)):
        both = as_rows(*pair_of_logits)
        assert both[0].shape == both[1].shape
        for of, before in zip(both, pair_of_logits, strict=True):
            assert of.data_ptr() == before.data_ptr()
            assert torch.equal(of.reshape(*SHAPE, V), before)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens(backend, device, shape, reduction):
    """An empty batch gives 0, or an empty loss, whether the logits are slices or not."""
    _, teacher = pair(device, shape)
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    longer = logits(*shape[:-1], shape[-1] + 1, V, seed=1, device=device).requires_grad_()
    for student in (longer[..., :-1, :], longer[..., :-1, :].contiguous()):
        for some_labels in (None, labels):
            loss, stats = adaptive_kl(
                student,
                teacher,
                some_labels,
                reduction=reduction,
                return_stats=True,
                backend=backend,
            )
            assert loss.shape == (shape if reduction == "none" else ())
            assert stats.gap.shape == shape
            assert (loss == 0).all()
            grad = gradient(loss, longer, torch.ones_like(loss))
            assert (grad == 0).all()


@pytest.mark.parametrize("v_s, v_t", [(V, V + 32), (V + 32, V)])
@pytest.mark.parametrize("inplace", [False, True])
def test_vocabularies_of_unlike_size(backend, device, v_s, v_t, inplace):
    """The tokens that only one side has are -inf on the other."""
    student, teacher = pair(device, v_s=v_s, v_t=v_t)
    loss = adaptive_kl(student * 1, teacher, reduction="sum", inplace=inplace, backend=backend)
    expected = oracle(student, teacher)
    assert_near(loss, expected.loss.sum())
    assert_near(gradient(loss, student), expected.grad)


# ---- in place


@pytest.mark.parametrize(
    "dtype, with_labels",
    [pytest.param(FP32, True, id="fp32, labels"), pytest.param(BF16, False, id="bf16")],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inplace_equals_out_of_place(backend, device, reduction, dtype, with_labels):
    student, teacher = pair(device, dtype=dtype)
    upstream = logits(*SHAPE, seed=3, device=device) if reduction == "none" else None
    options: dict[str, Any] = {
        "reduction": reduction,
        "temperature": 2.0,
        "scale_by_t2": True,
        "backend": backend,
    }
    losses, grads = [], []
    for inplace in (False, True):
        if with_labels:
            labels = labels_of(device, (0, 1))
            loss = loss_of(student * 1, teacher, labels, inplace=inplace, **options)
        else:
            loss = adaptive_kl(student * 1, teacher, inplace=inplace, **options)
        losses.append(loss)
        grads.append(gradient(loss, student, upstream))
    assert_near(losses[1], losses[0])
    assert_near(grads[1], grads[0])


def test_inplace_consumes_the_logits(backend, device):
    """The gradient that flows on is the storage of the logits."""
    student, teacher = pair(device)
    consumed = student * 1
    seen: list[Tensor] = []
    consumed.register_hook(seen.append)
    adaptive_kl(consumed, teacher, inplace=True, backend=backend).backward()
    assert seen[0].data_ptr() == consumed.data_ptr()
    assert_near(consumed.detach(), oracle(student, teacher).grad / TOKENS)


def test_inplace_of_a_view(backend, device):
    """[B * S, V] as a view of the model's [B, S, V] output."""
    student, teacher = pair(device)
    output = student * 1
    loss = adaptive_kl(
        output.view(-1, V), teacher.view(-1, V), inplace=True, reduction="sum", backend=backend
    )
    assert_near(gradient(loss, student), oracle(student, teacher).grad)
    assert_near(output.detach(), oracle(student, teacher).grad)


def test_inplace_scaled_upstream(backend, device):
    student, teacher = pair(device)
    loss = adaptive_kl(student * 1, teacher, inplace=True, reduction="sum", backend=backend)
    assert_near(gradient(0.25 * loss, student), 0.25 * oracle(student, teacher).grad)


def test_inplace_has_one_backward(backend, device):
    student, teacher = pair(device)
    loss = adaptive_kl(student * 1, teacher, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_gradient_that_is_overwritten_is_not_used(backend, device):
    """A second loss over the same logits would find the gradient of the first in their place."""
    student, teacher = pair(device)
    consumed = student * 1
    first = adaptive_kl(consumed, teacher, inplace=True, backend=backend)
    second = adaptive_kl(consumed, teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()


def test_inplace_gradient_in_fp16_survives_a_loss_scale(backend, device):
    """A gradient that is written before the loss scale is known must not lie below fp16's normal
    numbers."""
    student = (logits(4096, V, seed=1, device=device) / 2**14).half().requires_grad_()
    teacher = logits(4096, V, seed=2, device=device, dtype=torch.float16)
    scale = 2.0**16
    grads = []
    for inplace in (False, True):
        loss = adaptive_kl(student * 1, teacher, inplace=inplace, backend=backend)
        grads.append(gradient(loss * scale, student).double())
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert error < 1e-3


def test_inplace_leaves_logits_alone_where_no_gradient_is_wanted(backend, device):
    student, teacher = pair(device)
    logits_of_student = student * 1
    before = logits_of_student.clone()
    with torch.no_grad():
        loss = adaptive_kl(logits_of_student, teacher, inplace=True, backend=backend)
    assert not loss.requires_grad
    assert torch.equal(logits_of_student, before)
    evaluated = student.detach().clone()
    adaptive_kl(evaluated, teacher, inplace=True, backend=backend)
    assert torch.equal(evaluated, before)


@pytest.mark.parametrize("of_a_view", [False, True])
def test_inplace_is_seen_by_autograd(backend, device, of_a_view):
    """An operation whose backward needs the consumed logits raises an error, rather than using
    them."""
    student, teacher = pair(device)
    capped = torch.tanh(student)
    version = capped._version
    shape = (-1, V) if of_a_view else (*SHAPE, V)
    loss = adaptive_kl(capped.view(shape), teacher.view(shape), inplace=True, backend=backend)
    assert capped._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- statistics


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_its_stats(name, backend, device):
    function, weight = LOSSES[name]
    student, teacher = pair(device)
    loss, stats = function(student, teacher, return_stats=True, backend=backend)
    expected = oracle(student, teacher, **weight)
    assert isinstance(stats, DivergenceStats)
    assert stats._fields == STATISTICS
    for field_name, field in stats._asdict().items():
        assert field.shape == SHAPE
        assert field.dtype == FP32
        assert not field.requires_grad
        wanted = getattr(expected, field_name, torch.full(SHAPE, torch.nan).double())
        torch.testing.assert_close(
            field.double(), wanted, rtol=2e-5, atol=2e-6, equal_nan=True, msg=field_name
        )
    assert_near(loss, expected.loss.mean())
    assert_near(gradient(loss, student), expected.grad / TOKENS)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_knows_the_weight_and_spares_a_part_of_weight_0(
    name, backend, device, monkeypatch
):
    if backend == "torch":
        pytest.skip("the PyTorch backend has one formula for all weights")
    from akl_triton.kernels import launch as launchers

    asked = []
    launch = launchers.backward

    def backward(*tensors: Tensor, weight: float | None, **options: Any) -> None:
        asked.append(weight)
        launch(*tensors, weight=weight, **options)

    monkeypatch.setattr(launchers, "backward", backward)
    student, teacher = pair(device)
    LOSSES[name][0](student, teacher, backend=backend).backward()
    assert asked == [LOSSES[name][1].get("weight")]


def test_stats_do_not_change_the_loss(backend, device):
    student, teacher = pair(device)
    plain = adaptive_kl(student, teacher, backend=backend)
    with_stats, _ = adaptive_kl(student, teacher, return_stats=True, backend=backend)
    assert torch.equal(plain, with_stats)
    assert torch.equal(gradient(plain, student), gradient(with_stats, student))


# ---- autograd


def test_upstream_of_any_stride(backend, device):
    student, teacher = pair(device)
    grad_of_rows = oracle(student, teacher).grad
    per_token = logits(*SHAPE, seed=3, device=device)
    column = torch.stack((per_token, per_token + 1), dim=-1)[..., 0]
    constant = torch.tensor(2.0, device=device).expand(SHAPE)
    for upstream in (per_token, column, constant):
        loss = adaptive_kl(student, teacher, reduction="none", backend=backend)
        assert_near(gradient(loss, student, upstream), upstream[..., None] * grad_of_rows)
    loss = adaptive_kl(student, teacher, reduction="none", backend=backend)
    assert_near(gradient(loss.sum(), student), grad_of_rows)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_second_derivative(backend, device, inplace):
    student, teacher = pair(device)
    loss = adaptive_kl(student * 1, teacher, inplace=inplace, backend=backend)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        grad.sum().backward()


def test_teacher_and_labels_stay_as_they_are(backend, device):
    student, teacher = pair(device)
    labels = labels_of(device, (0, 1))
    before = student.detach().clone(), teacher.clone(), labels.clone()
    loss_of(student, teacher, labels, shift=1, backend=backend).backward()
    loss_of(student * 1, teacher, labels, shift=1, inplace=True, backend=backend).backward()
    for now, then in zip((student, teacher, labels), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_equal(backend, device, dtype, inplace):
    student, teacher = pair(device, dtype=dtype)
    runs = []
    for _ in range(2):
        loss = adaptive_kl(student * 1, teacher, inplace=inplace, backend=backend)
        runs.append((loss, gradient(loss, student)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_autocast(backend, device):
    """The logits of an autocast layer are bf16: so is their gradient, while the loss is fp32."""
    head = torch.nn.Linear(8, V, device=device)
    hidden = logits(*SHAPE, 8, seed=5, device=device)
    seen: list[Tensor] = []
    with torch.autocast(device.type, dtype=BF16):
        student = head(hidden)
        student.register_hook(seen.append)
        teacher = logits(*SHAPE, V, seed=2, device=device, dtype=BF16)
        loss = adaptive_kl(student, teacher, backend=backend)
    assert student.dtype == BF16
    assert loss.dtype == FP32
    assert_near(loss, oracle(student, teacher).loss.mean())
    loss.backward()
    assert seen[0].dtype == BF16
    assert_near(seen[0], oracle(student, teacher).grad / TOKENS)
    assert cast(Tensor, head.weight.grad).dtype == FP32


# ---- memory and synchronisation


@pytest.fixture
def many_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """(N, V, further bytes that are allowed); the logits take at least twice as many."""
    if backend == "triton":
        return 256, V, 100 * 256
    monkeypatch.setattr(eager, "TEMPORARY_BYTES", 2 * 2**20)
    return 64, 16384, eager.TEMPORARY_BYTES


def test_memory_is_the_gradients(backend, device, many_rows):
    """Nothing near the logits' size is allocated except one gradient, in the backward pass."""
    rows, vocabulary, besides = many_rows
    student, teacher = pair(device, (rows,), v_s=vocabulary, v_t=vocabulary)
    size = 4 * student.numel()
    with Trace(device) as forward:
        loss = adaptive_kl(student, teacher, backend=backend)
    with Trace(device) as backward:
        loss.backward()
    assert forward.peak() <= besides
    assert size <= backward.peak() <= size + besides
    if device.type == "cpu":
        assert backward.allocations(besides) == [size]


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_in_place(backend, device, many_rows, dtype, monkeypatch):
    rows, vocabulary, besides = many_rows
    monkeypatch.setattr(akl_triton.rows, "BLOCK_BYTES", besides // 4)  # one on the way in, one out
    student, teacher = pair(device, (rows,), v_s=vocabulary, v_t=vocabulary, dtype=dtype)
    consumed = student * 1
    with Trace(device) as trace:
        loss = adaptive_kl(consumed, teacher, inplace=True, backend=backend)
        torch.autograd.grad(loss, consumed)
    assert trace.peak() <= besides


def test_what_is_saved_for_backward(backend, device):
    """Only the logits themselves and about a dozen floats a row are saved."""
    rows = 64
    student, teacher = pair(device, (rows,))
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        adaptive_kl(student, teacher, labels, return_stats=True, backend=backend)
    inputs = {student.data_ptr(), teacher.data_ptr()}
    assert inputs <= {x.data_ptr() for x in saved}
    others = [x for x in saved if x.data_ptr() not in inputs]
    assert sum(x.numel() * x.element_size() for x in others) <= 16 * 4 * rows


def test_a_wait_would_be_traced():
    """The check of the next test sees waits inside of operators."""
    labels = torch.tensor([0, IGNORED])
    with Trace() as trace:
        adaptive_kl(torch.randn(2, 5), torch.randn(2, 5), labels, backend="torch")
    assert {"aten::nonzero", "aten::item"} <= trace.operators


@contextlib.contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """Have PyTorch raise at any wait of a GPU, which has more than those of WAITS; elsewhere
    nothing waits."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("with_labels", [False, True])
def test_kernels_never_wait_for_the_device(device, backend, with_labels, inplace):
    if backend == "torch":
        pytest.skip("on a CPU it may look at values")
    student, teacher = pair(device)
    labels = labels_of(device, (0, 1)) if with_labels else None
    counts: list[Any] = [None, 4]
    if device.type != "cpu":  # the value of a count on the host is read
        counts.append(torch.tensor(4, device=device))
    with waits_are_errors(device), Trace() as trace:
        for num_items in counts:
            loss = adaptive_kl(
                student * 1,
                teacher,
                labels,
                shift=int(with_labels),
                num_items=num_items,
                inplace=inplace,
                return_stats=with_labels,
                backend=backend,
            )
            (2 * (loss[0] if with_labels else loss)).backward()
    operator = "divergence_with_gradient" if inplace else "divergence_backward"
    assert f"akl_triton::{operator}" in trace.operators
    assert not trace.operators & WAITS


# ---- modules


@pytest.mark.parametrize(
    "divergence, function, options",
    [
        (AdaptiveKL(mu=0.7, head="inclusive", ties="average"), adaptive_kl, {}),
        (ForwardKL(), forward_kl, {"temperature": 2.0, "scale_by_t2": True}),
        (ReverseKL(), reverse_kl, {"reduction": "sum"}),
        (MixedKL(alpha=0.25), mixed_kl, {"reduction": "none"}),
    ],
)
def test_modules_are_their_functions(divergence, function, options):
    device = torch.device("cpu")
    student, teacher = pair(device)
    labels = labels_of(device, (1, 1))
    options = {"shift": 1, "return_stats": True, "backend": "torch", **options}
    loss_function = DistillationLoss(divergence, **options)
    count = {"num_items": 3} if options.get("reduction") is None else {}
    loss, stats = loss_function(student, teacher, labels, **count)
    own = dataclasses.asdict(divergence)
    expected, expected_stats = function(student, teacher, labels, **own, **options, **count)
    assert torch.equal(loss, expected)
    for field, expected_field in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(field, expected_field, rtol=0, atol=0, equal_nan=True)
    assert loss_function.state_dict() == {}
    assert list(loss_function.parameters()) == []
    assert repr(loss_function).startswith(f"DistillationLoss({divergence}, shift=1, ")
    if divergence.name == "adaptive_kl":
        short = AdaptiveKLLoss(**own, **options)
        assert short.divergence == divergence and short.options == loss_function.options


@pytest.mark.parametrize("option", ["wieght", "num_items", "labels"])
def test_module_refuses_what_it_does_not_know(option):
    message = rf"AdaptiveKLLoss: expected options among mu.*got {option}"
    with pytest.raises(TypeError, match=message):
        AdaptiveKLLoss(**{option: 1})  # type: ignore[arg-type]


def test_argument_order_is_the_same_everywhere():
    for function in (adaptive_kl, forward_kl, reverse_kl, mixed_kl):
        parameters = list(inspect.signature(function).parameters.values())
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert names == ["student_logits", "teacher_logits", "labels"]
