"""The fused linear losses have the values of the logits that they never hold, and need no more
memory than documented. Values and gradients are compared with the float64 oracle through explicit
logits, on both backends; tests of code that does not depend on the backend run on the PyTorch one.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import akl_triton.rows
from akl_triton import (
    AdaptiveKL,
    ForwardKL,
    LinearDistillationLoss,
    MixedKL,
    ReverseKL,
    adaptive_kl,
    eager,
    forward_kl,
    linear_adaptive_kl,
    linear_forward_kl,
    linear_mixed_kl,
    linear_ops,
    linear_reverse_kl,
    mixed_kl,
    reverse_kl,
)
from akl_triton.divergences import Rule
from akl_triton.reference import reference_adaptive_kl
from tests.support.trace import WAITS, Trace

V_S, V_T, H_S, H_T = 200, 232, 16, 24
SHAPE = (3, 7)
IGNORED = -100
FP32, BF16 = torch.float32, torch.bfloat16
ROW_BYTES = 4 * (V_S + V_T)
MAPS: dict[str, Any] = {
    "student_softcap": 4.0,
    "teacher_softcap": 3.0,
    "student_logit_scale": 0.75,
    "teacher_logit_scale": 1.5,
}
LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, float]]] = {
    "adaptive_kl": (linear_adaptive_kl, adaptive_kl, {}),
    "forward_kl": (linear_forward_kl, forward_kl, {"weight": 1.0}),
    "reverse_kl": (linear_reverse_kl, reverse_kl, {"weight": 0.0}),
    "mixed_kl": (linear_mixed_kl, mixed_kl, {"weight": 0.5}),
}


class Case(NamedTuple):
    """The tensors of a call; the student's require grad."""

    student_hidden: Tensor  # [*SHAPE, H_S]
    student_weight: Tensor  # [V_S, H_S]
    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_bias: Tensor
    teacher_bias: Tensor

    @property
    def biases(self) -> dict[str, Any]:
        return {"student_bias": self.student_bias, "teacher_bias": self.teacher_bias}

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.student_bias


def make_case(
    device: torch.device | str = "cpu", dtype: torch.dtype = FP32, shape: tuple[int, ...] = SHAPE
) -> Case:
    g = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=g)).to(device, dtype)

    case = Case(
        random(*shape, H_S),
        random(V_S, H_S, scale=0.6),
        random(*shape, H_T),
        random(V_T, H_T, scale=0.5),
        random(V_S),
        random(V_T),
    )
    for x in case.trained:
        x.requires_grad_()
    return case


def some_labels(device: torch.device | str = "cpu") -> Tensor:
    labels = torch.arange(21, device=device).view(SHAPE)
    labels[0, :3] = labels[1, 4] = IGNORED
    return labels


def random_like(x: Tensor, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g).to(x.device, x.dtype)


