"""`python -m bench linear`: the fused linear loss, its parts, its model of memory, and others.

Memory is the most that one forward and backward hold on top of the inputs, gradients included,
recorded by PyTorch's profiler (a CPU) or its allocator (a GPU). Times are the least of several
rounds in one process, the parts and the whole in turn. The lm_heads have the sizes of
SmolLM2-135M's, V = 49,152 and H = 576 on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from akl_triton import adaptive_kl
from akl_triton.cli.bench import MIB, peak_memory
from akl_triton.linear_ops import chunk_rows, default_chunk_bytes
from bench.inputs.linear_peers import LinearLoss, authors, linear_peers
from bench.inputs.shapes import SMOLLM2_HIDDEN, SMOLLM2_VOCABULARY
from bench.inputs.synthetic import HiddenStates, make_hidden_states
from bench.lab.clock import least_times

AUTHORS_TOKENS = 256  # their memory is measured on these: so much a token, see `collect`


def chunk_rows_of(states: HiddenStates) -> int:
    """The number of tokens in a chunk of linear_adaptive_kl by default."""
    row = 2 * SMOLLM2_VOCABULARY * states.student_hidden.itemsize
    chunk_bytes = default_chunk_bytes(states.student_hidden.device)
    return min(chunk_rows(chunk_bytes, row), len(states.student_hidden))


def predicted_bytes(states: HiddenStates) -> dict[str, int]:
    """The peak by the model of the design, with the returned gradients."""
    size = states.student_hidden.itemsize
    return {
        "logits of a chunk, 2 C V bytes": 2 * chunk_rows_of(states) * SMOLLM2_VOCABULARY * size,
        "sum of dW, 4 V H": 4 * SMOLLM2_VOCABULARY * SMOLLM2_HIDDEN,
        "dH, N H bytes": states.student_hidden.numel() * size,
    }


def step_of(loss: LinearLoss, states: HiddenStates) -> Callable[[], None]:
    def step() -> None:
        for x in states.trained:
            x.grad = None
        loss(*states).backward()  # type: ignore[no-untyped-call]

    return step


def measure_memory(loss: LinearLoss, states: HiddenStates) -> int:
    """The peak bytes beyond those of the inputs."""
    for x in states.trained:
        x.grad = None
    peak = peak_memory(step_of(loss, states), states.student_hidden.device)
    for x in states.trained:
        x.grad = None
    return peak


def parts(states: HiddenStates) -> dict[str, Callable[[], Any]]:
    """The parts of the fused loss, on all tokens at once."""
    h, w = (x.detach() for x in states.trained)
    student = F.linear(h, w).requires_grad_()
    teacher = F.linear(states.teacher_hidden, states.teacher_weight)
    buffer = torch.empty_like(teacher)
    weight_gradient = torch.empty_like(w)
    hidden_gradient = torch.empty_like(h)

    def loss() -> None:
        torch.autograd.grad(adaptive_kl(student, teacher), student)

    return {
        "student logits": lambda: torch.mm(h, w.t(), out=buffer),
        "teacher logits": lambda: torch.mm(
            states.teacher_hidden, states.teacher_weight.t(), out=buffer
        ),
        "adaptive_kl": loss,
        "dH": lambda: torch.mm(buffer, w, out=hidden_gradient),
        "dW": lambda: torch.mm(buffer.t(), h, out=weight_gradient),
    }


def collect(
    tokens: int = 4096,
    time_tokens: int = 1024,
    rounds: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """The memory of `tokens`, and the times of `time_tokens`."""
    where = torch.device(device)

    def hidden_states_of(rows: int) -> HiddenStates:
        return make_hidden_states(
            rows, SMOLLM2_VOCABULARY, SMOLLM2_HIDDEN, where, getattr(torch, dtype), seed=0
        )

    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    states = hidden_states_of(tokens)
    rows = chunk_rows_of(states)
    few = hidden_states_of(AUTHORS_TOKENS)
    of_authors = measure_memory(authors, few)
    table = []
    for peer in linear_peers(rows):
        row: dict[str, Any] = {
            "name": peer.name,
            "computes": peer.computes,
            "obstacle": peer.obstacle(),
            "remark": peer.remark,
        }
        if row["obstacle"] is None:
            row["peak_bytes"] = measure_memory(peer.loss, states)
        table.append(row)
    table.append(
        {
            "name": f"authors' code on all logits, from {AUTHORS_TOKENS} tokens",
            "computes": "AKL",
            "obstacle": None,
            # That peak comes before there is a dW, so that all of it is proportional to the tokens.
            "remark": "in proportion to the tokens",
            "peak_bytes": of_authors * tokens // AUTHORS_TOKENS,
        }
    )
    del states, few
    timed = hidden_states_of(time_tokens)
    steps = parts(timed) | {"linear_adaptive_kl": step_of(linear_peers(rows)[0].loss, timed)}
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
        "vocabulary": SMOLLM2_VOCABULARY,
        "hidden": SMOLLM2_HIDDEN,
        "chunk_tokens": rows,
        "predicted_bytes": predicted_bytes(hidden_states_of(tokens)),
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
