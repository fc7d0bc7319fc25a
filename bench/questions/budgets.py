"""`python -m bench budgets`: the cost of the compiled kernels, and what budgets.toml allows."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.inputs.stages import CUT, IN_ONE, SEARCHES, SEPARATE
from bench.questions.instructions import StageCost, kernel_costs
from bench.report.tables import table

BUDGETS = Path(__file__).resolve().parents[1] / "report" / "budgets.toml"
# A kernel must reach the budget of these figures, and stay within that of all others.
AT_LEAST = ("load_bytes", "resident_blocks")


class Case(NamedTuple):
    """The heading of a budget."""

    loss: str
    options: str  # a key of OPTIONS
    target: str
    vocabulary: int

    def __str__(self) -> str:
        options = f" with {self.options}" if self.options else ""
        return f"{self.loss}{options}, {self.target}, V = {self.vocabulary}"


def budgets() -> tuple[str, dict[Case, dict[str, float]]]:
    """(version of Triton, all budgets in the order of the file)"""
    tables = tomllib.loads(BUDGETS.read_text("utf-8"))
    triton = tables.pop("triton")
    return triton, {_case(name): budget for name, budget in tables.items()}


def _case(name: str) -> Case:
    found = re.fullmatch(r"(\w+)(?: with ([\w ]+))?, (\w+), V = (\d+)", name)
    if found is None:
        expected = "'loss, target, V = n' or 'loss with options, target, V = n'"
        raise ValueError(f"{BUDGETS.name}: expected {expected}, got {name!r}")
    loss, options, target, vocabulary = found.groups()
    return Case(loss, options or "", target, int(vocabulary))


def figures(case: Case) -> dict[str, float]:
    """The cost of the kernels of a case, under the names of budgets.toml."""
    costs = kernel_costs(case.loss, case.target, case.vocabulary, options=case.options)
    # The search for the cut has to add up what it passes.
    loops = [stage for cost in costs.values() for stage in cost.stages if stage.stage != CUT]
    ways = [[costs[name] for name in names] for names in (IN_ONE, SEPARATE)]

    def dearer(count: Callable[[StageCost], int]) -> float:
        return max(
            sum(
                count(s) / s.positions
                for cost in way
                for s in cost.stages
                if s.stage not in SEARCHES
            )
            for way in ways
        )

    return {
        "instructions": dearer(lambda stage: stage.instructions),
        "exps": dearer(lambda stage: stage.exps),
        "load_bytes": min(int(width) for s in loops for width in (*s.loads, *s.stores)),
        "local": max(cost.local for cost in costs.values()),
        "stack": max(cost.stack_bytes for cost in costs.values()),
        "barriers": sum(s.barriers + s.shuffles for s in loops),
        "resident_blocks": min(cost.resident_blocks for cost in costs.values()),
    }


def exceeded(case: Case, found: Mapping[str, float], budget: Mapping[str, float]) -> list[str]:
    """A line for every figure that is not within its budget, with both figures."""
    if found.keys() != budget.keys():
        raise ValueError(f"{case}: budgets are {', '.join(found)}, got {', '.join(budget)}")
    lines = []
    for name, limit in budget.items():
        # The file has one digit after the point.
        figure = round(found[name], 1)
        if figure < limit if name in AT_LEAST else figure > limit:
            bound = "at least " if name in AT_LEAST else ""
            lines.append(
                f"{case}: {name} is {figure:g}, the budget is {bound}{limit:g} ({BUDGETS.name})"
            )
    return lines


def collect() -> dict[str, Any]:
    """The figures of every case."""
    return {str(case): figures(case) for case in budgets()[1]}


def markdown(data: dict[str, Any]) -> str:
    """A line for every figure."""
    return table(
        ("case", "figure", "is", "budget"),
        [
            (str(case), name, f"{data[str(case)][name]:.1f}", f"{limit:g}")
            for case, budget in budgets()[1].items()
            for name, limit in budget.items()
        ],
        texts=2,
    )


def failures(data: dict[str, Any]) -> list[str]:
    """A line for every figure that is not within its budget."""
    return [
        line
        for case, budget in budgets()[1].items()
        for line in exceeded(case, data[str(case)], budget)
    ]
