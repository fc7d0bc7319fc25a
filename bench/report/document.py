"""`python -m bench report`: RESULTS.md, and the table in README.md."""

from __future__ import annotations

import re
from pathlib import Path

from bench.inputs.peers import PEERS
from bench.inputs.shapes import MAIN_VOCABULARY
from bench.inputs.stages import SEPARATE
from bench.questions import question
from bench.questions.floor import work
from bench.questions.instructions import MAIN_TARGET
from bench.report import goals
from bench.report.tables import table
from bench.store import load

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "bench" / "RESULTS.md"
README = ROOT / "README.md"
SUMMARY = re.compile(r"(?<=<!-- python -m bench report -->\n).*?(?=<!-- end -->)", re.DOTALL)

# Question: heading of its section. In the order of asking, as the floor reads the others.
SECTIONS = {
    "instructions": "Instructions, registers and occupancy, ours beside the peers",
    "traffic": "Bytes, executed instructions and scans on real logits",
    "operators": "Bytes beside the peers, operator by operator",
    "growth": "Growth with N and V",
    "linear": "Fused linear: peak memory and time",
    "floor": "Floors",
}


def render() -> str:
    """RESULTS.md of the stored figures."""
    stored = {name: load(name) for name in SECTIONS}
    versions = {package: None for of in stored.values() for package in of["versions"]}
    parts = [
        "# Results",
        "Written by `python -m bench report` of what `python -m bench all --save` stored; each "
        "section says which command runs it alone. None needs a GPU: kernels are compiled for the "
        "GPUs named and read (`bench/lab/sass.py`), or their PTX is executed on a CPU and counted "
        "(`bench/lab/ptxcpu`). No figure is a time, but for those of the fused linear losses on a "
        "CPU. What was tried, and why it did or did not pay, is in [NOTES.md]"
        "(NOTES.md).",
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
        module = question(name)
        parts += [
            f'<a id="{name}"></a>\n\n## {SECTIONS[name]}',
            f"Command: `python -m bench {name}`",
        ]
        if hasattr(module, "plot"):
            parts.append(f"![{SECTIONS[name]}](results/{name}.png)")
        parts.append(module.markdown(of["data"]))
    parts += ["## Goals", goals.markdown({name: of["data"] for name, of in stored.items()})]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def summary() -> str:
    """The table in README.md: what a forward and backward costs, beside the peers."""
    instructions, operators, floors = (
        load(name)["data"] for name in ("instructions", "operators", "floor")
    )
    kernels = {
        case.get("peer") or case["loss"]: [
            kernel for name, kernel in case["kernels"].items() if "peer" in case or name in SEPARATE
        ]
        for case in (*instructions["ours"], *instructions["peers"])
        if case["target"] == MAIN_TARGET
        and case.get("dtype", "bf16") == "bf16"
        and MAIN_VOCABULARY in case["vocabularies"]
    }
    measured = {peer.name for peer in PEERS}
    rows = []
    for subject in sorted(operators["subjects"], key=lambda s: (s["computes"], s["bytes"])):
        name, computes = subject["name"], subject["computes"]
        if name not in measured or computes not in ("adaptive_kl", "forward_kl"):
            continue
        is_ours = name == computes
        executed = work(kernels.get(name, ()), floors["scans"]["1"]).instructions
        only_kernels = subject["bytes_in_kernels"] > 0.99 * subject["bytes"]
        rows.append(
            (
                f"**akl_triton {name}**" if is_ours else name,
                computes,
                f"{subject['bytes']:.1f}",
                f"{executed:.1f}" if only_kernels else "",
                f"{subject['temporaries']:.1f}",
            )
        )
    return table(
        ("loss", "computes", "bytes moved", "instructions", "bytes of temporaries"), rows, texts=2
    )


def write() -> None:
    """Write RESULTS.md, and the table into README.md."""
    DOCUMENT.write_text(render(), encoding="utf-8")
    readme = README.read_text("utf-8")
    README.write_text(SUMMARY.sub(lambda _: f"\n{summary()}\n\n", readme), encoding="utf-8")
