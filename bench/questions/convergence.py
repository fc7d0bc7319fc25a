"""`python -m bench convergence`: the errors of every divergence as the student nears the teacher.

A divergence is then a small difference of large sums. Loss and gradient of both backends (the
kernels as PTX for sm_90, executed by bench/lab/ptxcpu) are compared with the float64 oracle, and so
are the same formulas in PyTorch's fp32, which are the oracle's own code.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from akl_triton import distillation_loss
from akl_triton.divergences import FAMILY, AdaptiveKL, Divergence
from akl_triton.verify import Exact, exact
from bench.lab import ptxcpu
from bench.report.tables import table

ARCH = 90
ROWS, VOCABULARY = 8, 4096
DISTANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
KERNELS, BACKEND, FORMULA = "kernels", "PyTorch backend", "fp32 formula"
COLOURS = {KERNELS: "#0072B2", BACKEND: "#56B4E9", FORMULA: "#999999"}


def collect() -> dict[str, Any]:
    """All figures, about two minutes the first time."""
    g = torch.Generator().manual_seed(0)
    teacher, direction = torch.randn(2, ROWS, VOCABULARY, generator=g)
    teacher *= 2.0
    points: list[dict[str, Any]] = []
    with ptxcpu.active(arch=ARCH):
        for kind in FAMILY.values():
            for distance in DISTANCES:
                student = teacher + distance * direction
                points += _points(kind(), student, teacher, distance)
    return {"rows": ROWS, "vocabulary": VOCABULARY, "points": points}


def _points(
    divergence: Divergence, student: Tensor, teacher: Tensor, distance: float
) -> list[dict[str, Any]]:
    found = []
    of: Exact | None = None
    labels = teacher.argmax(-1)
    for by, backend in ((KERNELS, "triton"), (BACKEND, "torch")):
        leaf = student.clone().requires_grad_()
        call: Any = distillation_loss
        loss, stats = call(
            leaf,
            teacher,
            labels,
            divergence=divergence,
            reduction="none",
            return_stats=True,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        of_head: dict[str, Any] = {}
        if isinstance(divergence, AdaptiveKL):
            names = {"size": "head_size", "forward_weight": "forward_weight", "gap": "gap"}
            of_head = {name: getattr(stats, of_stats) for name, of_stats in names.items()}
        of = exact(divergence, student, teacher, labels=labels, **of_head)
        found.append(_errors(divergence, distance, by, loss.detach(), gradient, of))
    assert of is not None
    found.append(_errors(divergence, distance, FORMULA, of.fp32.loss, of.fp32.grad, of))
    return found


def _errors(
    divergence: Divergence, distance: float, by: str, loss: Tensor, gradient: Tensor, of: Exact
) -> dict[str, Any]:
    off = (gradient.double() - of.oracle.grad).norm() / of.oracle.grad.norm()
    return {
        "divergence": divergence.name,
        "distance": distance,
        "by": by,
        "lowest_loss": float(loss.min()),
        "loss_error": float((loss.double() - of.oracle.loss).abs().max()),
        "gradient_error": float(off),
    }


def failures(data: dict[str, Any]) -> list[str]:
    """No divergence is negative, whatever its rounding."""
    return [
        f"{point['divergence']} of the {point['by']} at a distance of {point['distance']:g}: "
        f"a loss of {point['lowest_loss']:.1e}"
        for point in data["points"]
        if point["by"] != FORMULA and not point["lowest_loss"] >= 0.0
    ]


def _series(data: dict[str, Any], divergence: str, by: str, figure: str) -> list[float]:
    return [
        point[figure]
        for point in data["points"]
        if (point["divergence"], point["by"]) == (divergence, by)
    ]


def _members(data: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(point["divergence"] for point in data["points"]))


def markdown(data: dict[str, Any]) -> str:
    rows = []
    for name in _members(data):
        lowest = [min(_series(data, name, by, "lowest_loss")) for by in COLOURS]
        errors = [_series(data, name, by, "loss_error")[-1] for by in COLOURS]
        gradients = [_series(data, name, by, "gradient_error")[3] for by in COLOURS]
        rows.append(
            (
                f"`{name}`",
                *(f"{x:.0e}" if x < 0.0 else "0" for x in lowest),
                *(f"{x:.0e}" for x in (*errors, *gradients)),
            )
        )
    columns = [
        f"{figure}: {by}"
        for figure in ("lowest loss", "loss error, 1e-6", "gradient error, 1e-3")
        for by in COLOURS
    ]
    return "\n\n".join(
        [
            f"{data['rows']} rows of V = {data['vocabulary']:,} in fp32; the student's logits "
            "are the teacher's plus a distance, from 1 to 1e-6, times unit noise. The lowest loss "
            "of any row and distance, which is 0 or above in exact arithmetic; the largest error "
            "of a loss at a distance of 1e-6, in nats; and the relative error of the gradient at "
            "1e-3. The sum is rounded to fp32 before anything is computed, so that the oracle has "
            "the same logits.",
            table(("divergence", *columns), rows),
        ]
    )


def plot(data: dict[str, Any], path: os.PathLike[str]) -> None:
    """The relative error of the gradient against the distance, a panel a divergence."""
    members = _members(data)
    columns = 5
    lines = -(-len(members) // columns)
    figure = Figure(figsize=(11, 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, members, strict=False):
        for by, colour in COLOURS.items():
            errors = _series(data, name, by, "gradient_error")
            style = "--" if by == FORMULA else "-"
            axes.plot(DISTANCES, errors, style, color=colour, label=by, marker=".")
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in panels[max(len(members) - columns, 0) : len(members)]:
        axes.tick_params(labelbottom=True)  # also where the place below is empty
    for axes in panels[len(members) :]:
        axes.set_visible(False)
    panels[0].invert_xaxis()  # of all: they share it
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", frameon=False, fontsize=9)
    figure.supxlabel("distance of the logits", fontsize=9)
    figure.supylabel("relative error of the gradient", fontsize=9)
    figure.savefig(path, dpi=150)
