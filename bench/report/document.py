"""RESULTS.md: a section for each question whose answer is stored."""

from __future__ import annotations

from pathlib import Path

from bench.questions import question
from bench.report import goals
from bench.report.tables import table
from bench.store import load

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "bench" / "RESULTS.md"

# The heading of the section of each question, in the order of asking: the floor reads the others.
SECTIONS = {
    "instructions": "Instructions, registers and occupancy, ours and the peers'",
    "family": "The family: instructions, registers and stack of each divergence",
    "traffic": "Bytes, executed instructions and scans on real logits",
    "operators": "Bytes, ours and the peers', operator by operator",
    "growth": "Growth with N and V",
    "convergence": "Errors near convergence",
    "linear": "Fused linear: peak memory and time",
    "trainer_step": "A step of a Trainer: TRL's losses and ours",
    "sharded_heads": "Adaptive KL over shards of the vocabulary: heads, and exchanges",
    "vocabulary_parallel": "Logits sharded over the vocabulary: gradients, and what is sent",
    "sparse": "Teachers of k pairs: errors of gradients, and costs",
    "offline": "Teachers on disk: bytes a token",
    "floor": "Floors",
    "on_real_logits": "The PyTorch backend and the authors' code on real logits",
    "demo": "A demo: one student for each loss",
}


def render() -> str:
    """The text of RESULTS.md for the stored figures."""
    stored = {name: load(name) for name in SECTIONS}
    versions = {package: None for of in stored.values() for package in of["versions"]}
    parts = [
        "# Results",
        "This page is written by `python -m bench report` from the answers that `python -m bench "
        "all --save` stored; each section names the command that runs it alone. None needs a GPU: "
        "kernels are compiled for the GPUs named, and their machine code is read "
        "(`bench/lab/sass.py`), or their PTX is executed on a CPU and counted "
        "(`bench/lab/ptxcpu`). No figure is a time of a GPU; those of the fused linear losses and "
        "of the PyTorch backend are times of a CPU. [NOTES.md](NOTES.md) lists the changes that "
        "were tried, and why they did or did not pay.",
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


def write() -> None:
    """Write RESULTS.md."""
    DOCUMENT.write_text(render(), encoding="utf-8")
