"""Checks that the tests named in the table of instructions of bench/lab/README.md cover them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.lab.ptxcpu import execute

README = Path(__file__).resolve().parents[4] / "bench" / "lab" / "README.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| `(test_\w+\.py::\S+)` \|$", re.MULTILINE)


class Table(dict[str, tuple[str, str]]):
    """The table: each instruction with (its modifiers, the test that covers it)."""

    def covered_by(self, test: str) -> set[str]:
        return {name for name, (_, of_name) in self.items() if of_name == test}


@pytest.fixture(scope="session")
def table() -> Table:
    """The table of bench/lab/README.md."""
    rows = ROW.findall(README.read_text("utf-8"))
    return Table({name: (modifiers, test) for name, modifiers, test in rows})


@pytest.fixture(autouse=True)
def executed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, table: Table
) -> Iterator[set[str]]:
    """The names of the instructions that a test executes: at least those that it is said to
    cover."""
    names: set[str] = set()
    run = execute.Executable.run

    def recording(self: execute.Executable, *arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            counts = run(self, *arguments, **options)
        except Exception:
            names.update(i.name for i in self.kernel.instructions)
            raise
        names.update(op.split(".")[0] for op, count in counts["warp_by_opcode"].items() if count)
        return counts

    monkeypatch.setattr(execute.Executable, "run", recording)
    yield names
    missing = table.covered_by(f"{request.path.name}::{request.node.name}") - names
    assert not missing, f"bench/lab/README.md says that this test covers {sorted(missing)}"
