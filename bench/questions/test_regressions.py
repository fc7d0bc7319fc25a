"""`pytest bench --benchmark-only`: forward and backward of the PyTorch backend and of the authors'
code on this CPU, grouped by V so that their ratio shows in one run.

pytest-benchmark can keep a run (`--benchmark-autosave`) and compare a later one with it
(`--benchmark-compare`, `--benchmark-compare-fail=min:10%`). A plain `pytest` does not collect this
file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from akl_triton import adaptive_kl
from akl_triton.cli.bench import make_logits
from akl_triton.reference import authors_adaptive_kl

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PyTorch backend": functools.partial(adaptive_kl, backend="torch"),
    "authors": authors_adaptive_kl,
}
LOGITS = 2**21  # in a call, at any V
ROUNDS = 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [1_024, 32_000, 151_936])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(
    benchmark: BenchmarkFixture, name: str, vocabulary: int, dtype: torch.dtype
) -> None:
    rows = LOGITS // vocabulary
    student, teacher = make_logits(rows, vocabulary, torch.device("cpu"), dtype)
    loss = LOSSES[name]

    def step() -> Tensor:
        student.grad = None
        value = loss(student, teacher)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    benchmark.group = f"N = {rows:,}, V = {vocabulary:,}, {dtype}"
    value = benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(value, authors_adaptive_kl(student, teacher).detach())
