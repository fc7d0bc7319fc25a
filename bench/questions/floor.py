"""`python -m bench floor`: a floor from bytes, exponentials and instructions, never a time.

    floor = max(bytes / copy, bytes without a cache / L2 rate, exps / MUFU rate,
                instructions / issue rate)

`copy` is the fastest that the memory was ever reported to be, or else the rate of its pins. This is
per vocabulary position, times V, and is computed twice: with every sweep of a row served by the
memory, and with the second and later sweeps of a kernel served by the L2, so that it reads every
logit once. The floor lies between the two, depending on how many of the row pairs in flight the L2
holds. A real kernel also waits: a floor says what it cannot beat, and which of the four to work
on.

Everything comes from stored figures (instructions, traffic, operators) and from devices.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.inputs.shapes import PEER_VOCABULARIES
from bench.inputs.stages import BOUNDARY, CUT, IN_ONE, SEARCHES, SEPARATE
from bench.report.tables import table
from bench.store import load

DEVICES = Path(__file__).resolve().parents[1] / "inputs" / "devices.toml"
TEMPERATURES = (1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Work:
    """The work of forward and backward, per vocabulary position."""

    bytes: float  # no cache
    bytes_once: float  # a kernel reads every logit once
    exps: float
    instructions: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes + other.bytes,
            self.bytes_once + other.bytes_once,
            self.exps + other.exps,
            self.instructions + other.instructions,
        )


# The number of times that each of the SEARCHES sweeps a row.
Scans = Mapping[str, float]


def work(kernels: Iterable[Mapping[str, Any]], scans: Scans) -> Work:
    """The work of kernels, as the question `instructions` stores them."""
    total = Work(0.0, 0.0, 0.0, 0.0)
    for kernel in kernels:
        most = 0.0
        for stage in kernel["stages"]:
            sweeps = scans[stage["stage"]] if stage["stage"] in SEARCHES else 1.0
            loads = _moved(stage["loads"]) / stage["positions"]
            stores = _moved(stage["stores"]) / stage["positions"]
            most = max(most, loads)
            total += Work(
                bytes=sweeps * loads + stores,
                bytes_once=stores,
                exps=sweeps * stage["exps"] / stage["positions"],
                instructions=sweeps * stage["instructions"] / stage["positions"],
            )
        # The stage that reads most reads all that the kernel reads.
        total += Work(0.0, most, 0.0, 0.0)
    return total


def _moved(accesses: Mapping[str, int]) -> int:
    return sum(int(width) * count for width, count in accesses.items())


def floor(of: Work, device: Mapping[str, Any], reuse: bool) -> tuple[float, str]:
    """(seconds per position, what sets them)."""
    rate = device["sms"] * device["clock"]
    limits = {
        "bytes": (of.bytes_once if reuse else of.bytes) / device.get("copy", device["bandwidth"]),
        "L2": of.bytes / device["l2_rate"],
        "exps": of.exps / (device["mufu"] * rate),
        "instructions": of.instructions / (device["issue"] * rate),
    }
    bound = max(limits, key=lambda name: limits[name])
    return limits[bound], bound


# ---------------------------------------------------------------- the section


def collect() -> dict[str, Any]:
    """Floors of ours and of the peers on every device."""
    devices = tomllib.loads(DEVICES.read_text("utf-8"))
    instructions, operators, traffic = (
        load(section)["data"] for section in ("instructions", "operators", "traffic")
    )
    scans = {
        f"{temperature:g}": next(
            {BOUNDARY: case["scans"]["boundary_mean"], CUT: case["scans"]["cut_mean"]}
            for case in traffic["cases"]
            if not case["synthetic"]
            and (case["dtype"], case["temperature"]) == ("bfloat16", temperature)
        )
        for temperature in TEMPERATURES
    }
    return {
        "devices": {
            key: {
                **device,
                "rows": [
                    _row(name, computes, how, of, device, vocabulary, blocks)
                    for vocabulary in PEER_VOCABULARIES
                    for name, computes, how, of, blocks in (
                        *_ours(instructions["ours"], device["target"], vocabulary, scans),
                        *_peers(instructions["peers"], operators, device["target"], vocabulary),
                    )
                ],
            }
            for key, device in devices.items()
        },
        "scans": scans,
        "operators_vocabulary": operators["vocabulary"],
    }


_Entry = tuple[str, str, str, Work, int | None]


def _ours(
    cases: list[dict[str, Any]], target: str, vocabulary: int, scans: Mapping[str, Scans]
) -> Iterable[_Entry]:
    for case in cases:
        if (
            case["target"] != target
            or case["dtype"] != "bf16"
            or vocabulary not in case["vocabularies"]
        ):
            continue
        has_head = case["loss"] == "adaptive_kl"
        for how, names in (("in place", IN_ONE), ("default", SEPARATE)):
            kernels = [case["kernels"][name] for name in names]
            blocks = max(kernel["resident_blocks"] for kernel in kernels)
            for temperature, of_head in scans.items() if has_head else (("", {}),):
                at = f", T = {temperature}" if temperature else ""
                yield f"**{case['loss']}**", case["loss"], how + at, work(kernels, of_head), blocks


def _peers(
    cases: list[dict[str, Any]], operators: Mapping[str, Any], target: str, vocabulary: int
) -> Iterable[_Entry]:
    """The floors of the peers. The bytes of PyTorch's operators are added; their instructions and
    exps are not known."""
    compiled = {
        case["peer"]: case["kernels"].values()
        for case in cases
        if case["target"] == target and vocabulary in case["vocabularies"]
    }
    ours = {case["computes"] for case in operators["subjects"] if case["name"] == case["computes"]}
    for subject in operators["subjects"]:
        name = subject["name"]
        if name in ours or (name not in compiled and subject["bytes_in_kernels"]):
            continue
        in_kernels = subject["bytes_in_kernels"]
        of = work(compiled.get(name, ()), {}) + Work(
            bytes=subject["bytes"] - in_kernels,
            # A tensor that is smaller than the logits may stay in a cache.
            bytes_once=subject["bytes_in_large_tensors"] - in_kernels,
            exps=0.0,
            instructions=0.0,
        )
        kernels = list(compiled.get(name, ()))
        blocks = max((kernel["resident_blocks"] for kernel in kernels), default=None)
        yield name, subject["computes"], "", of, blocks


def _row(
    name: str,
    computes: str,
    how: str,
    of: Work,
    device: Mapping[str, Any],
    vocabulary: int,
    blocks: int | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        **{"loss": name, "computes": computes, "how": how, "vocabulary": vocabulary},
        **asdict(of),
        "in_flight": None if blocks is None else blocks * device["sms"] * vocabulary * 4,
    }
    for reuse in (False, True):
        seconds, bound = floor(of, device, reuse)
        key = "reused" if reuse else "streamed"
        row[key] = {"nanoseconds": seconds * vocabulary * 1e9, "bound": bound}
    return row


def markdown(data: dict[str, Any]) -> str:
    parts = [
        "A floor is a time that no run is known to beat, not a time that a run takes; no GPU was "
        "used. The floors are nanoseconds per row of forward and backward, in bf16 with the whole "
        "GPU at work. The first number is with the later sweeps of a kernel served by the L2, the "
        "second with all served by memory. Bytes, exps and instructions are per vocabulary "
        "position; bytes likewise with the L2 and without. For the work of PyTorch's operators "
        "(the eager rows; softmax and scaling around Liger's kernels) only bytes are known, so "
        "that those floors are low. The scans for the boundary are those of real logits "
        "(`python -m bench traffic`): "
        + ", ".join(f"{sum(of.values()):.2f} at T = {t}" for t, of in data["scans"].items())
        + ". The bytes of operators (`python -m bench operators`) were counted at V = "
        f"{data['operators_vocabulary']:,}.",
    ]
    for device in data["devices"].values():
        copy = device.get("copy")
        parts += [
            f"### {device['name']}",
            f"{device['sms']} SMs at {device['clock'] / 1e9:.2f} GHz, {device['mufu']} exps and "
            f"{device['issue']} instructions a clock and SM, L2 {device['l2'] / 1e6:.0f} MB at "
            f"{device['l2_rate'] / 1e12:.1f} TB/s, memory {device['bandwidth'] / 1e12:.2f} TB/s"
            + (
                f", of which {copy / 1e12:.2f}, the most that anybody reported, are counted with"
                if copy
                else ""
            )
            + ". Machine code for "
            f"{device['target']}. Row pairs in flight, `adaptive_kl` in place: "
            + ", ".join(
                f"{row['in_flight'] / 1e6:.0f} MB at V = {row['vocabulary']:,}"
                for row in device["rows"]
                if row["loss"] == "**adaptive_kl**" and row["how"] == "in place, T = 1"
            )
            + ".",
            table(
                (
                    *("loss", "computes", "", "bytes", "exps", "instructions", "bound by"),
                    *(f"V = {v:,}" for v in PEER_VOCABULARIES),
                ),
                _rows(device["rows"]),
                texts=3,
            ),
            "Sources: "
            + "; ".join(f"{name}: {source}" for name, source in device["sources"].items())
            + ".",
        ]
    return "\n\n".join(parts)


def _rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for all rows that differ in V alone; its figures per position are those of the last
    V."""
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["loss"], row["how"]), {})[row["vocabulary"]] = row
    return [
        (
            name,
            last["computes"],
            how,
            _range(f"{last['bytes_once']:.1f}", f"{last['bytes']:.1f}"),
            f"{last['exps']:.1f}" if last["exps"] else "",
            f"{last['instructions']:.1f}" if last["instructions"] else "",
            _range(last["reused"]["bound"], last["streamed"]["bound"]),
            *(
                _range(*(f"{of[v][key]['nanoseconds']:.0f}" for key in ("reused", "streamed")))
                for v in PEER_VOCABULARIES
            ),
        )
        for (name, how), of in lines.items()
        for last in [of[PEER_VOCABULARIES[-1]]]
    ]


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
