"""The table of instructions in bench/lab/README.md is complete, and its tests exist. conftest.py
checks, as each of these tests runs, that it executes the instructions that it is said to cover.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.lab.ptxcpu.translate import known_instructions

HERE = Path(__file__).resolve().parent


def cell(modifiers: frozenset[str] | None) -> str:
    if modifiers is None:
        return "-"
    return " ".join(sorted(modifiers, key=str.lower)) or "none"


def test_the_table_has_every_instruction_and_its_modifiers(
    table: dict[str, tuple[str, str]],
) -> None:
    listed = {name: modifiers for name, (modifiers, _) in table.items()}
    assert listed == {name: cell(modifiers) for name, modifiers in known_instructions().items()}


def test_the_tests_of_the_table_are_there(table: dict[str, tuple[str, str]]) -> None:
    options = ["-p", "no:cacheprovider", "--collect-only", "-q", str(HERE)]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        capture_output=True,
        text=True,
        cwd=HERE.parents[3],
    )
    tests = {line.rpartition("/")[2] for line in result.stdout.splitlines() if "::" in line}
    assert {test for _, test in table.values()} <= tests
