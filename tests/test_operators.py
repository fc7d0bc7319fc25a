"""The operators as torch.library sees them: schemas, fake kernels, autograd, torch.compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from akl_triton import adaptive_kl, ops
from akl_triton.functional import Backend

V = 200


def rows(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, V, generator=g).to(device, dtype)
    return student.clone(), teacher.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    student, teacher = rows(dtype, device)
    counted = torch.tensor([True, True, False, True, True, True], device=device)
    upstream = torch.ones(6, device=device)
    rule = (0.5, 1.0, "exclusive", "stable", None)
    _, state, _ = ops.divergence(student, teacher, counted, *rule, True, backend)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.divergence, (student, teacher, counted, *rule, True, backend)),
        (
            ops.divergence,
            (student.clone().requires_grad_(), teacher, counted, *rule, True, backend),
        ),
        (
            ops.divergence_backward,
            (upstream, student, teacher, counted, state, 1.0, None, backend),
        ),
        (
            ops.divergence_with_gradient,
            (student.clone(), teacher, counted, upstream, *rule, True, backend),
        ),
        (ops.rescale, (student[0].clone(), upstream[:3] * 2, backend)),
    ]
    for operator, arguments in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opcheck's own
            torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_fullgraph(backend: Backend, device: torch.device, inplace: bool) -> None:
    student, teacher = rows(torch.float32, device)
    labels = torch.tensor([[0, 1, -100], [2, 3, 4]], device=device)

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = adaptive_kl(
            2 * hidden, teacher, labels, shift=1, temperature=2.0, inplace=inplace, backend=backend
        )
        return loss

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiled_once_for_all_batch_sizes(backend: Backend, device: torch.device) -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def loss_of(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = adaptive_kl(student, teacher, backend=backend)
        return loss

    student, teacher = rows(torch.float32, device)
    for n in (3, 5, 7):
        batch = student.view(-1, V).repeat(2, 1)[:n], teacher.view(-1, V).repeat(2, 1)[:n]
        torch.testing.assert_close(loss_of(*batch), adaptive_kl(*batch, backend=backend))
    assert len(graphs) == 1