def oracle(
    case: Case, upstream: Tensor, valid: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """(loss of every token [N], gradients of sum upstream * loss) in float64, through the
    logits."""
    h, w, ht, wt, b, bt = (x.detach().double().cpu() for x in case)
    h, ht = h.reshape(-1, H_S), ht.reshape(-1, H_T)
    result = reference_adaptive_kl(F.linear(h, w, b), F.linear(ht, wt, bt), **options)
    up = upstream.double().cpu().reshape(-1, 1)
    if valid is not None:
        up = up * valid.cpu().reshape(-1, 1)
    ds = result.grad * up
    gradients = [(ds @ w).view(case.student_hidden.shape), ds.t() @ h, ds.sum(0)]
    return result.loss, gradients


def assert_near(actual: Tensor, expected: Tensor, of: str = "") -> None:
    """Equal up to fp32 sums: the error is relative to the largest entry."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    off = (actual - expected).abs().max()
    assert off <= 1e-5 * expected.abs().max() + 1e-6, f"{of} off by {off:.1e}"


def run(
    function: Callable[..., Tensor], case: Case, *args: Any, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(loss, gradients of what is trained) under a random upstream."""
    loss = function(*case[:4], *args, **case.biases, **options)
    return loss.detach(), torch.autograd.grad(loss, case.trained, random_like(loss))


# ---- against the oracle

# Every kernel takes long to compile; the tests of the Triton backend need only these two.
COMPILED = [("plain", "sum"), ("every option", "sum")]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options_of", ["every option", "plain"])
def test_the_loss_is_the_oracles(backend, device, options_of, reduction):
    """Chunks of four tokens, different sizes on the two sides, and biases; then all other
    options."""
    if backend == "triton" and (options_of, reduction) not in COMPILED:
        pytest.skip("the PyTorch backend goes the same way to the chunks")
    plain = options_of == "plain"
    case = make_case(device)
    labels = None if plain else some_labels(device)
    rule = {} if plain else {"mu": 0.7, "temperature": 2.0, "head": "inclusive", **MAPS}
    options = {} if plain else {"shift": 1, "scale_by_t2": True}
    loss, gradients = run(
        linear_adaptive_kl,
        case,
        labels,
        reduction=reduction,
        chunk_bytes=4 * ROW_BYTES,
        backend=backend,
        **rule,
        **options,
    )
    valid = torch.ones(SHAPE, dtype=torch.bool)
    if not plain:
        valid = F.pad(some_labels()[:, 1:], (0, 1), value=IGNORED) != IGNORED
    factor = (1.0 if plain else 4.0) / (valid.sum().item() if reduction == "mean" else 1)
    upstream = factor * random_like(loss).expand(SHAPE)
    rows, expected = oracle(case, upstream, valid, **rule)
    rows = factor * rows.view(SHAPE) * valid
    assert_near(loss, rows if reduction == "none" else rows.sum(), "loss")
    for name, ours, exact in zip(("hidden", "weight", "bias"), gradients, expected, strict=True):
        assert_near(ours, exact, name)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_its_logits(name):
    fused, unfused, _ = LOSSES[name]
    case = make_case()
    loss, stats = fused(*case[:4], **case.biases, return_stats=True, chunk_bytes=4 * ROW_BYTES)
    s = F.linear(case.student_hidden, case.student_weight, case.student_bias)
    t = F.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias)
    expected, expected_stats = unfused(s, t, return_stats=True)
    assert_near(loss, expected)
    for field, expected_field in zip(stats, expected_stats, strict=True):
        assert not field.requires_grad
        torch.testing.assert_close(field, expected_field, rtol=1e-4, atol=1e-5, equal_nan=True)
    for ours, theirs in zip(
        torch.autograd.grad(loss, case.trained),
        torch.autograd.grad(expected, case.trained),
        strict=True,
    ):
        assert_near(ours, theirs)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_without_fusing(dtype):
    """The logits are rounded either way; the sums over chunks add nothing to that."""
    case = make_case(dtype=dtype)
    _, ours = run(linear_adaptive_kl, case, chunk_bytes=4 * ROW_BYTES, reduction="sum")

    def unfused(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, **b: Tensor) -> Tensor:
        s, t = F.linear(h, w, b["student_bias"]), F.linear(ht, wt, b["teacher_bias"])
        return adaptive_kl(s, t, reduction="sum")

    loss, theirs = run(unfused, case)
    _, exact = oracle(case, random_like(loss).expand(SHAPE))
    for name, a, b, x in zip(("hidden", "weight", "bias"), ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        off, allowed = ((y.double() - x).square().mean().sqrt() for y in (a, b))
        assert off <= 1.2 * allowed + 1e-3 * x.abs().max() * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_in_fp16_survive_a_loss_scale(reduction):
    """Gradients of flat rows lie below fp16's normal numbers before a loss scale multiplies
    them."""
    g = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = ((1e-4 * torch.randn(64, 16, generator=g)).half() for _ in range(2))
    weight, teacher_weight = (torch.randn(V_S, 16, generator=g).half() for _ in range(2))

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        loss = linear_adaptive_kl(
            h, w, teacher_hidden.to(dtype), teacher_weight.to(dtype), reduction=reduction
        )
        return [x.double() for x in torch.autograd.grad(2.0**28 * loss.mean(), (h, w))]

    for name, half, exact in zip(
        ("hidden", "weight"), gradients(torch.float16), gradients(FP32), strict=True
    ):
        assert (half - exact).norm() < 1e-3 * exact.norm(), name


def test_a_sum_in_fp16_has_all_the_room_of_fp16():
    hidden = torch.full((512, 1), 4.0).half()
    weights = torch.zeros(2, V_S, 1).half()
    weights[0, 0] = weights[1, 1] = 8.0  # p and q are one-hot, and not at the same token
    student = weights[0].requires_grad_()
    loss = linear_forward_kl(
        hidden, student, hidden, weights[1].detach(), reduction="sum", accum_dtype=torch.float16
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[:2].flatten().tolist() == [2048.0, -2048.0]


def test_the_weight_of_a_half_precision_chunk_is_summed_in_accum_dtype():
    """Over five hundred equal chunks a bf16 sum stops growing, but an fp32 sum does not."""
    n = 512
    case = make_case(dtype=BF16, shape=(1,))
    many = case._replace(
        student_hidden=case.student_hidden.detach().expand(n, -1).contiguous().requires_grad_(),
        teacher_hidden=case.teacher_hidden.expand(n, -1).contiguous(),
    )

    def weight_gradient(of: Case, accum_dtype: torch.dtype, chunk_bytes: int) -> Tensor:
        loss = linear_adaptive_kl(
            *of[:4], reduction="sum", accum_dtype=accum_dtype, chunk_bytes=chunk_bytes
        )
        return torch.autograd.grad(loss, of.student_weight)[0].double()

    row = 2 * (V_S + V_T)
    one = n * weight_gradient(case, FP32, row)
    fp32, bf16 = (weight_gradient(many, dtype, row) for dtype in (FP32, BF16))
    size = one.abs().max()
    assert (fp32 - one).abs().max() < 0.01 * size
    assert (bf16 - one).abs().max() > 0.1 * size


@pytest.mark.parametrize("weight_dtype", [BF16, FP32], ids=["bf16", "autocast"])
def test_the_sum_over_half_precision_chunks_is_rounded_once(backend, device, weight_dtype):
    """The sum is rounded to the weight's dtype at its end: where that is fp32, a sum of bf16
    gradients is exact.

    The logits are multiples of 1/8 below 32, whatever the order of a product: what is summed is
    the gradient of `adaptive_kl`, to the bit, and 64 chunks of four tokens add no error to it."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("another kernel to build")
    g, n = torch.Generator().manual_seed(0), 256

    def integers(most: int, *size: int) -> Tensor:
        return torch.randint(-most, most + 1, size, generator=g).to(device, weight_dtype)

    hidden, teacher_hidden = integers(3, n, H_S), integers(3, n, H_T)
    weight, teacher_weight = integers(2, V_S, H_S) / 8, integers(2, V_T, H_T) / 8
    weight.requires_grad_()
    with torch.autocast(device.type, dtype=BF16):
        loss = linear_adaptive_kl(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            reduction="sum",
            chunk_bytes=4 * 2 * (V_S + V_T),
            backend=backend,
        )
        logits = (hidden @ weight.detach().t()).requires_grad_()
        plain = adaptive_kl(
            logits, teacher_hidden @ teacher_weight.t(), reduction="sum", backend=backend
        )
    (ours,) = torch.autograd.grad(loss, weight)
    (ds,) = torch.autograd.grad(plain, logits)
    assert ds.dtype == BF16
    exact = ds.double().t() @ hidden.double()
    once = 0.0 if weight_dtype == FP32 else 0.5 * torch.finfo(weight_dtype).eps
    assert ours.dtype == weight_dtype
    beyond = (ours.double() - exact).abs() - once * exact.abs()
    assert beyond.max() <= 1e-6 * exact.abs().max()


# ---- chunks


def test_the_bias_of_a_half_precision_chunk_is_summed_in_accum_dtype():
    """A bf16 sum of the gradients of a thousand equal tokens would stop growing."""
    case = make_case(dtype=BF16, shape=(1,))
    n = 1000
    hidden, teacher_hidden = (x.detach().expand(n, -1) for x in (case[0], case[2]))

    def bias_gradient(*hiddens: Tensor) -> Tensor:
        weights = case.student_weight.detach(), case.teacher_weight
        loss = linear_adaptive_kl(
            hiddens[0], weights[0], hiddens[1], weights[1],
            student_bias=case.student_bias, reduction="sum",
        )  # fmt: skip
        return torch.autograd.grad(loss, case.student_bias)[0].double()

    once = bias_gradient(hidden[:1], teacher_hidden[:1])
    torch.testing.assert_close(bias_gradient(hidden, teacher_hidden), n * once, rtol=1e-2, atol=0)


def test_autocast_of_a_teacher_of_another_dtype():
    """The products of both sides have autocast's dtype, whatever that of their factors is."""
    case = make_case()
    teacher = case.teacher_hidden.half(), case.teacher_weight.double().to(BF16)
    with torch.autocast("cpu", BF16):
        loss = linear_adaptive_kl(case.student_hidden, case.student_weight, *teacher)
        logits = F.linear(case.student_hidden, case.student_weight), F.linear(*teacher)
        expected = adaptive_kl(*logits)
    assert logits[1].dtype == BF16
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_inference_tensors_that_backward_would_need(place):
    """With a loss per token and a trained weight, backward computes the products again."""
    case = make_case()
    tensors = [x.detach() for x in case[:4]]
    with torch.inference_mode():
        tensors[place] = tensors[place].clone()
    trained = 0 if place == 1 else 1
    tensors[trained].requires_grad_()
    if trained == 1:
        name = Case._fields[place]
        with pytest.raises(ValueError, match=rf"^{name}: expected a tensor that autograd can keep"):
            linear_adaptive_kl(*tensors, reduction="none")
    linear_adaptive_kl(*tensors).backward()
    assert cast(Tensor, tensors[trained].grad).isfinite().all()


def test_the_chunk_changes_rounding_alone():
    case = make_case()
    whole, gradients = run(linear_adaptive_kl, case, some_labels())
    for rows in (1, 5, 20):
        loss, others = run(
            linear_adaptive_kl, case, some_labels(), chunk_bytes=rows * ROW_BYTES + 3
        )
        assert_near(loss, whole)
        for ours, expected in zip(others, gradients, strict=True):
            assert_near(ours, expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_equal_chunks_give_equal_bits(backend, device, reduction):
    if backend == "triton" and reduction == "none":
        pytest.skip("another kernel to build")
    case = make_case(device)
    options = {"reduction": reduction, "chunk_bytes": 4 * ROW_BYTES, "backend": backend}
    first = run(linear_adaptive_kl, case, some_labels(device), **options)
    again = run(linear_adaptive_kl, case, some_labels(device), **options)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in every product that gives logits."""
    rows: list[int] = []
    project = linear_ops._project

    def count(hidden: Tensor, *args: Any, **kwargs: Any) -> None:
        rows.append(hidden.shape[0])
        project(hidden, *args, **kwargs)

    monkeypatch.setattr(linear_ops, "_project", count)
    return rows


def test_ignored_tokens_are_left_out_of_the_products(projected):
    """Ignored tokens may hold anything, and cost nothing."""
    case = make_case()
    labels = some_labels()
    with torch.no_grad():
        case.student_hidden[0, :3] = torch.nan
        case.teacher_hidden[1, 4] = torch.inf
    loss, (d_hidden, d_weight, _) = run(
        linear_adaptive_kl, case, labels, chunk_bytes=4 * ROW_BYTES, reduction="sum"
    )
    assert projected == [r for r in (4, 4, 4, 4, 1) for _ in ("student", "teacher")]
    assert loss.isfinite() and d_weight.isfinite().all()
    assert (d_hidden[labels == IGNORED] == 0).all() and d_hidden.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_tokens_that_count(projected, reduction):
    case = make_case()
    labels = torch.full(SHAPE, IGNORED)
    loss, gradients = run(linear_adaptive_kl, case, labels, reduction=reduction)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in gradients)
    empty = make_case(shape=(2, 0))
    loss, gradients = run(linear_adaptive_kl, empty, reduction=reduction)
    assert loss.shape == ((2, 0) if reduction == "none" else ()) and (loss == 0).all()
    assert all((g == 0).all() for g in gradients)
    assert not projected


# ---- what is computed when


def test_frozen_parts_get_no_gradient():
    case = make_case()
    _, (d_hidden, d_weight, _) = run(linear_adaptive_kl, case)
    case.student_weight.requires_grad_(False)
    for reduction in ("mean", "none"):
        loss = linear_adaptive_kl(*case[:4], **case.biases, reduction=reduction).mean()
        loss.backward()
    assert case.student_weight.grad is None
    loss = linear_adaptive_kl(*case[:4], teacher_bias=case.teacher_bias)
    assert_near(
        torch.autograd.grad(loss, case.student_hidden, random_like(loss))[0].sign(),
        torch.autograd.grad(
            adaptive_kl(
                F.linear(case.student_hidden, case.student_weight),
                F.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias),
            ),
            case.student_hidden,
            random_like(loss),
        )[0].sign(),
    )
    case.student_weight.requires_grad_()
    hidden = case.student_hidden.detach()
    loss = linear_adaptive_kl(hidden, *case[1:4], **case.biases)
    assert_near(torch.autograd.grad(loss, case.student_weight, random_like(loss))[0], d_weight)
    assert d_hidden.shape == hidden.shape and hidden.grad is None


def test_weights_may_change_before_backward():
    """Weights may change, as FSDP's do: the gradients exist when the forward pass ends."""
    case = make_case()
    expected = run(linear_adaptive_kl, case)[1]
    loss = linear_adaptive_kl(*case[:4], **case.biases)
    with torch.no_grad():
        case.student_weight.zero_()
        case.teacher_weight.zero_()
    gradients = torch.autograd.grad(loss, case.trained, random_like(loss))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_loss_per_token_is_computed_again_where_a_weight_is_trained(projected):
    """An error says so where the weight has changed since; a frozen weight needs neither."""
    case = make_case()
    loss = linear_adaptive_kl(*case[:4], **case.biases, reduction="none")
    once = len(projected)
    loss.backward(random_like(loss))
    assert len(projected) == 2 * once
    loss = linear_adaptive_kl(*case[:4], **case.biases, reduction="none")
    with torch.no_grad():
        case.student_weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(random_like(loss))

    frozen = make_case()
    for x in frozen.trained[1:]:
        x.requires_grad_(False)
    projected.clear()
    loss = linear_adaptive_kl(*frozen[:4], **frozen.biases, reduction="none")
    upstream = random_like(loss)
    (gradient,) = torch.autograd.grad(loss, frozen.student_hidden, upstream)
    assert len(projected) == once
    assert_near(gradient, oracle(frozen, upstream)[1][0])


def test_two_backward_passes_and_no_second_derivative():
    case = make_case()
    loss = linear_adaptive_kl(*case[:4], **case.biases)
    first = torch.autograd.grad(loss, case.trained, retain_graph=True)
    second = torch.autograd.grad(loss, case.trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss = linear_adaptive_kl(*case[:4], **case.biases)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, case.trained, create_graph=True)


# ---- memory and waiting


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_memory_is_the_chunk_and_the_sum(dtype, monkeypatch):
    """The peak is the model of the design, 2 C V bytes + 4 V H, and the returned gradients."""
    monkeypatch.setattr(eager, "TEMPORARY_BYTES", 2**19)  # one token at a time
    monkeypatch.setattr(akl_triton.rows, "BLOCK_BYTES", 2**16)
    n, v, h, chunk, besides = 192, 4096, 64, 64, 2**18
    bytes_of = dtype.itemsize
    hidden, teacher_hidden = torch.randn(2, n, h).to(dtype)
    weight, teacher_weight = torch.randn(2, v, h).to(dtype)
    logits, total, returned = 2 * chunk * v * bytes_of, 4 * v * h, (n + v) * h * bytes_of

    def peak(*needs_grad: Tensor) -> int:
        for x in (hidden, weight):
            x.requires_grad_(any(x is y for y in needs_grad))
            x.grad = None
        with Trace() as trace:
            loss = linear_adaptive_kl(
                hidden, weight, teacher_hidden, teacher_weight, chunk_bytes=logits, backend="torch"
            )
            if needs_grad:
                loss.backward()
        return trace.peak()

    assert logits + total < peak(hidden, weight) <= 1.1 * (logits + total + returned)
    assert logits < peak(hidden) <= 1.1 * logits + 2 * n * h * bytes_of + besides
    assert logits < peak() <= 1.1 * logits + besides


def test_backward_allocates_what_it_returns():
    """No zeros are made for the outputs without an upstream gradient, one of which has the size of
    the sum."""
    n, v, h = 64, 4096, 64
    hidden, weight = torch.randn(n, h), torch.randn(v, h)
    loss = linear_adaptive_kl(
        hidden.requires_grad_(), weight.requires_grad_(), torch.randn(n, h), torch.randn(v, h)
    )
    returned = 4 * (n + v) * h
    with Trace() as trace:
        gradients = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert sum(4 * x.numel() for x in gradients) == returned
    assert returned <= trace.peak() <= 1.1 * returned


def test_kernels_wait_for_the_number_of_tokens_alone(device, backend):
    if backend == "torch":
        pytest.skip("on a CPU it may look at values")
    case = make_case(device)
    for labels, waits in ((None, set()), (some_labels(device), {"aten::nonzero"})):
        with Trace() as trace:
            loss = linear_adaptive_kl(*case[:4], labels, num_items=5, backend=backend)
            (2 * loss).backward()
        assert "akl_triton::linear_divergence" in trace.operators
        assert trace.operators & WAITS == waits


# ---- in a training step


def test_gradient_accumulation_is_exact():
    case, labels = make_case(), some_labels()
    count = int((labels != IGNORED).sum())

    def total(*batches: slice) -> tuple[Tensor, ...]:
        for x in case.trained:
            x.grad = None
        for rows in batches:
            linear_adaptive_kl(
                case.student_hidden[rows],
                case.student_weight,
                case.teacher_hidden[rows],
                case.teacher_weight,
                labels[rows],
                **case.biases,
                num_items=count,
            ).backward()
        return tuple(cast(Tensor, x.grad).clone() for x in case.trained)

    whole = run(linear_adaptive_kl, case, labels, reduction="sum")[1]
    scale = random_like(torch.zeros(())).item()
    for ours, expected in zip(total(slice(0, 1), slice(1, 3)), whole, strict=True):
        assert_near(ours * count * scale, expected)


def test_tied_embeddings():
    """The weight is also the embedding, and both gradients arrive."""
    case = make_case()
    ids = torch.randint(V_S, SHAPE, generator=torch.Generator().manual_seed(3))
    gradients = []
    for fused in (True, False):
        weight = case.student_weight.detach().clone().requires_grad_()
        hidden = F.embedding(ids, weight).tanh()
        if fused:
            loss = linear_adaptive_kl(hidden, weight, *case[2:4])
        else:
            loss = adaptive_kl(F.linear(hidden, weight), F.linear(*case[2:4]))
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert_near(gradients[0], gradients[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    """Products of fp32 parameters are bf16; the loss is fp32, and so are the gradients, never
    rounded to bf16."""
    case = make_case()

    def function(*args: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return cast(Tensor, linear_adaptive_kl(*args, chunk_bytes=4 * ROW_BYTES, **options))

    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    loss, gradients = run(function, case)
    rounded = Case(*(x.detach().to(BF16) for x in case))
    for x in rounded.trained:
        x.requires_grad_()
    expected, in_bf16 = run(linear_adaptive_kl, rounded, chunk_bytes=4 * ROW_BYTES)
    assert loss.dtype == FP32 and torch.equal(loss, expected)
    for ours, theirs in zip(gradients, in_bf16, strict=True):
        assert ours.dtype == FP32
        assert torch.equal(ours.to(BF16), theirs)
    assert not torch.equal(gradients[1], gradients[1].to(BF16).float())
    mixed = case._replace(teacher_weight=case.teacher_weight.to(BF16))
    assert torch.equal(run(function, mixed)[0], loss)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_under_compile_and_under_checkpointing(backend, device, reduction):
    """torch.compile around the caller gives the same bits, and one graph."""
    if backend == "triton" and reduction == "none":
        pytest.skip("another kernel to build")
    with_stats = backend == "torch"
    case, labels = make_case(device), some_labels(device)
    scale = torch.ones(H_S, device=device, requires_grad=True)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        output = linear_adaptive_kl(
            torch.tanh(hidden) * scale,
            weight,
            *case[2:4],
            labels,
            student_bias=bias,
            shift=1,
            reduction=reduction,
            return_stats=with_stats,
            chunk_bytes=4 * ROW_BYTES,
            backend=backend,
        )
        return (output[0], output[1].gap) if with_stats else (output, output)

    def outcome(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        loss, gap = function(*case.trained)
        return [loss, gap, *torch.autograd.grad(loss, (*case.trained, scale), random_like(loss))]

    expected = outcome(step)
    for function in (
        torch.compile(step, fullgraph=True, backend="aot_eager"),
        lambda *x: checkpoint(step, *x, use_reentrant=False),
    ):
        for ours, theirs in zip(outcome(function), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck(backend, device, per_token):
    if backend == "triton" and per_token:
        pytest.skip("another kernel to build")
    case = make_case(device)
    flat = (
        case.student_hidden.detach().view(-1, H_S),
        case.student_weight.detach(),
        case.student_bias.detach(),
        case.teacher_hidden.view(-1, H_T),
        case.teacher_weight,
        None,
        None,
    )
    labels = torch.arange(21, device=device)
    valid = labels % 3 != 0
    rule = Rule(AdaptiveKL(), label_weight=0.5).pack()
    plan = linear_ops.Plan(FP32, FP32, FP32, 4 * ROW_BYTES, True, True, True, backend)
    leaves = *(x.clone().requires_grad_() for x in cast(tuple[Tensor, ...], flat[:3])), *flat[3:]
    upstream = torch.linspace(-1, 1, 21, device=device)
    factor = torch.tensor(0.7, device=device)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (
            linear_ops.linear_divergence,
            (per_token, per_token, *leaves, valid, labels, None, factor, *plan, *rule),
        ),
        (
            linear_ops.linear_divergence_backward,
            (upstream, *flat, valid, labels, None, factor, *plan, *rule),
        ),
        (linear_ops.scaled, (flat[0], upstream if per_token else upstream[1], BF16)),
    ]
    for operator, arguments in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opcheck's own
            torch.library.opcheck(operator, arguments)


# ---- data parallel


class Student(nn.Module):
    """A body and an lm_head, with the loss in the forward, where FSDP2 has the whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(H_S, H_S)
        self.lm_head = nn.Linear(H_S, V_S)

    def forward(self, hidden: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        loss = linear_adaptive_kl(
            torch.tanh(self.body(hidden)),
            self.lm_head.weight,
            teacher_hidden,
            teacher_weight,
            student_bias=self.lm_head.bias,
            backend="torch",
        )
        return loss


def make_student() -> Student:
    torch.manual_seed(0)
    return Student()


def train_in_parallel(rank: int, port: int, folder: str) -> None:
    """Gradients of two processes, each with one sequence of the batch, under DDP and FSDP2."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    case = make_case()
    inputs = (
        case.student_hidden.detach()[rank],
        case.teacher_hidden[rank],
        case.teacher_weight,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    replicated = nn.parallel.DistributedDataParallel(make_student())
    replicated(*inputs).backward()
    sharded: Any = fully_shard(make_student(), mesh=init_device_mesh("cpu", (2,)))
    sharded(*inputs).backward()
    gradients = {
        "DDP": {name: p.grad for name, p in replicated.module.named_parameters()},
        "FSDP2": {name: p.grad.full_tensor() for name, p in sharded.named_parameters()},
    }
    # A DTensor as that of a tensor-parallel lm_head is.
    with pytest.raises(ValueError, match="student_hidden: expected the same tokens on all ranks"):
        linear_adaptive_kl(inputs[0], sharded.lm_head.weight, *inputs[1:])
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_data_parallel(tmp_path):
    """Each of two processes gets the gradient of the mean over both."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        train_in_parallel, (port, str(tmp_path)), nprocs=2
    )
    case, student = make_case(), make_student()
    student(
        case.student_hidden.detach()[:2], case.teacher_hidden[:2], case.teacher_weight
    ).backward()
    for rank in range(2):
        for how, gradients in torch.load(tmp_path / f"{rank}.pt").items():
            for name, parameter in student.named_parameters():
                assert_near(gradients[name], cast(Tensor, parameter.grad), f"{how} {rank} {name}")


# ---- modules


@pytest.mark.parametrize(
    "divergence, function, options",
    [
        (AdaptiveKL(mu=0.7, ties="average"), linear_adaptive_kl, MAPS),
        (ForwardKL(), linear_forward_kl, {"temperature": 2.0, "scale_by_t2": True}),
        (ReverseKL(), linear_reverse_kl, {"reduction": "sum"}),
        (MixedKL(alpha=0.25), linear_mixed_kl, {"chunk_bytes": 4 * ROW_BYTES}),
    ],
)
def test_modules_are_their_functions(divergence, function, options):
    case, labels = make_case(), some_labels()
    loss_function = LinearDistillationLoss(divergence, shift=1, **options)
    count = {"num_items": 3} if options.get("reduction") is None else {}
    options = {**dataclasses.asdict(divergence), **options}
    expected = function(*case[:4], labels, shift=1, **options, **case.biases, **count)
    assert torch.equal(loss_function(*case[:4], labels, **case.biases, **count), expected)
    assert list(loss_function.parameters()) == []
    assert repr(loss_function).startswith(f"LinearDistillationLoss({divergence}, shift=1, ")


@pytest.mark.parametrize("option", ["inplace", "num_items", "student_bias"])
def test_module_refuses_what_is_no_option(option):
    message = rf"LinearDistillationLoss: expected options among temperature.*got {option}"
    with pytest.raises(TypeError, match=message):
        LinearDistillationLoss(**{option: 1})  # type: ignore[arg-type]


# ---- bad input

GOOD = make_case()
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "device": (
        {"student_weight": torch.zeros(V_S, H_S, device="meta")},
        ValueError,
        r"student_weight: expected the device of student_hidden, cpu, got meta",
    ),
    "device of the teacher": (
        {"teacher_hidden": torch.zeros(*SHAPE, H_T, device="meta")},
        ValueError,
        r"teacher_hidden: expected the device of student_hidden, cpu, got meta",
    ),
    "hidden size": (
        {"student_weight": torch.zeros(V_S, H_S + 1)},
        ValueError,
        r"student_weight: expected \[V, 16\], for student_hidden \[3, 7, 16\] float32, "
        r"got \[200, 17\] float32",
    ),
    "teacher's hidden size": (
        {"teacher_hidden": torch.zeros(3, 7, H_S)},
        ValueError,
        r"teacher_weight: expected \[V, 16\].*got \[232, 24\]",
    ),
    "transposed weight": (
        {"student_weight": GOOD.student_weight.detach().t()},
        ValueError,
        r"student_weight: expected \[V, 16\].*got \[16, 200\]",
    ),
    "weight of three dimensions": (
        {"teacher_weight": torch.zeros(1, V_T, H_T)},
        ValueError,
        r"teacher_weight: expected \[V, 24\].*got \[1, 232, 24\]",
    ),
    "bias": (
        {"student_bias": torch.zeros(V_T)},
        ValueError,
        r"student_bias: expected \[200\], for student_weight \[200, 16\].*got \[232\] float32",
    ),
    "teacher's bias": (
        {"teacher_bias": torch.zeros(V_T, 1)},
        ValueError,
        r"teacher_bias: expected \[232\].*got \[232, 1\]",
    ),
    "empty weight": (
        {"student_weight": torch.zeros(0)},
        ValueError,
        r"student_weight: expected the whole parameter, got \[0\] float32, which is empty; gather",
    ),
    "leading shape": (
        {"teacher_hidden": torch.zeros(21, H_T)},
        ValueError,
        r"teacher_hidden: expected the leading dimensions of .*, \[3, 7\], got \[21, 24\]",
    ),
    "0-d": (
        {"student_hidden": torch.zeros(())},
        ValueError,
        r"student_hidden: expected \[\.\.\., H\]",
    ),
    "no tensor": (
        {"teacher_weight": None},
        TypeError,
        r"teacher_weight.*torch.Tensor, got NoneType",
    ),
    "no student": ({"student_hidden": 1}, TypeError, r"student_hidden.*torch.Tensor, got int"),
    "integers": (
        {"student_hidden": torch.zeros(3, 7, H_S, dtype=torch.int64)},
        TypeError,
        r"student_hidden: expected float32 or .*int64",
    ),
    "no such product": (
        {"student_weight": GOOD.student_weight.detach().bfloat16()},
        TypeError,
        r"student_weight: expected the dtype of student_hidden .* float32 \(or autocast\), "
        r"got \[200, 16\] bfloat16",
    ),
    "no such sum": (
        {"teacher_bias": torch.zeros(V_T, dtype=torch.float16)},
        TypeError,
        r"teacher_bias: expected the dtype of teacher_hidden .*got \[232\] float16",
    ),
    "meta": (
        {"student_hidden": torch.zeros(3, 7, H_S, device="meta")},
        ValueError,
        r"student_hidden: expected a tensor with data, got \[3, 7, 16\] float32 on meta",
    ),
    "teacher requires grad": (
        {"teacher_weight": torch.zeros(V_T, H_T, requires_grad=True)},
        ValueError,
        r"teacher_weight: .*not require grad.*teacher_weight.detach\(\)",
    ),
    "labels": (
        {"labels": torch.zeros(3, 6, dtype=torch.long)},
        ValueError,
        r"labels: expected shape \[3, 7\], that of student_hidden .*got \[3, 6\]",
    ),
    "chunk of less than a row": (
        {"chunk_bytes": ROW_BYTES - 1},
        ValueError,
        rf"chunk_bytes: expected at least {ROW_BYTES}, .*got {ROW_BYTES - 1}",
    ),
    "chunk of no int": (
        {"chunk_bytes": 1e9},
        TypeError,
        r"chunk_bytes: expected an int, got float",
    ),
    "accum_dtype": (
        {"accum_dtype": torch.int64},
        TypeError,
        r"accum_dtype: expected float32 or .*got torch.int64",
    ),
    "softcap 0": (
        {"student_softcap": 0.0},
        ValueError,
        r"student_softcap: expected a finite number in \(0, inf\), got 0",
    ),
    "softcap negative": ({"teacher_softcap": -30}, ValueError, r"teacher_softcap: .*got -30"),
    "softcap nan": ({"student_softcap": float("nan")}, ValueError, r"student_softcap: .*got nan"),
    "softcap text": ({"student_softcap": "30"}, TypeError, r"student_softcap: .*number, got str"),
    "scale 0": ({"teacher_logit_scale": 0}, ValueError, r"teacher_logit_scale: expected .*got 0"),
    "scale inf": (
        {"student_logit_scale": float("inf")},
        ValueError,
        r"student_logit_scale: expected .*got inf",
    ),
    "scale None": ({"student_logit_scale": None}, TypeError, r"student_logit_scale: .*NoneType"),
    "mu": ({"mu": 1.0}, ValueError, r"mu: expected .*got 1"),
    "reduction": ({"reduction": "batchmean"}, ValueError, r"reduction: expected one of 'none'"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend: expected one of 'auto'"),
    "num_items": ({"num_items": -1}, ValueError, r"num_items: expected >= 0"),
    "return_stats": ({"return_stats": 1}, TypeError, r"return_stats: expected True or False"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, projected):
    changes, error, message = BAD[what]
    arguments = GOOD._asdict() | changes
    before = [x.detach().clone() for x in GOOD]
    with pytest.raises(error, match=f"^{message}"):
        linear_adaptive_kl(**arguments)
    assert not projected
    assert all(torch.equal(x, y) for x, y in zip(GOOD, before, strict=True))


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_a_weight_of_which_one_rank_has_all_is_whole():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(GOOD.student_weight.detach(), mesh, [Shard(0)])
        arguments = GOOD._asdict()
        assert torch.equal(
            linear_adaptive_kl(**arguments | {"student_weight": weight}),
            linear_adaptive_kl(**arguments),
        )
        hidden = distribute_tensor(GOOD.student_hidden.detach(), mesh, [Shard(0)])
        with pytest.raises(TypeError, match=r"^student_hidden: .*got a DTensor"):
            linear_adaptive_kl(**arguments | {"student_hidden": hidden})
    finally:
        dist.destroy_process_group()
