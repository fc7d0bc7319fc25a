"""`python -m bench dram`: the bytes that our losses move to and from a GPU's memory, by Nsight
Compute, and those that were counted.

    bench/gpu.sh                               this, with the tests and the times
    python -m bench dram --output DIR          this alone
    python -m bench dram --output DIR --tiny   its code on a CPU, with an `ncu` that counts nothing

One call of each loss is made under `ncu`, which empties the caches before every kernel. The counted
figures are those of `python -m bench floor`, per vocabulary position: what a loss reads and writes
if the L2 serves all but the first sweep of a row in a kernel, and if it serves none. The bytes of
the memory should be between them. They were counted on real logits, where next to no row needs a
search for its head, so that these logits need none either.

The figures are also in DIR/dram.csv, and what ncu wrote is in DIR/ncu.csv.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.inputs.losses import LOSSES
from bench.inputs.peers import OURS
from bench.lab.ncu import NOT_PERMITTED, OPTIONS, moved_by_calls
from bench.questions import Unanswerable
from bench.questions.gpu import PHASES, SIZES, TINY_SIZES, Case, planned
from bench.report.tables import table
from bench.store import RESULTS, load

ROOT = Path(__file__).resolve().parents[2]
# The phases that are called, and what `floor` calls them.
HOW = {"inplace": "in place", "both": "default"}
SEPARATOR = "spin_kernel"  # that of torch.cuda._sleep
SURE = 40.0  # a logit so far above the others of its row that the head is this token


def cases(tiny: bool) -> tuple[torch.device, list[Case]]:
    """(the device, those of the timed cases whose bytes were counted)"""
    device, timed, _ = planned(tiny)
    sizes = TINY_SIZES if tiny else SIZES
    return device, [
        case
        for case in timed
        if case.package == OURS
        and case.name in LOSSES
        and case.phase in HOW
        and (case.temperature, case.launch) == (1.0, None)
        and case.rows == sizes.rows[0]
        and case.vocabulary in sizes.telling
    ]


def make_calls(tiny: bool) -> None:
    """The program that runs under ncu: each case once, behind a kernel that separates them."""
    device, called = cases(tiny)
    for case in called:
        phase = PHASES[case.phase]
        student, teacher = case.make_inputs(case.rows, device, seed=0)
        teacher[:, 0] = SURE
        phase.run(case.loss, phase.prepare(case.loss, student, teacher))  # compiles
        prepared = phase.prepare(case.loss, student, teacher)
        with _profiled(device):
            phase.run(case.loss, prepared)
        print(case.label, flush=True)


@contextlib.contextmanager
def _profiled(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    with torch.cuda.profiler.profile():
        torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
        yield
        torch.cuda.synchronize(device)


def counted(loss: str, phase: str) -> tuple[float, float]:
    """The bytes per position with the later sweeps of a kernel served by the L2, and with none.

    They are the same for every device, and for every V that is a multiple of 16.
    """
    how = HOW[phase]
    row = next(
        row
        for row in load("floor")["data"]["devices"]["H100"]["rows"]
        if row["loss"] == f"**{loss}**" and row["how"] in (how, f"{how}, T = 1")
    )
    return row["bytes_once"], row["bytes"]


def report_of_ncu(path: Path, tiny: bool) -> str:
    """What ncu writes to this path about the calls of a process of its own."""
    path.write_text("")
    program = f"from bench.questions import dram; dram.make_calls(tiny={tiny})"
    command = ["ncu", *OPTIONS, "--log-file", str(path), sys.executable, "-c", program]
    process = subprocess.run(command, cwd=ROOT, env=os.environ | {"LC_ALL": "C"})
    report = path.read_text("utf-8")
    if NOT_PERMITTED in report:
        raise Unanswerable(f"the counters of this GPU may not be read ({NOT_PERMITTED})")
    process.check_returncode()
    return report


def collect(output: Path = RESULTS / "gpu", tiny: bool = False) -> dict[str, Any]:
    """The bytes of every call; with `tiny`, of calls on the CPU."""
    device, called = cases(tiny)
    if shutil.which("ncu") is None:
        raise Unanswerable("ncu is not on PATH")
    output.mkdir(parents=True, exist_ok=True)
    calls = moved_by_calls(report_of_ncu(output.resolve() / "ncu.csv", tiny), SEPARATOR)
    results = []
    for case, moved in zip(called, calls, strict=True):
        positions = case.rows * case.vocabulary
        once, none = counted(case.name, case.phase)
        results.append(
            {
                "device": device.type,
                "loss": case.name,
                "phase": case.phase,
                "rows": case.rows,
                "vocabulary": case.vocabulary,
                "read": moved.read / positions,
                "written": moved.written / positions,
                "counted_l2_serves_later_sweeps": once,
                "counted_l2_serves_none": none,
            }
        )
    with (output / "dram.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    return {"results": results}


def markdown(data: dict[str, Any]) -> str:
    """A line for each call."""
    return table(
        ("loss", "phase", "device", "N", "V", "read", "written", "both", "counted"),
        [
            (
                *(r["loss"], r["phase"], r["device"], f"{r['rows']:,}", f"{r['vocabulary']:,}"),
                *(f"{b:.2f}" for b in (r["read"], r["written"], r["read"] + r["written"])),
                f"{r['counted_l2_serves_later_sweeps']:.2f} to {r['counted_l2_serves_none']:.2f}",
            )
            for r in data["results"]
        ],
        texts=3,
    )
