"""The goals of the kernels, and whether they are met."""

from __future__ import annotations

from bench.report import document, goals
from bench.store import load


def test_every_goal_has_a_line_and_a_command() -> None:
    lines = goals.markdown({name: load(name)["data"] for name in document.SECTIONS}).splitlines()
    assert len(lines) == 2 + len(goals.goals())
    for goal, line in zip(goals.goals(), lines[2:], strict=True):
        assert goal.text in line and f"`python -m bench {goal.section}`" in line


def test_a_goal_that_is_missed_says_so() -> None:
    data = load("instructions")["data"]
    for case in data["ours"]:
        for kernel in case["kernels"].values():
            kernel["stack_bytes"] = 8
            kernel["resident_blocks"] = 1
            for stage in kernel["stages"]:
                stage["instructions"] *= 2
                stage["loads"] = {"2": 1}
    text = goals.markdown({"instructions": data})
    for part in ("instructions a position", "bytes of stack", "least width", "blocks of 8 warps"):
        (line,) = (line for line in text.splitlines() if part in line)
        assert "**not met**" in line
