"""`python -m bench report`: RESULTS.md and its pictures, from what the sections collected."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import goals
from bench.store import RESULTS, load, store
from bench.tables import table

DOCUMENT = Path(__file__).with_name("RESULTS.md")

# Section (its module in bench/): heading. In the order of collecting, as the floor reads the rest.
SECTIONS = {
    "instructions": "Instructions, registers and occupancy, ours beside the peers",
    "floor": "Floors",
}
# What a section's module has: collect() -> dict that JSON can hold, markdown(data) -> str, and, if
# there is something to see, plot(data, path).


def section(name: str) -> ModuleType:
    """The module of a section."""
    return importlib.import_module(f"bench.{name}")


def collect(name: str) -> dict[str, Any]:
    """Run a section; store its figures and its picture."""
    module = section(name)
    stored = store(name, module.collect())
    if hasattr(module, "plot"):
        module.plot(stored["data"], RESULTS / f"{name}.png")
    return stored


def render() -> str:
    """RESULTS.md of the stored figures."""
    stored = {name: load(name) for name in SECTIONS}
    versions = {package: None for of in stored.values() for package in of["versions"]}
    parts = [
        "# Results",
        "Written by `python -m bench report`, which runs every section anew; each section says "
        "which command runs it alone. No figure here is a time, and none needs a GPU: kernels are "
        "compiled for the GPUs named and read (`bench/sass.py`), or their PTX is executed on a CPU "
        "and counted (`bench/ptxcpu`). What was tried, and why it did or did not pay, is in "
        "[NOTES.md](NOTES.md).",
        table(
            ("section", "command", "date", *versions),
            [
                (
                    *(f"[{name}](#{name})", f"`python -m bench {name}`", of["date"]),
                    *(of["versions"].get(package, "") for package in versions),
                )
                for name, of in stored.items()
            ],
            texts=2,
        ),
    ]
    for name, of in stored.items():
        module = section(name)
        parts += [
            f'<a id="{name}"></a>\n\n## {SECTIONS[name]}',
            f"Command: `python -m bench {name}`",
        ]
        if hasattr(module, "plot"):
            parts.append(f"![{SECTIONS[name]}](results/{name}.png)")
        parts.append(module.markdown(of["data"]))
    parts += ["## Goals", goals.markdown({name: of["data"] for name, of in stored.items()})]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write() -> None:
    """Write RESULTS.md."""
    DOCUMENT.write_text(render(), encoding="utf-8")
