"""The figures of a section, kept in bench/results/<section>.json with date and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "speculators", "trl")


def store(section: str, data: dict[str, Any], folder: Path = RESULTS) -> dict[str, Any]:
    """Write the data that a section collected, and return it as `load` will."""
    folder.mkdir(exist_ok=True)
    stored = {
        "date": datetime.date.today().isoformat(),
        "versions": {"Python": platform.python_version(), **_installed()},
        "data": data,
    }
    text = json.dumps(stored, indent=1) + "\n"
    (folder / f"{section}.json").write_text(text, encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def load(section: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The data that `store` wrote, with its date and versions."""
    path = folder / f"{section}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `python -m bench {section}` first")
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return loaded


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
