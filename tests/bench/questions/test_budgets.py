"""The compiled kernels stay within bench/report/budgets.toml, and the check of them can fail."""

from __future__ import annotations

import dataclasses
import os

import pytest
import triton

from akl_triton.kernels.launch_table import LARGEST_OF_TWO
from bench.questions import instructions
from bench.questions.budgets import AT_LEAST, Case, budgets, exceeded, figures

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
TRITON, BUDGETS = budgets()


@pytest.mark.parametrize("case", BUDGETS, ids=str)
def test_kernels_are_within_their_budget(case: Case) -> None:
    if triton.__version__ != TRITON:
        pytest.skip(f"the budgets are those of Triton {TRITON}")
    over = exceeded(case, figures(case), BUDGETS[case])
    assert not over, "\n".join(over)


@pytest.mark.parametrize("name", next(iter(BUDGETS.values())))
def test_one_less_is_refused_with_both_figures(name: str) -> None:
    case = next(iter(BUDGETS))
    found = figures(case)
    exact = {name: round(figure, 1) for name, figure in found.items()}
    assert not exceeded(case, found, exact)
    tighter = exact | {name: exact[name] + (1 if name in AT_LEAST else -1)}
    (line,) = exceeded(case, found, tighter)
    assert line.startswith(f"{case}: {name} is ")
    assert f" {exact[name]:g}, " in line
    assert f" {tighter[name]:g} " in line


def test_a_budget_names_every_figure() -> None:
    case, budget = next(iter(BUDGETS.items()))
    with pytest.raises(ValueError, match="budgets are"):
        exceeded(case, figures(case), {"instructions": budget["instructions"]})


def test_tails_of_rows_are_no_part_of_the_loops() -> None:
    """The cost of a position does not depend on V: where rows are shorter, but have the same
    launch, more of a row is in the edges."""
    case = next(iter(BUDGETS))
    shorter = LARGEST_OF_TWO + 16
    assert shorter < case.vocabulary
    assert figures(case._replace(vocabulary=shorter)) == figures(case)


def test_a_stage_without_a_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel must not become cheap because its code is not found."""
    analysed = instructions._analysed

    def without_gradient(*arguments):
        code = analysed(*arguments)
        of_gradient = code.loops_by_function(["row_gradient"])["row_gradient"]
        return dataclasses.replace(
            code, loops=tuple(loop for loop in code.loops if loop not in of_gradient)
        )

    monkeypatch.setattr(instructions, "_analysed", without_gradient)
    with pytest.raises(ValueError, match="no loop of row_gradient"):
        figures(next(iter(BUDGETS)))
