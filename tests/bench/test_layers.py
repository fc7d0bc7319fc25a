"""The layers of bench/, and what each may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "bench").rglob("*.py"))


def imported(path: Path, source: str | None = None) -> Iterator[str]:
    """Every module that a file imports, wherever in it, by its full name."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(source or path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("'\"f")


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if "lab" in path.parts],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_instruments_know_nothing_of_what_they_measure(path: Path) -> None:
    for module in imported(path):
        assert not is_in(module, "akl_triton", "kernels"), module
        assert not is_in(module, "bench") or is_in(module, "bench.lab"), module


def test_there_are_instruments() -> None:
    names = {path.name for path in FILES if "lab" in path.parts}
    assert {"sass.py", "compile.py", "clock.py", "translate.py"} <= names


@pytest.mark.parametrize(
    "source",
    [
        "import akl_triton",
        "def f():\n    from akl_triton.kernels import launch",
        "from kernels import head",
        "import kernels.head as h",
        "from ..inputs import peers",
        "from ...questions.gpu import plan",
        "import importlib; importlib.import_module('akl_triton.ops')",
    ],
)
def test_an_import_is_found_wherever_it_stands(source: str) -> None:
    found = list(imported(ROOT / "bench" / "lab" / "ptxcpu" / "some.py", source))
    forbidden = ("akl_triton", "kernels", "bench.lab.inputs", "bench.questions")
    assert any(is_in(module, *forbidden) for module in found), found


def test_inputs_ask_no_questions_and_questions_write_no_report() -> None:
    for path in FILES:
        folder = path.relative_to(ROOT / "bench").parts[0]
        for module in imported(path):
            if folder == "inputs":
                assert not is_in(module, "bench.questions", "bench.report"), (path, module)
            if folder == "questions":
                assert not is_in(module, "bench.report") or is_in(module, "bench.report.tables"), (
                    path,
                    module,
                )
