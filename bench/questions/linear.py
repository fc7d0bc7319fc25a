"""`python -m bench linear`: the fused linear loss, its parts, its model of memory, and others.

Memory is the most that one forward and backward hold on top of the inputs, gradients included,
recorded by PyTorch's profiler (a CPU) or its allocator (a GPU). Times are the least of several
rounds in one process, the parts and the whole in turn. Heads are those of SmolLM2-135M by default:
V = 49,152, H = 576 on both sides.

Peers are optional:

    pip install liger-kernel==0.8.5 trl==1.16.0
"""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from akl_triton import adaptive_kl, linear_adaptive_kl, linear_forward_kl
from akl_triton.cli.bench import peak_memory, synchronize
from akl_triton.linear import chunk_rows, default_chunk_bytes
from akl_triton.reference import authors_adaptive_kl

VOCABULARY, HIDDEN = 49_152, 576
AUTHORS_TOKENS = 256  # their memory is measured on these: so much a token, see `collect`
PEER_CHUNK = 1024  # tokens: Liger's default
MIB = 2**20


@dataclass(frozen=True)
class Inputs:
    """What a step starts from; student_hidden and student_weight require grad."""

    student_hidden: Tensor  # [N, H]
    student_weight: Tensor  # [V, H]
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_weight


def make_inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random heads whose logits are about as spread as a language model's."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=g)).to(device, dtype)

    scale = 3.0 / HIDDEN**0.5
    return Inputs(
        random(tokens, HIDDEN).requires_grad_(),
        random(VOCABULARY, HIDDEN, scale=scale).requires_grad_(),
        random(tokens, HIDDEN),
        random(VOCABULARY, HIDDEN, scale=scale),
    )


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Method:
    """One way from hidden states to a mean loss."""

    name: str
    computes: str
    loss: Loss
    package: str | None = None
    version: str | None = None
    remark: str = ""

    def obstacle(self) -> str | None:
        """Why it is not measured here; None if it is."""
        if self.package is None:
            return None
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        if found != self.version:
            return f"{self.package} {self.version} is measured, {found} is installed"
        return None


def authors(x: Inputs) -> Tensor:
    s, t = F.linear(*x.trained), F.linear(x.teacher_hidden, x.teacher_weight)
    return authors_adaptive_kl(s, t)


def ours_on_logits(x: Inputs) -> Tensor:
    s, t = F.linear(*x.trained), F.linear(x.teacher_hidden, x.teacher_weight)
    return adaptive_kl(s, t, inplace=True)  # type: ignore[no-any-return]


def checkpointed(x: Inputs, rows: int) -> Tensor:
    """The authors' computation, chunk by chunk, each computed again in the backward pass."""

    def of_chunk(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        return authors_adaptive_kl(F.linear(h, w), F.linear(ht, wt)) * len(h)

    both = (torch.split(h, rows) for h in (x.student_hidden, x.teacher_hidden))
    chunks = zip(*both, strict=True)
    losses: list[Tensor] = [
        checkpoint(of_chunk, h, x.student_weight, ht, x.teacher_weight, use_reentrant=False)
        for h, ht in chunks
    ]
    return torch.stack(losses).sum() / len(x.student_hidden)


def liger(x: Inputs, beta: float) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        compiled=x.student_hidden.is_cuda,
        chunk_size=PEER_CHUNK,
    )
    labels = torch.zeros(len(x.student_hidden), dtype=torch.long, device=x.student_hidden.device)
    return loss(*x.trained, x.teacher_hidden, x.teacher_weight, labels)  # type: ignore[no-any-return]


def trl(x: Inputs, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        *x.trained, None, x.teacher_hidden, x.teacher_weight, None, beta
    )
    return divergence.mean()  # type: ignore[no-any-return]


