"""`python -m bench operators`: the bytes that each way to compute the loss moves, operator by
operator. The bytes of the inputs and outputs of every PyTorch operator in forward and backward are
counted (bench/lab/operators.py). Triton kernels are compiled for sm_90 and executed by
bench/lab/ptxcpu, which counts what they load and store. There is no cache in either count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from akl_triton import AdaptiveKL, eager
from akl_triton.backend import TORCH
from akl_triton.cli.bench import one_thread, peak_memory
from akl_triton.divergences import Rule
from akl_triton.rows import empty_result
from bench.inputs.peers import PEERS, Peer
from bench.inputs.real_logits import real_logits
from bench.lab import ptxcpu
from bench.lab.operators import OperatorMeter

ARCH = 90
ROWS = 256

AUTHORS = "authors, eager"
COMPUTES = {
    "adaptive_kl": "AKL",
    "forward_kl": "FKL alone",
    "reverse_kl": "RKL alone",
    "jsd": "JSD",
}

Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A row of the table."""

    name: str
    computes: str
    step: Step  # forward and backward


def subjects() -> list[Subject]:
    """Our losses, and every peer that can run here; code of torch.compile is that of a GPU only
    there."""
    found = []
    for peer in PEERS:
        with ptxcpu.active(arch=ARCH):
            if peer.kind != "compiled" and peer.obstacle("cpu") is None:
                found.append(Subject(peer.name, peer.computes, _step(peer)))
    ours = Subject("adaptive_kl, PyTorch backend", "adaptive_kl", _torch_backend)
    return [*found[:1], ours, *found[1:]]


def _step(peer: Peer) -> Step:
    def step(student: Tensor, teacher: Tensor) -> None:
        student.grad = None
        peer.loss(student, teacher).backward()  # type: ignore[no-untyped-call]

    return step


def is_of_our_kernels(operator: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether ptxcpu counts the bytes that an operator moves."""
    if operator.namespace != "akl_triton":
        return False
    if TORCH in arguments:
        raise ValueError("operators: measure akl_triton.eager itself, not its operator")
    return True


@torch.no_grad()
def _torch_backend(student: Tensor, teacher: Tensor) -> None:
    """The work of adaptive_kl(backend="torch") and its backward, outside of the operator around
    it."""
    rule = Rule(AdaptiveKL())
    result = empty_result(student[None], with_stats=False)
    eager.forward(student, teacher, None, None, rule, result)
    upstream = torch.ones(()).expand(len(student)) / len(student)
    gradient = torch.empty_like(student)
    eager.backward(upstream, student, teacher, None, None, result.state, rule, gradient)
    student.grad = gradient


def measure(subject: Subject, student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """The bytes per vocabulary position of the operators and of the kernels, and temporaries
    alive."""
    positions = student.numel()
    leaf = student.clone().requires_grad_()
    with ptxcpu.active(arch=ARCH) as counters:
        subject.step(leaf, teacher)  # compiles
        counters.reset()
        with (
            one_thread(),
            OperatorMeter(large=positions, elsewhere=is_of_our_kernels) as meter,
        ):
            subject.step(leaf, teacher)
        kernels = {
            name: {
                "launches": counts["launches"],
                "read": counts["gld_bytes"] / positions,
                "written": counts["gst_bytes"] / positions,
            }
            for name, counts in counters.items()
        }
        leaf.grad = None
        held = peak_memory(lambda: subject.step(leaf, teacher), leaf.device)
    total = meter.total()
    in_kernels = sum(kernel["read"] + kernel["written"] for kernel in kernels.values())
    return {
        "name": subject.name,
        "computes": subject.computes,
        "bytes": (total.read + total.written) / positions + in_kernels,
        "bytes_in_kernels": in_kernels,
        "bytes_in_large_tensors": total.large / positions + in_kernels,
        "temporaries": (held - leaf.nbytes) / positions,  # the gradient is an output
        "operators": {
            name: {"calls": m.calls, "read": m.read / positions, "written": m.written / positions}
            for name, m in meter.operators.items()
        },
        "kernels": kernels,
    }


def collect(rows: int = ROWS) -> dict[str, Any]:
    """The figures of forward and backward for every subject, on real logits in bf16, T = 1."""
    student, teacher = (x.bfloat16() for x in real_logits(rows))
    return {
        "arch": f"sm_{ARCH}",
        "rows": rows,
        "vocabulary": student.shape[1],
        "subjects": [measure(subject, student, teacher) for subject in subjects()],
    }


def markdown(data: dict[str, Any]) -> str:
    """A table of all subjects, grouped by what they compute, and one of the authors' operators."""
    found = data["subjects"]
    ours = {s["computes"]: s["bytes"] for s in reversed(found) if s["name"] == s["computes"]}
    lines = [
        f"Forward + backward of real logits, N = {data['rows']}, V = {data['vocabulary']:,}, bf16, "
        f"T = 1. Per vocabulary position; kernels compiled for {data['arch']}.",
        "",
        "| computes | by | bytes | times ours | in [N, V] tensors | in Triton kernels "
        "| temporaries alive, bytes | operators | kernels |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for computes in dict.fromkeys(s["computes"] for s in found):
        for s in (s for s in found if s["computes"] == computes):
            ratio = f"{s['bytes'] / ours[computes]:.1f}" if computes in ours else "-"
            lines.append(
                f"| {COMPUTES[computes]} | {s['name']} | {s['bytes']:.1f} | {ratio} "
                f"| {s['bytes_in_large_tensors']:.1f} | {s['bytes_in_kernels']:.1f} "
                f"| {s['temporaries']:.1f} | {sum(o['calls'] for o in s['operators'].values())} "
                f"| {sum(k['launches'] for k in s['kernels'].values())} |"
            )
    authors = next(s for s in found if s["name"] == AUTHORS)
    moved = {n: o for n, o in authors["operators"].items() if o["read"] + o["written"] >= 0.05}
    lines += [
        "",
        "An operator's inputs are counted once and so are its outputs: a second read inside of it "
        "is not seen. FKL and RKL alone are less work than AKL, which needs both, the gap and the "
        "head: they are to be compared with ours of that name. The PyTorch backend works in a few "
        "MiB that it uses again for every chunk of rows; the bytes that it moves to and from "
        "[N, V] tensors are in the column of that name.",
        "",
        "The authors' code, operator by operator:",
        "",
        "| operator | calls | bytes read | bytes written |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {o['calls']} | {o['read']:.1f} | {o['written']:.1f} |"
            for name, o in sorted(moved.items(), key=lambda item: -sum(item[1].values()))
        ),
    ]
    return "\n".join(lines)
