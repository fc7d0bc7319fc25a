"""`python -m bench sparse`: teachers of k pairs: how far their gradients are, and what they cost.

The logits are real (bench/inputs/real_logits.py): the student that `akl-triton demo` starts with,
and the same drawn nearer to its teacher. The kernels are compiled for GPUs that are not there, and
their machine code is read; bytes are counted where their PTX is executed on this CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from akl_triton import AdaptiveKL, Divergence, ForwardKL, SparseTeacher, distillation_loss
from akl_triton import teacher_pairs as pairs_of
from bench.inputs.real_logits import real_logits, resampled
from bench.lab import ptxcpu
from bench.lab.compile import NVIDIA, RecordedLaunch, record_launches
from bench.lab.sass import Loop, analyse
from bench.questions.instructions import GPUS, MAIN_TARGET
from bench.questions.traffic import ARCH, totals
from bench.report.tables import table

K = (8, 16, 32, 64, 128)
# The student's logits are teacher + share (student - teacher).
SHARES = (1.0, 0.3, 0.1)
KINDS = ("bucket", "bucket and the student's k", "zero", "renormalise")
VOCABULARY = 151_936
KERNELS = ("pairs_kernel", "pairs_gradient_kernel")
MOST_BYTES, MOST_INSTRUCTIONS = 6.3, 10.0  # a position, at k = 64


def collect(rows: int = 256, counted_rows: int = 8) -> dict[str, Any]:
    """The errors of the gradients, and the costs of the kernels."""
    student, teacher = real_logits(rows)
    return {
        "rows": rows,
        "vocabulary": student.shape[1],
        "errors": [
            errors(teacher + share * (student - teacher), teacher, k) for share in SHARES for k in K
        ],
        "kernels": [
            kernels(target, k)
            for target in GPUS
            for k in ((64, 1024) if target == MAIN_TARGET else (64,))
        ],
        "traffic": traffic(
            *resampled(student[:counted_rows], teacher[:counted_rows], VOCABULARY, VOCABULARY), 64
        ),
    }


# ---------------------------------------------------------------- gradients


def gradient(student: Tensor, teacher: Tensor | SparseTeacher, divergence: Divergence) -> Tensor:
    leaf = student.clone().requires_grad_()
    distillation_loss(leaf, teacher, divergence=divergence, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def errors(student: Tensor, teacher: Tensor, k: int) -> dict[str, Any]:
    """The error of the gradient of each kind of pairs, relative to the dense one: its norm over all
    rows; and the forward KL of the rows, which says how far the student is."""
    pairs = pairs_of(teacher, k)
    union = torch.cat([pairs.ids, pairs_of(student, k).ids], dim=1).long().sort(dim=1).values
    repeated = torch.zeros_like(union, dtype=torch.bool)
    repeated[:, 1:] = union[:, 1:] == union[:, :-1]
    log_p = teacher.log_softmax(-1)
    own = log_p.gather(1, union).masked_fill(repeated, -torch.inf)
    outside = log_p.scatter(1, union, -torch.inf).logsumexp(-1)
    teachers = {
        "bucket": pairs,
        "bucket and the student's k": SparseTeacher(union.masked_fill(repeated, -1), own, outside),
        "zero": SparseTeacher(pairs.ids, pairs.log_probs, outside="zero"),
        "renormalise": SparseTeacher(pairs.ids, pairs.log_probs, outside="renormalise"),
    }
    found: dict[str, dict[str, float]] = {}
    for divergence in (ForwardKL(), AdaptiveKL()):
        dense = gradient(student, teacher, divergence)
        found[divergence.name] = {
            kind: float((gradient(student, sparse, divergence) - dense).norm() / dense.norm())
            for kind, sparse in teachers.items()
            if kind != "zero" or isinstance(divergence, ForwardKL)
        }
    forward = distillation_loss(student, teacher, divergence=ForwardKL())
    return {"forward_kl": forward.item(), "k": k, "gradient_errors": found}


# ---------------------------------------------------------------- kernels


def kernels(target: str, k: int) -> dict[str, Any]:
    """Instructions a position of the loops over full blocks of both kernels, and the most stack of
    all that a call launches."""
    student = torch.zeros(2, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    log_probs = torch.full((2, k), 0.5 / k).log()
    teacher = SparseTeacher(torch.arange(k).expand(2, -1), log_probs, torch.full((2,), 0.5).log())
    with record_launches(target) as launches:
        distillation_loss(student, teacher, backend="triton").backward()  # type: ignore[no-untyped-call]
    codes = {launch.name: analyse(launch.compiled) for launch in launches}
    return {
        "target": target,
        "k": k,
        "instructions": {
            launch.name: _per_position(launch) for launch in launches if launch.name in KERNELS
        },
        "registers": {name: codes[name].registers for name in KERNELS},
        "stack_bytes": max(code.stack_bytes for code in codes.values()),
    }


def _per_position(launch: RecordedLaunch) -> float:
    """Of the loop that does most in a turn, and so handles all full blocks but a few."""
    code = analyse(launch.compiled)
    per_thread = code.elements_per_thread(launch.constexprs["BLOCK"])

    def of(loop: Loop) -> float:
        return loop.body.instructions / (per_thread * loop.steps(2 * per_thread))

    loops = [
        loop
        for loop in code.innermost_loops
        if loop.body.bytes_loaded and loop.body.special.get("ex2", 0)
        and set(loop.body.global_loads) == {16}
    ]  # fmt: skip
    return of(max(loops, key=lambda loop: (loop.body.bytes_loaded, -of(loop))))


def traffic(student: Tensor, teacher: Tensor, k: int) -> dict[str, float]:
    """Bytes that a step asks for, and those of the distinct sectors that its launches touch, over
    vocabulary positions."""
    leaf = student.bfloat16().requires_grad_()
    with ptxcpu.active(arch=ARCH) as counters:
        distillation_loss(leaf, pairs_of(teacher, k), backend="triton").backward()  # type: ignore[no-untyped-call]
        counts = totals(counters)
    of_step = {
        "asked": counts["bytes_read"] + counts["bytes_written"],
        "compulsory": counts["compulsory_read"] + counts["compulsory_written"],
    }
    return {name: count / student.numel() for name, count in of_step.items()}


def markdown(data: dict[str, Any]) -> str:
    distances = sorted({case["forward_kl"] for case in data["errors"]}, reverse=True)
    parts = [
        "The error of the gradient of k pairs, relative to that of the whole vocabulary (norms "
        f"over {data['rows']} rows of V = {data['vocabulary']:,}), by `outside` and by the "
        'distance of the student. In "bucket and the student\'s k" the k tokens are added that the '
        "student finds most probable, which an online teacher can be asked for.",
    ]
    for name in ("forward_kl", "adaptive_kl"):
        kinds = [kind for kind in KINDS if kind in data["errors"][0]["gradient_errors"][name]]
        parts += [
            f"`{name}`:",
            table(
                ("forward KL, nats", "k", *kinds),
                [
                    (
                        f"{case['forward_kl']:.2f}",
                        str(case["k"]),
                        *(f"{case['gradient_errors'][name][kind]:.3f}" for kind in kinds),
                    )
                    for distance in distances
                    for case in data["errors"]
                    if case["forward_kl"] == distance
                ],
                texts=0,
            ),
        ]
    parts += [
        f"A step of adaptive KL asks for {data['traffic']['asked']:.2f} bytes a position at k = 64 "
        f"(bf16, V = {VOCABULARY:,}, resampled from real logits), and its launches touch the "
        f"sectors of {data['traffic']['compulsory']:.2f}: two readings and a writing of the "
        "student's logits, and the pairs.",
        f"SASS instructions a position in the loops over full blocks, bf16, V = {VOCABULARY:,}; "
        "the most bytes of stack of the four kernels of a step:",
        table(
            ("GPU", "k", "statistics", "gradient", "total", "registers", "stack"),
            [
                (
                    case["target"],
                    str(case["k"]),
                    *(f"{case['instructions'][name]:.1f}" for name in KERNELS),
                    f"{sum(case['instructions'].values()):.1f}",
                    " / ".join(str(case["registers"][name]) for name in KERNELS),
                    str(case["stack_bytes"]),
                )
                for case in data["kernels"]
            ],
            texts=1,
        ),
    ]
    return "\n\n".join(parts)


def failures(data: dict[str, Any]) -> list[str]:
    """Costs beyond what was asked for, at k = 64 on NVIDIA's GPUs."""
    asked = data["traffic"]["asked"]
    found = [f"{asked:.2f} bytes a position, more than {MOST_BYTES}"] if asked > MOST_BYTES else []
    for case in data["kernels"]:
        total = sum(case["instructions"].values())
        if case["target"] not in NVIDIA:
            continue
        if total > MOST_INSTRUCTIONS:
            found.append(f"{total:.1f} instructions a position on {case['target']}")
        if case["stack_bytes"]:
            found.append(f"{case['stack_bytes']} bytes of stack on {case['target']}")
    return found
