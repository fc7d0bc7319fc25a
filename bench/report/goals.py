"""The goals of the kernels, each with the figure that says whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.inputs.stages import CUT, IN_ONE, SEARCHES, SEPARATE
from bench.report.tables import table

# The stored data of each section, by its name.
Stored = Mapping[str, Mapping[str, Any]]

BYTES = {1.0: 15.0, 2.0: 18.0, 4.0: 24.0}
SCANS = {1.0: 0.6, 2.0: 1.6, 4.0: 4.0}
FLAT_WITHIN = 0.05


@dataclass(frozen=True, slots=True)
class Goal:
    text: str
    section: str  # whose command gives the figure
    figure: Callable[[Mapping[str, Any]], float]
    limit: float
    at_least: bool = False
    digits: int = 0

    def is_met(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else round(figure, 9) <= self.limit


def goals() -> list[Goal]:
    """All goals, in the order of the stages."""
    return [
        Goal(
            "instructions a position, adaptive_kl, sm_90, bf16, every V",
            *("instructions", lambda data: _dearest(data, "adaptive_kl", "instructions"), 40.0),
            digits=1,
        ),
        Goal(
            "the same of forward_kl",
            *("instructions", lambda data: _dearest(data, "forward_kl", "instructions"), 26.0),
            digits=1,
        ),
        Goal(
            "exps a position, adaptive_kl, sm_90",
            *("instructions", lambda data: _dearest(data, "adaptive_kl", "exps"), 6.0),
        ),
        Goal(
            "local-memory instructions, worst kernel of adaptive_kl, sm_90, bf16",
            *("instructions", lambda data: _worst(data, "local"), 0.0),
        ),
        Goal(
            "bytes of stack, worst kernel of adaptive_kl, sm_90, bf16",
            *("instructions", lambda data: _worst(data, "stack_bytes"), 0.0),
        ),
        Goal(
            "least width of a load or store in full blocks, bytes",
            *("instructions", _least_width, 16.0),
            at_least=True,
        ),
        Goal(
            "barriers and shuffles in the same loops",
            *("instructions", _barriers, 0.0),
        ),
        Goal(
            "blocks of 8 warps an SM holds, worst kernel of adaptive_kl, V a multiple of 16",
            *("instructions", lambda data: _blocks(data, 151_936), 2.0),
            at_least=True,
        ),
        Goal(
            "the same for any other V",
            *("instructions", lambda data: _blocks(data, 50_257), 2.0),
            at_least=True,
        ),
        *(
            Goal(
                f"bytes a position, forward + backward, real logits, T = {temperature:g}",
                *("traffic", _bytes_at(temperature), limit),
                digits=1,
            )
            for temperature, limit in BYTES.items()
        ),
        *(
            Goal(
                f"scans for the boundary, mean, real logits, T = {temperature:g}",
                *("traffic", _scans_at(temperature), limit),
                digits=2,
            )
            for temperature, limit in SCANS.items()
        ),
        Goal(
            "instructions of V = 50,257 over those of V = 50,256",
            *("instructions", lambda data: max(r["ratio"] for r in data["misaligned"]), 1.35),
            digits=3,
        ),
        Goal(
            "compilations for all N, mu, T and V of an alignment class, any kernel",
            *("instructions", _compilations, 1.0),
        ),
        Goal(
            "change of bytes and instructions a position over N, N >= 16",
            *("growth", _growth_over_rows, FLAT_WITHIN),
            digits=3,
        ),
        *(
            Goal(
                f"change of {what} a position over V, two sweeps, V >= 32,768",
                *("growth", _growth_over_vocabularies(what), FLAT_WITHIN),
                digits=3,
            )
            for what in ("bytes", "instructions")
        ),
        Goal(
            "change of the floats kept a row for the backward over N and V",
            *("growth", _kept, 0.0),
        ),
        Goal(
            "peak of the loss part of a step of training, over that of TRL's fused divergence",
            *("trainer_step", _over_chunked(lambda m: float(m["loss_peak_bytes"])), 0.25),
            digits=2,
        ),
        Goal(
            "distance from float64 of the gradient of a step of training, over the same",
            *("trainer_step", _over_chunked(lambda m: float(m["gradient_error"])), 2.0),
            digits=2,
        ),
    ]


def markdown(stored: Stored) -> str:
    """The table of all goals whose section is stored."""
    rows = []
    for goal in goals():
        if goal.section not in stored:
            continue
        figure = goal.figure(stored[goal.section])
        rows.append(
            (
                goal.text,
                ("met" if goal.is_met(figure) else "**not met**"),
                f"`python -m bench {goal.section}`",
                f"{'>=' if goal.at_least else '<='} {goal.limit:g}",
                f"{figure:.{goal.digits}f}",
            )
        )
    return table(("goal", "", "command", "limit", "figure"), rows, texts=3)


# ---------------------------------------------------------------- instructions


def _main(data: Mapping[str, Any], loss: str) -> list[Mapping[str, Any]]:
    """The kernels of a loss on sm_90 in bf16, a set for each alignment class."""
    return [
        case
        for case in data["ours"]
        if (case["loss"], case["target"], case["dtype"]) == (loss, "sm_90", "bf16")
    ]


def _dearest(data: Mapping[str, Any], loss: str, what: str) -> float:
    return max(
        sum(
            float(stage[what] / stage["positions"])
            for name in names
            for stage in case["kernels"][name]["stages"]
            if stage["stage"] not in SEARCHES
        )
        for case in _main(data, loss)
        for names in (IN_ONE, SEPARATE)
    )


def _worst(data: Mapping[str, Any], what: str) -> float:
    return max(
        float(kernel[what])
        for case in _main(data, "adaptive_kl")
        for kernel in case["kernels"].values()
    )


def _blocks(data: Mapping[str, Any], vocabulary: int) -> float:
    return min(
        float(kernel["resident_blocks"])
        for case in _main(data, "adaptive_kl")
        if vocabulary in case["vocabularies"]
        for kernel in case["kernels"].values()
    )


def _stages(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        stage
        for case in _main(data, "adaptive_kl")
        for kernel in case["kernels"].values()
        for stage in kernel["stages"]
        if stage["stage"] != CUT
    ]


def _least_width(data: Mapping[str, Any]) -> float:
    return min(float(w) for s in _stages(data) for w in (*s["loads"], *s["stores"]))


def _barriers(data: Mapping[str, Any]) -> float:
    return float(sum(stage["barriers"] + stage["shuffles"] for stage in _stages(data)))


def _compilations(data: Mapping[str, Any]) -> float:
    return max(float(n) for of in data["compilations"] for n in of["compiled"].values())


# ---------------------------------------------------------------- traffic and growth


def _real(data: Mapping[str, Any], temperature: float) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(
        case
        for case in data["cases"]
        if not case["synthetic"]
        and (case["dtype"], case["temperature"]) == ("bfloat16", temperature)
    )
    return found


def _bytes_at(temperature: float) -> Callable[[Mapping[str, Any]], float]:
    def figure(data: Mapping[str, Any]) -> float:
        case = _real(data, temperature)
        return max(
            float(case[phase]["bytes_read"] + case[phase]["bytes_written"])
            for phase in ("both", "with_gradient")
        )

    return figure


def _scans_at(temperature: float) -> Callable[[Mapping[str, Any]], float]:
    return lambda data: float(_real(data, temperature)["scans"]["mean"])


def _spread(figures: list[float]) -> float:
    """The relative excess of the largest over the smallest."""
    return max(figures) / min(figures) - 1.0


def _growth_over_rows(data: Mapping[str, Any]) -> float:
    found = [f for f in data["over_rows"] if f["rows"] >= 16]
    return max(
        _spread([f[what] for f in found if f["vocabulary"] == vocabulary])
        for vocabulary in {f["vocabulary"] for f in found}
        for what in ("bytes", "instructions")
    )


def _growth_over_vocabularies(what: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda data: _spread(
        [f["fixed"][what] for f in data["over_vocabularies"] if f["vocabulary"] >= 32_768]
    )


def _kept(data: Mapping[str, Any]) -> float:
    return _spread([float(f["kernels"]) for f in data["saved_state"]])


# ---------------------------------------------------------------- trainer_step


def _over_chunked(
    figure: Callable[[Mapping[str, Any]], float],
) -> Callable[[Mapping[str, Any]], float]:
    """The largest ratio of ours by default, for all divergences."""

    def ratio(data: Mapping[str, Any]) -> float:
        rows = [case["methods"] for case in data["cases"]]
        return max(figure(ours) / figure(chunked) for _, chunked, ours, _ in rows)

    return ratio
