"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are words, and the rest numbers."""
    lines = [head, [":--"] * texts + ["--:"] * (len(head) - texts), *rows]
    wrong = [line for line in lines if len(line) != len(head)]
    if wrong:
        raise ValueError(f"a row has {len(wrong[0])} cells under {len(head)} headings: {wrong[0]}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, digits: int = 1) -> str:
    """The number with its digits after the point, or without if it is a whole number."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.{digits}f}"