def methods(chunk_rows: int) -> list[Method]:
    liger_of = {"package": "liger-kernel", "version": "0.8.5"}
    trl_of = {"package": "trl", "version": "1.16.0"}
    on_cpu = "" if torch.cuda.is_available() else "on a CPU without its torch.compile"
    tiles = "" if torch.cuda.is_available() else "on a CPU its tiles are folded by PyTorch"
    return [
        Method("linear_adaptive_kl", "AKL", lambda x: linear_adaptive_kl(*_all(x))),
        Method("linear_forward_kl", "forward KL", lambda x: linear_forward_kl(*_all(x))),
        Method("adaptive_kl of all logits, in place", "AKL", ours_on_logits),
        Method(
            f"authors' code under checkpointing, {chunk_rows} tokens a chunk",
            "AKL",
            functools.partial(checkpointed, rows=chunk_rows),
        ),
        Method(
            f"Liger LigerFusedLinearJSDLoss(beta=0), {PEER_CHUNK} tokens a chunk",
            "forward KL",
            functools.partial(liger, beta=0.0),
            remark=on_cpu,
            **liger_of,
        ),
        Method(
            f"Liger LigerFusedLinearJSDLoss(beta=0.5), {PEER_CHUNK} tokens a chunk",
            "Jensen-Shannon",
            functools.partial(liger, beta=0.5),
            remark=on_cpu,
            **liger_of,
        ),
        Method(
            "TRL ChunkedDivergenceFunction(beta=0), tiles of 4,096 x 32,768",
            "forward KL",
            functools.partial(trl, beta=0.0),
            remark=tiles,
            **trl_of,
        ),
    ]


def _all(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*x.trained, x.teacher_hidden, x.teacher_weight)


def chunk_rows_of(inputs: Inputs) -> int:
    """Tokens a chunk that linear_adaptive_kl takes by default."""
    row = 2 * VOCABULARY * inputs.student_hidden.itemsize
    chunk_bytes = default_chunk_bytes(inputs.student_hidden.device)
    return min(chunk_rows(chunk_bytes, row), len(inputs.student_hidden))


def predicted_bytes(inputs: Inputs) -> dict[str, int]:
    """The design's model, and what is returned."""
    size = inputs.student_hidden.itemsize
    return {
        "logits of a chunk, 2 C V bytes": 2 * chunk_rows_of(inputs) * VOCABULARY * size,
        "sum of dW, 4 V H": 4 * VOCABULARY * HIDDEN,
        "dH, N H bytes": inputs.student_hidden.numel() * size,
    }


def step_of(loss: Loss, inputs: Inputs) -> Callable[[], None]:
    def step() -> None:
        for x in inputs.trained:
            x.grad = None
        loss(inputs).backward()  # type: ignore[no-untyped-call]

    return step


def measure_memory(loss: Loss, inputs: Inputs) -> int:
    """Peak bytes on top of the inputs."""
    for x in inputs.trained:
        x.grad = None
    peak = peak_memory(step_of(loss, inputs), inputs.student_hidden.device)
    for x in inputs.trained:
        x.grad = None
    return peak


