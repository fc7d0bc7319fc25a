"""Tables in Markdown."""

from __future__ import annotations

import pytest

from bench.report.tables import table


def test_a_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        table(("a", "b"), [("1",)])
