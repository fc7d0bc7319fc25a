"""`python -m bench l2`: which sweeps of a row the L2 would serve, by a model of it (lab/l2.py).

First the orders in which rows may be swept, with two row pairs on every SM. Then how many pairs an
SM should hold, which is what a launch decides: the time of a position is at least that of its bytes
between memory and L2, and that of all its bytes between L2 and SMs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.inputs.stages import BOUNDARY, DIVERGENCE, GRADIENT, STATISTICS, SWEEPS
from bench.lab.l2 import Access, blocks_moved
from bench.questions.floor import DEVICES
from bench.report.tables import table

BLOCK = 4 * 2048  # a turn of a loop
BLOCK_BYTES = 2 * BLOCK  # bf16
ROWS_PER_SM = 2
VOCABULARIES = (32_000, 49_152, 128_256, 151_936)
ROWS_TRIED = (1, 2, 3)
VOCABULARIES_TRIED = (32_000, 49_152, 65_536, 100_352, 128_256, 151_936, 262_144)


class Order(NamedTuple):
    """An order in which launches sweep a row."""

    name: str
    launches: tuple[tuple[str, ...], ...]  # their stages; the boundary is one scan of the teacher
    serpentine: bool  # the divergence from the last block to the first
    hints: bool = False  # the gradient's accesses are the last ones


IN_PLACE = SWEEPS["forward with gradient"]
ONE_SCAN = (STATISTICS, BOUNDARY, DIVERGENCE, GRADIENT)
TWO_LAUNCHES = (SWEEPS["forward"], SWEEPS["backward"])
ORDERS = (
    Order("in place: forward", (IN_PLACE,), serpentine=False),
    Order("in place: serpentine", (IN_PLACE,), serpentine=True),
    Order("in place: serpentine, hints", (IN_PLACE,), serpentine=True, hints=True),
    Order("in place, one scan: forward", (ONE_SCAN,), serpentine=False),
    Order("in place, one scan: serpentine, hints", (ONE_SCAN,), serpentine=True, hints=True),
    Order("two launches: forward", TWO_LAUNCHES, serpentine=False),
    Order("two launches: serpentine, hints", TWO_LAUNCHES, serpentine=True, hints=True),
)

# What an SM sweeps in place, in the kernels' order.
SWEPT = {
    "adaptive_kl": Order("adaptive_kl", (IN_PLACE,), serpentine=True, hints=True),
    "adaptive_kl, one scan": Order("one scan", (ONE_SCAN,), serpentine=True, hints=True),
    "forward_kl": Order("forward_kl", ((STATISTICS, GRADIENT),), serpentine=True, hints=True),
}


def sweeps(blocks: int, order: Order, stages: Sequence[str]) -> Iterator[Access]:
    """The accesses of one launch to a row."""
    in_place = len(order.launches) == 1
    for stage in stages:
        keep = not (order.hints and stage == GRADIENT)
        backwards = order.serpentine and stage == DIVERGENCE
        for block in reversed(range(blocks)) if backwards else range(blocks):
            yield Access("teacher", block, keep=keep)
            if stage != BOUNDARY:
                yield Access("student", block, keep=keep)
            if stage == GRADIENT:
                yield Access("student" if in_place else "gradient", block, True, keep)


def modelled(size: int, resident: int, vocabulary: int, order: Order) -> float:
    """The modelled bytes per position of all launches of an order."""
    blocks = -(-vocabulary // BLOCK)
    moved = sum(
        blocks_moved(size // BLOCK_BYTES, resident, list(sweeps(blocks, order, stages)))
        for stages in order.launches
    )
    return moved * BLOCK_BYTES / (blocks * BLOCK)


def through_l2(order: Order) -> int:
    """The bytes per position of all launches of an order between L2 and SMs, in bf16."""
    return sum(2 * sum(1 for _ in sweeps(1, order, stages)) for stages in order.launches)


def picoseconds(order: Order, moved: float, device: Mapping[str, Any]) -> float:
    """The least time of a position, of whose bytes so many pass between memory and L2."""
    seconds = max(
        moved / device.get("copy", device["bandwidth"]), through_l2(order) / device["l2_rate"]
    )
    return float(1e12 * seconds)


def of_launch(
    device: Mapping[str, Any], loss: str, rows: int, vocabularies: Sequence[int]
) -> dict[str, Any]:
    """The figures of a loss in place, where every SM of a device holds so many row pairs."""
    order = SWEPT[loss]
    moved = [modelled(int(device["l2"]), rows * device["sms"], v, order) for v in vocabularies]
    return {
        **{"device": device["name"], "loss": loss, "rows": rows, "bytes": moved},
        "picoseconds": [picoseconds(order, bytes_moved, device) for bytes_moved in moved],
    }


def collect(
    device: str = "H100",
    vocabularies: Sequence[int] = VOCABULARIES,
    tried: Sequence[int] = VOCABULARIES_TRIED,
) -> dict[str, Any]:
    """The modelled bytes per position of every order on one device, which is a name in
    devices.toml, and of every number of rows an SM on all."""
    devices = tomllib.loads(DEVICES.read_text("utf-8"))
    of_device = devices[device]
    resident = ROWS_PER_SM * of_device["sms"]
    return {
        "device": of_device["name"],
        "l2": of_device["l2"],
        "resident": resident,
        "vocabularies": list(vocabularies),
        "bytes": {
            order.name: [modelled(int(of_device["l2"]), resident, v, order) for v in vocabularies]
            for order in ORDERS
        },
        "tried": list(tried),
        "launches": [
            of_launch(of, loss, rows, tried)
            for of in devices.values()
            for loss in SWEPT
            for rows in ROWS_TRIED
        ],
    }


def markdown(data: dict[str, Any]) -> str:
    """A line for every order, and one for every device, loss and number of rows."""
    return "\n\n".join(
        [
            "Modelled, not measured: bytes per position between the memory and the L2 of "
            f"{data['device']} ({data['l2'] / 1e6:.0f} MB, {data['resident']} rows in flight).",
            table(
                ("order", *(f"V = {v:,}" for v in data["vocabularies"])),
                [(name, *(f"{figure:.1f}" for figure in of)) for name, of in data["bytes"].items()],
            ),
            "Modelled, not measured, in place: the same bytes, and the picoseconds that a position "
            "takes at least, by memory and L2, where every SM holds so many row pairs.",
            table(
                ("device", "loss", "pairs", *(f"V = {v:,}" for v in data["tried"])),
                [
                    (
                        *(of["device"], of["loss"], f"{of['rows']}"),
                        *(
                            f"{moved:.1f}: {time:.1f} ps"
                            for moved, time in zip(of["bytes"], of["picoseconds"], strict=True)
                        ),
                    )
                    for of in data["launches"]
                ],
                texts=2,
            ),
        ]
    )
