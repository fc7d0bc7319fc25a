"""`python -m bench family`: what the kernels of each divergence of the family execute.

Next to the stored figures of the peers that `python -m bench instructions` found.
"""

from __future__ import annotations

from typing import Any

from bench.inputs.losses import FAMILY_LOSSES, LOSSES
from bench.inputs.stages import DIVERGENCE, GRADIENT, IN_ONE, SEARCHES, SEPARATE, STATISTICS
from bench.questions.instructions import GPUS, KernelCost, kernel_costs
from bench.report.tables import table
from bench.store import load

TARGET = "sm_90"
VOCABULARY = 151936
# Instructions a position, sm_90, bf16: what each member was to stay within.
GOALS = {
    "jensen_shannon": 40.0,
    "skew_kl": 47.0,
    "skew_reverse_kl": 47.0,
    "skew_reverse_kl_detached": 39.0,
    "total_variation": 37.0,
    "alpha": 37.0,
    "alpha_beta": 44.0,
    "todi": 47.0,
    "decoupled_kl": 39.0,
}


def collect() -> dict[str, Any]:
    """All figures, about ten minutes the first time."""
    names = (*LOSSES, *FAMILY_LOSSES)
    return {
        "vocabulary": VOCABULARY,
        "members": {name: _figures(kernel_costs(name, TARGET, VOCABULARY)) for name in names},
        "labels": {
            name: _totals(kernel_costs(name, TARGET, VOCABULARY, options="labels"))
            for name in names
        },
        "targets": {
            name: {
                target: _totals(kernel_costs(name, target, VOCABULARY))
                for target in GPUS
                if target != TARGET
            }
            for name in names
        },
    }


def _totals(costs: dict[str, KernelCost]) -> dict[str, Any]:
    """Instructions a position of one launch, and the most stack of all."""
    (one,) = (costs[name] for name in IN_ONE)
    return {
        "instructions": one.per_position,
        "stack_bytes": max(costs[name].stack_bytes for name in (*SEPARATE, *IN_ONE)),
    }


def _figures(costs: dict[str, KernelCost]) -> dict[str, Any]:
    """Instructions and exps a position by stage, of one launch; registers and stack of all."""
    (one,) = (costs[name] for name in IN_ONE)
    stages = [stage for stage in one.stages if stage.stage not in SEARCHES]
    return {
        "instructions": {s.stage: s.instructions / s.positions for s in stages},
        "exps": sum(s.exps / s.positions for s in stages),
        "registers": [costs[name].registers for name in (*SEPARATE, *IN_ONE)],
        "stack_bytes": max(costs[name].stack_bytes for name in (*SEPARATE, *IN_ONE)),
    }


def markdown(data: dict[str, Any]) -> str:
    stages = (STATISTICS, DIVERGENCE, GRADIENT)
    of_targets = [target for target in GPUS if target != TARGET]
    rows: list[tuple[Any, ...]] = []
    for name, figures in data["members"].items():
        total = sum(figures["instructions"].values())
        rows.append(
            (
                f"`{name}`",
                f"{total:.1f}",
                *(_number(figures["instructions"].get(stage)) for stage in stages),
                f"{figures['exps']:.0f}",
                f"{data['labels'][name]['instructions']:.1f}",
                f"{GOALS[name]:.0f}" if name in GOALS else "",
                " / ".join(map(str, figures["registers"])),
                str(figures["stack_bytes"]),
            )
        )
    peers = load("instructions")["data"]["peers"]
    theirs = [
        (f"{peer['peer']} {peer['version']}", peer["computes"], f"{_of_peer(peer):.1f}")
        for peer in peers
        if peer["target"] == TARGET and data["vocabulary"] in peer["vocabularies"]
    ]
    return "\n\n".join(
        (
            f"SASS instructions a vocabulary position in the loops over full blocks of the launch "
            f"that also makes the gradient, {TARGET}, bf16, V = {data['vocabulary']:,}, by stage; "
            "exponentials a position (logarithms and reciprocals are not in this count); registers "
            "of forward, backward and the one launch; and the most bytes of stack that one of them "
            "has. Labels: the total with `kd_ratio`, at T = 1. The numbers of a member (beta, "
            "alpha, a, b) and the ratio are run-time values: they compile nothing. "
            "The searches of `adaptive_kl` for its head are not counted here.",
            table(
                (
                    "divergence", "total", *stages, "exps", "labels", "goal", "registers", "stack",
                ),
                rows,
            ),
            "The totals on other GPUs, with the bytes of stack where there are any; gfx942 counts "
            "what waves of 64 lanes execute:",
            table(("divergence", *of_targets), [
                (
                    f"`{name}`",
                    *(_with_stack(data["targets"][name][target]) for target in of_targets),
                )
                for name in data["members"]
            ]),
            "Peers, by the stored figures of `python -m bench instructions`:",
            table(("peer", "computes", "instructions"), theirs, texts=2),
        )
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _with_stack(totals: dict[str, Any]) -> str:
    stack = totals["stack_bytes"]
    return f"{totals['instructions']:.1f}" + (f", {stack} bytes" if stack else "")


def _of_peer(peer: dict[str, Any]) -> float:
    return float(sum(kernel["per_position"] for kernel in peer["kernels"].values()))
