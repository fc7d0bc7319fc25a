"""A claim about cost in a document comes with the command that measures it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ROOT / "docs" / "options.md"  # whose numbers are defaults
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("bench/README.md", "bench/NOTES.md", "bench/RESULTS.md"),
    *sorted(
        str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md") if page != OPTIONS
    ),
)
# A number with a unit of cost or of quality.
FIGURE = re.compile(
    r"\d\s*(?:bytes|[KMGT]i?B|ms|ns|s|seconds|minutes|instructions|registers|scans|sectors"
    r"|times|nats|%)(?![\w/])"
)
COMMAND = re.compile(r"`[^`\n]*\b(?:python3? -m|pytest|akl-triton|make|bench/gpu\.sh)\b[^`\n]*`")


def sections(text: str) -> Iterator[str]:
    """The text under each second-level heading."""
    yield from re.split(r"^## ", text, flags=re.MULTILINE)


def without_command(text: str) -> list[str]:
    return [s for s in sections(text) if FIGURE.search(s) and not COMMAND.search(s)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_comes_with_a_command(document: str) -> None:
    for bare in without_command((ROOT / document).read_text("utf-8")):
        figures = [bare[max(0, m.start() - 40) : m.end()] for m in FIGURE.finditer(bare)]
        pytest.fail(f"{document}, {bare.splitlines()[0]!r}: no command for {figures}")


@pytest.mark.parametrize("figure", ["3.1 times faster", "14.4 bytes", "38 instructions", "5 %"])
def test_a_figure_without_a_command_is_found(figure: str) -> None:
    assert without_command(f"# Title\n\n## Speed\n\nIt takes {figure}.\n")
    assert not without_command(f"## Speed\n\nIt takes {figure}, says `python -m bench traffic`.\n")
    assert without_command(f"## Speed\n\n{figure}\n\n## Other\n\n`python -m bench traffic`\n")
