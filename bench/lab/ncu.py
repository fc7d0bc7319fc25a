"""What Nsight Compute's command line, `ncu`, counted at the memory of a GPU.

``OPTIONS`` makes it write a CSV table with a line for each launch and counter.  The program
launches a kernel of its own before each call, which tells the calls apart: a range would not, as a
backward pass is launched by another thread.
"""

from __future__ import annotations

import csv
from typing import NamedTuple

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
OPTIONS = (
    *("--csv", "--print-units", "base"),
    *("--metrics", f"{READ},{WRITTEN}"),
    *("--profile-from-start", "off"),  # the program says when
    *("--clock-control", "none"),  # bytes are counted, not time
)
# In what ncu says where a user may not read the counters.
NOT_PERMITTED = "ERR_NVGPUCTRPERM"


class Moved(NamedTuple):
    """Bytes that the memory gave and took."""

    read: float
    written: float


def moved_by_calls(report: str, before_each: str) -> list[Moved]:
    """The bytes of every call, by the report of a program that launches the kernel `before_each`
    before each of them.

    Raises:
        ValueError: the report has another unit than bytes, or launches that belong to no call.
    """
    # What else is in the report are messages of ncu, such as ==PROF==.
    table = csv.DictReader(line for line in report.splitlines() if line.startswith('"'))
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in table:
        if row["Metric Unit"] != "byte":
            raise ValueError(f"expected bytes, got {row['Metric Unit']!r} of {row['Metric Name']}")
        _, counters = launches.setdefault(row["ID"], (row["Kernel Name"], {}))
        counters[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    calls: list[Moved] = []
    for kernel, counters in launches.values():
        if before_each in kernel:
            calls.append(Moved(0.0, 0.0))
        elif not calls:
            raise ValueError(f"{kernel} was launched before the first {before_each}")
        else:
            read, written = calls[-1]
            calls[-1] = Moved(read + counters[READ], written + counters[WRITTEN])
    return calls