def parts(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """What the fused loss is made of, on all tokens at once."""
    h, w = (x.detach() for x in inputs.trained)
    student = F.linear(h, w).requires_grad_()
    teacher = F.linear(inputs.teacher_hidden, inputs.teacher_weight)
    buffer = torch.empty_like(teacher)
    weight_gradient = torch.empty_like(w)
    hidden_gradient = torch.empty_like(h)

    def loss() -> None:
        torch.autograd.grad(adaptive_kl(student, teacher), student)

    return {
        "student logits": lambda: torch.mm(h, w.t(), out=buffer),
        "teacher logits": lambda: torch.mm(
            inputs.teacher_hidden, inputs.teacher_weight.t(), out=buffer
        ),
        "adaptive_kl": loss,
        "dH": lambda: torch.mm(buffer, w, out=hidden_gradient),
        "dW": lambda: torch.mm(buffer.t(), h, out=weight_gradient),
    }


def least_times(
    steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Seconds, the least of `rounds` rounds over all of them, after one that is not counted."""
    least = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 1):
        for name, step in steps.items():
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            if turn:
                least[name] = min(least[name], time.perf_counter() - started)
    return least


def collect(
    tokens: int = 4096,
    time_tokens: int = 1024,
    rounds: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Memory of `tokens`, times of `time_tokens`."""
    where, of_inputs = torch.device(device), getattr(torch, dtype)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    inputs = make_inputs(tokens, where, of_inputs)
    rows = chunk_rows_of(inputs)
    few = make_inputs(AUTHORS_TOKENS, where, of_inputs)
    of_authors = measure_memory(authors, few)
    table = []
    for method in methods(rows):
        row: dict[str, Any] = {
            "name": method.name,
            "computes": method.computes,
            "obstacle": method.obstacle(),
            "remark": method.remark,
        }
        if row["obstacle"] is None:
            row["peak_bytes"] = measure_memory(method.loss, inputs)
        table.append(row)
    table.append(
        {
            "name": f"authors' code on all logits, from {AUTHORS_TOKENS} tokens",
            "computes": "AKL",
            "obstacle": None,
            # Reached before there is a dW, it is all proportional to the tokens.
            "remark": "in proportion to the tokens",
            "peak_bytes": of_authors * tokens // AUTHORS_TOKENS,
        }
    )
    del inputs, few
    timed = make_inputs(time_tokens, where, of_inputs)
    steps = parts(timed) | {"linear_adaptive_kl": step_of(methods(rows)[0].loss, timed)}
    seconds = least_times(steps, rounds, where)
    whole = seconds.pop("linear_adaptive_kl")
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": dtype,
        "tokens": tokens,
        "time_tokens": time_tokens,
        "rounds": rounds,
        "vocabulary": VOCABULARY,
        "hidden": HIDDEN,
        "chunk_tokens": rows,
        "predicted_bytes": predicted_bytes(make_inputs(tokens, where, of_inputs)),
        "methods": table,
        "parts_seconds": seconds,
        "fused_seconds": whole,
        "time_ratio": whole / sum(seconds.values()),
    }


def markdown(data: dict[str, Any]) -> str:
    """Two tables: peak memory, and the time of the parts."""
    tokens = data["tokens"]
    measured = {row["name"]: row["peak_bytes"] for row in data["methods"] if "peak_bytes" in row}
    ours = measured["linear_adaptive_kl"]
    *_, (_, of_authors) = measured.items()
    predicted = sum(data["predicted_bytes"].values())
    lines = [
        f"From hidden states to loss and gradients of {tokens:,} tokens, "
        f"V = {data['vocabulary']:,}, H = {data['hidden']} on both sides, {data['dtype']}, "
        f"{data['device']}, {data['threads']} threads, torch {data['torch']}.",
        "",
        "Peak memory on top of the inputs, gradients included:",
        "",
        "| | computes | MiB | of the authors' | |",
        "|---|---|---:|---:|---|",
    ]
    for row in data["methods"]:
        if row["obstacle"] is not None:
            figures = ["not measured", "", row["obstacle"]]
        else:
            figures = [
                f"{row['peak_bytes'] / MIB:,.0f}",
                f"{row['peak_bytes'] / of_authors:.1%}",
                row["remark"],
            ]
        lines.append("| " + " | ".join([row["name"], row["computes"], *figures]) + " |")
    terms = " + ".join(
        f"{name}: {size / MIB:,.0f}" for name, size in data["predicted_bytes"].items()
    )
    lines += [
        "",
        f"The model of `linear_adaptive_kl`, C = {data['chunk_tokens']}: {terms} = "
        f"{predicted / MIB:,.0f} MiB; measured {ours / predicted:.2f} times that.",
        "",
        f"Time of {data['time_tokens']:,} tokens, least of {data['rounds']} rounds:",
        "",
        "| " + " | ".join([*data["parts_seconds"], "sum", "linear_adaptive_kl", "ratio"]) + " |",
        "|" + "---:|" * (len(data["parts_seconds"]) + 3),
        "| "
        + " | ".join(
            [f"{seconds:.2f} s" for seconds in data["parts_seconds"].values()]
            + [
                f"{sum(data['parts_seconds'].values()):.2f} s",
                f"{data['fused_seconds']:.2f} s",
                f"{data['time_ratio']:.2f}",
            ]
        )
        + " |",
    ]
    return "\n".join(lines) + "\n"
