"""`python -m bench demo`: the students that `akl-triton demo` trains with each loss, and the memory
it holds.

The command is run as anybody would run it: the curves are those of its CSV file, and the peak of
the memory is the one that it prints.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from akl_triton import cli
from akl_triton.cli import demo
from bench.inputs.machine import cpu
from bench.questions import Unanswerable
from bench.report.tables import table

SETTING = re.compile(
    r"(?P<teacher_layers>\d+) layers teach (?P<student_layers>\d+): "
    r"(?P<steps>\d+) steps of (?P<tokens>\d+) tokens, (?P<held_out_tokens>\d+) held out, "
    r"(?P<dtype>\w+) on (?P<device>\w+)"
)
PEAKS = re.compile(r"([\d,]+) MiB from hidden states, ([\d,]+) MiB through all logits")
MEASURES = {
    "forward_kl": "KL(teacher ‖ student), nats",
    "reverse_kl": "KL(student ‖ teacher), nats",
    "head_share": "share of the gap in the head",
}
LOSSES = {"AKL": "AKL", "FKL": "forward KL", "RKL": "reverse KL"}


def collect(steps: int = 40) -> dict[str, Any]:
    """The demo on this CPU, with its defaults but for the steps."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["demo", "--device", "cpu", "--steps", str(steps), "--output", folder]
        with contextlib.redirect_stdout(printed):
            if cli.main(arguments) != 0:
                raise Unanswerable("akl-triton demo does not run here")
        with Path(folder, "akl_demo.csv").open(newline="") as file:
            points = [
                {name: _number(value) for name, value in row.items()}
                for row in csv.DictReader(file)
            ]
    text = " ".join(printed.getvalue().split())
    setting, peaks = SETTING.search(text), PEAKS.search(text)
    if setting is None or peaks is None:
        raise ValueError(f"akl-triton demo does not print what it did: {text}")
    from_hidden_states, of_logits = (int(peak.replace(",", "")) for peak in peaks.groups())
    return {
        "cpu": cpu(),
        **{name: _number(value) for name, value in setting.groupdict().items()},
        "peak_mib": {"hidden states": from_hidden_states, "all logits": of_logits},
        "points": points,
    }


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def first_and_last(data: dict[str, Any], measure: str) -> tuple[float, dict[str, float]]:
    """A measure at the start, which all students share, and at the end for each student."""
    last = {point["trained_with"]: point[measure] for point in data["points"]}
    return data["points"][0][measure], last


def measures(data: dict[str, Any]) -> str:
    """The table of all measures, first and last."""
    rows = []
    for measure, text in MEASURES.items():
        start, last = first_and_last(data, measure)
        digits = 3 if measure == "head_share" else 2
        rows.append((text, *(f"{x:.{digits}f}" for x in (start, *(last[name] for name in LOSSES)))))
    return table(("held-out text", "start", *LOSSES.values()), rows)


def markdown(data: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"SmolLM2-135M with {data['student_layers']} of its {data['teacher_layers']} layers, "
            f"taught by the whole for {data['steps']} steps of {data['tokens']} tokens with each "
            f"loss; {data['dtype']} on {data['device']} ({data['cpu']}), "
            f"{data['held_out_tokens']:,} tokens held out.",
            measures(data),
            "Peak memory of the AKL loss and its gradient: "
            f"{data['peak_mib']['hidden states']} MiB from hidden states, "
            f"{data['peak_mib']['all logits']} MiB through all logits.",
        ]
    )


def plot(data: dict[str, Any], path: os.PathLike[str]) -> None:
    """The picture that the demo draws."""
    demo.plot([demo.Point(**point) for point in data["points"]], Path(path))
