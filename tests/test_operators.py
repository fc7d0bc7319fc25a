"""The operators from the side of torch.library: schemas, fake kernels, autograd, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import (
    AdaptiveKL,
    AdaptiveKLLoss,
    Divergence,
    adaptive_kl,
    distillation_loss,
    ops,
)
from akl_triton.divergences import Rule
from akl_triton.options import Backend, Reduction
from tests.support.cases import DIVERGENCES

V = 200
RULE = Rule(AdaptiveKL()).pack()
WITH_LABELS = Rule(AdaptiveKL(), label_weight=0.5).pack()


def make_logits(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(student, teacher), each [2, 3, V]."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, V, generator=g).to(device, dtype)
    return student.clone(), teacher.clone()


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend: Backend, device: torch.device, masked: bool) -> None:
    """The dtype matters only for allocations, so that each backend is given another. A mask comes
    with labels, which leave no statistic NaN."""
    student, teacher = make_logits(device, torch.bfloat16 if backend == "torch" else torch.float32)
    valid = torch.arange(6, device=device) != 2 if masked else None
    labels = torch.arange(6, device=device) if masked else None
    rule = WITH_LABELS if masked else RULE
    upstream = torch.linspace(-1.0, 1.0, 6, device=device)
    leaf = student.clone().requires_grad_()
    inputs = student, teacher, None, valid, labels
    rest = (masked, backend, *rule)  # with statistics where masked
    _, state, _ = ops.divergence(*inputs, *rest)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.divergence, (*inputs, *rest)),
        (ops.divergence, (leaf, *inputs[1:], *rest)),
        (ops.divergence_backward, (upstream, *inputs, state, backend, *rule)),
        (
            ops.divergence_with_gradient,
            (*inputs, upstream[:1].expand(6), masked, *rest),  # damped if masked
        ),
        (ops.rescale, (student[0].clone(), upstream[:3], backend)),
    ]
    for operator, arguments in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opcheck's own
            torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_of_pairs(backend: Backend, device: torch.device, masked: bool) -> None:
    student, teacher = make_logits(device)
    ids = torch.arange(4, dtype=torch.int32, device=device).expand(6, -1).contiguous()
    entries = teacher.view(1, 6, -1)[..., :5].log_softmax(-1).contiguous()
    valid = torch.arange(6, device=device) != 2 if masked else None
    labels = torch.arange(6, device=device) if masked else None
    rule = Rule.unpack(*(WITH_LABELS if masked else RULE))._replace(rest=True).pack()
    upstream = torch.linspace(-1.0, 1.0, 6, device=device)
    inputs = student, entries, ids, valid, labels
    rest = (masked, backend, *rule)
    _, state, _ = ops.divergence(*inputs, *rest)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.divergence, (student.clone().requires_grad_(), *inputs[1:], *rest)),
        (ops.divergence_backward, (upstream, *inputs, state, backend, *rule)),
        (ops.divergence_with_gradient, (*inputs, upstream, masked, *rest)),
    ]
    for operator, arguments in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opcheck's own
            torch.library.opcheck(operator, arguments)


def assert_compiled_equals_eager(
    function: Callable[[Tensor], tuple[Tensor, ...]], leaf: Tensor
) -> None:
    """Compare every output, and the gradient of the first under a random upstream."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        hidden = leaf.clone().requires_grad_()
        outputs = run(hidden)
        upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
        outputs[0].backward(upstream.to(leaf.device))
        results.append((*(x.detach() for x in outputs), hidden.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction, kd_ratio", [("none", 1.0), ("mean", 0.5)])
def test_compiled_with_labels(
    backend: Backend, device: torch.device, reduction: Reduction, kd_ratio: float, inplace: bool
) -> None:
    """Where labels are no tokens of a cross-entropy, its statistic is NaN."""
    student, teacher = make_logits(device)
    labels = torch.tensor([[0, 1, -100], [2, 3, 4]], device=device)

    def run(hidden: Tensor) -> tuple[Tensor, ...]:
        loss, stats = adaptive_kl(
            2 * hidden,
            teacher,
            labels,
            kd_ratio=kd_ratio,
            shift=1,
            temperature=2.0,
            reduction=reduction,
            inplace=inplace,
            return_stats=True,
            backend=backend,
        )
        return loss, *stats[: None if kd_ratio < 1.0 else -1]

    assert_compiled_equals_eager(run, student)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_module_on_a_view(backend: Backend, device: torch.device, inplace: bool) -> None:
    student, teacher = make_logits(device)
    loss_function = AdaptiveKLLoss(inplace=inplace, backend=backend)

    def run(hidden: Tensor) -> tuple[Tensor, ...]:
        return (loss_function((2 * hidden).view(-1, V), teacher.view(-1, V)),)

    assert_compiled_equals_eager(run, student)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence_is_an_operator_and_one_graph(divergence: Divergence) -> None:
    student, teacher = make_logits(torch.device("cpu"))
    leaf = student.clone().requires_grad_()
    labels = torch.arange(6).view(2, 3)
    of_rows = labels.flatten() if divergence.needs_labels else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        rest = (False, "torch", *Rule(divergence).pack())
        torch.library.opcheck(ops.divergence, (leaf, teacher, None, None, of_rows, *rest))

    def run(hidden: Tensor) -> tuple[Tensor, ...]:
        loss: Tensor = distillation_loss(
            2 * hidden, teacher, labels, divergence=divergence, backend="torch"
        )
        return (loss,)

    torch.compiler.reset()  # the same function is compiled for each divergence
    assert_compiled_equals_eager(run, student)


def test_compiled_once_for_all_batches(backend: Backend, device: torch.device) -> None:
    """Neither the number of sequences nor that of the tokens of a step causes another graph."""
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def run(student: Tensor, teacher: Tensor, num_items: int) -> Tensor:
        loss: Tensor = adaptive_kl(student, teacher, num_items=num_items, backend=backend)
        return loss

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    student, teacher = (x.view(-1, V).repeat(2, 1) for x in make_logits(device))
    student.requires_grad_()
    for n in (3, 5, 7):
        batch = student[:n], teacher[:n], 10 * n
        losses = [function(*batch) for function in (compiled, run)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses))
    assert len(graphs) == 1


def test_compiled_refuses_what_eager_refuses(backend: Backend, device: torch.device) -> None:
    student, teacher = make_logits(device)
    compiled = torch.compile(adaptive_kl, backend="aot_eager")
    with pytest.raises(ValueError, match=r"teacher_logits: expected the leading dimensions"):
        compiled(student, teacher[:, :2], backend=backend)


def test_every_output_is_written(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs of an operator depend on its inputs alone, ignored rows included."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan)
    )
    student, teacher = make_logits(device)
    valid = torch.arange(6, device=device) != 2
    inputs = student, teacher, None, valid, torch.arange(6, device=device)
    loss, state, stats = ops.divergence(*inputs, True, backend, *WITH_LABELS)
    gradient = ops.divergence_backward(
        torch.ones(6, device=device), *inputs, state, backend, *WITH_LABELS
    )
    for output in (loss, state, stats, gradient):
        assert output.isfinite().all()
