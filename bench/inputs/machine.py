"""The machine that a figure was measured on."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu() -> str:
    """The name that the CPU reports."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()
