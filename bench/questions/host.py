"""`python -m bench host`: the time of the host for a call, until the kernels are launched.

Nothing is executed: Triton's own launch is run up to the driver, which does nothing. Rows are few,
so that PyTorch's tensors cost next to nothing. The time is that of this process on a CPU, the least
of many rounds, forward and backward together; an operator and an autograd.Function that compute
nothing, and a plain KL of the same rows in PyTorch, say what of it any loss would cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from akl_triton import adaptive_kl, forward_kl
from bench.inputs.machine import cpu
from bench.lab.compile import dry_run
from bench.report.tables import table

ROWS, VOCABULARY = 4, 1000
CALLS = 15  # a round
Step = Callable[[], Any]


def collect(rounds: int = 200) -> dict[str, Any]:
    """Microseconds of every call."""
    student, teacher = torch.randn(2, ROWS, VOCABULARY).bfloat16()
    leaf = student.requires_grad_()
    labels = torch.zeros(ROWS, dtype=torch.int64)
    with dry_run("sm_90"):
        steps: dict[str, Step] = {
            "`adaptive_kl`": lambda: trained(leaf, adaptive_kl(leaf, teacher, backend="triton")),
            "`adaptive_kl`, labels": lambda: trained(
                leaf, adaptive_kl(leaf, teacher, labels, kd_ratio=0.5, backend="triton")
            ),
            "`adaptive_kl`, in place": lambda: trained(
                leaf, adaptive_kl(1 * leaf, teacher, inplace=True, backend="triton")
            ),
            "`adaptive_kl`, forward": lambda: adaptive_kl(leaf.detach(), teacher, backend="triton"),
            "`forward_kl`": lambda: trained(leaf, forward_kl(leaf, teacher, backend="triton")),
            "an operator of torch.library that computes nothing": lambda: trained(
                leaf, nothing(leaf).sum()
            ),
            "an autograd.Function that computes nothing": lambda: trained(
                leaf,
                Nothing.apply(leaf).sum(),  # type: ignore[no-untyped-call]
            ),
            "plain KL in PyTorch": lambda: trained(leaf, plain(leaf, teacher)),
        }
        microseconds = {name: 1e6 * least(step, rounds) for name, step in steps.items()}
    return {"cpu": cpu(), "rounds": rounds, "microseconds": microseconds}


def markdown(data: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"N = {ROWS}, V = {VOCABULARY:,}, on {data['cpu']}; forward and backward unless a line "
            f"says otherwise, the least of {data['rounds']} rounds.",
            table(
                ("call", "µs"),
                [(name, f"{figure:.0f}") for name, figure in data["microseconds"].items()],
            ),
        ]
    )


def trained(leaf: Tensor, loss: Tensor) -> None:
    leaf.grad = None
    loss.backward()  # type: ignore[no-untyped-call]


def least(step: Step, rounds: int) -> float:
    """Seconds of a call in the fastest round, of the CPU: whoever else runs does not count."""
    step()
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(CALLS):
            step()
        seconds.append((time.process_time() - started) / CALLS)
    return min(seconds)


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (F.log_softmax(x.float(), dim=-1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@torch.library.custom_op("akl_bench::nothing", mutates_args=())
def nothing(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, _: Tensor) -> Tensor:
    return torch.empty_like(ctx.saved_tensors[0])


nothing.register_autograd(_gradient, setup_context=_save)


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(x.shape[0])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])
