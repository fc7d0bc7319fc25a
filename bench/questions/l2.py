"""`python -m bench l2`: which sweeps of a row the L2 would serve, by a model of it (lab/l2.py).

Every SM holds two rows.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bench.lab.l2 import Access, blocks_moved
from bench.questions.floor import DEVICES
from bench.report.tables import table

BLOCK = 4 * 2048  # a turn of a loop
BLOCK_BYTES = 2 * BLOCK  # bf16
ROWS_PER_SM = 2
VOCABULARIES = (32_000, 49_152, 128_256, 151_936)


class Order(NamedTuple):
    """A way to sweep a row."""

    name: str
    launches: tuple[str, ...]  # their stages; R is one scan of the teacher's row
    serpentine: bool  # B from the last block to the first
    hints: bool = False  # C's accesses are the last ones


ORDERS = (
    Order("in place: forward", ("ABC",), serpentine=False),
    Order("in place: serpentine", ("ABC",), serpentine=True),
    Order("in place: serpentine, hints", ("ABC",), serpentine=True, hints=True),
    Order("in place, one scan: forward", ("ARBC",), serpentine=False),
    Order("in place, one scan: serpentine, hints", ("ARBC",), serpentine=True, hints=True),
    Order("two launches: forward", ("AB", "C"), serpentine=False),
    Order("two launches: serpentine, hints", ("AB", "C"), serpentine=True, hints=True),
)


def sweeps(blocks: int, order: Order, stages: str) -> Iterator[Access]:
    """The accesses of one launch to a row."""
    in_place = len(order.launches) == 1
    for stage in stages:
        keep = not (order.hints and stage == "C")
        backwards = order.serpentine and stage == "B"
        for block in reversed(range(blocks)) if backwards else range(blocks):
            yield Access("teacher", block, keep=keep)
            if stage != "R":
                yield Access("student", block, keep=keep)
            if stage == "C":
                yield Access("student" if in_place else "gradient", block, True, keep)


def modelled(size: int, resident: int, vocabulary: int, order: Order) -> float:
    """Bytes per position of all launches of an order."""
    blocks = -(-vocabulary // BLOCK)
    moved = sum(
        blocks_moved(size // BLOCK_BYTES, resident, list(sweeps(blocks, order, stages)))
        for stages in order.launches
    )
    return moved * BLOCK_BYTES / (blocks * BLOCK)


def collect(device: str = "H100", vocabularies: Sequence[int] = VOCABULARIES) -> dict[str, Any]:
    """Modelled bytes per position of every order; `device` is a name in devices.toml."""
    of_device = tomllib.loads(DEVICES.read_text("utf-8"))[device]
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
    }


def markdown(data: dict[str, Any]) -> str:
    """A line for every order."""
    return "\n\n".join(
        [
            "Modelled, not measured: bytes per position between the memory and the L2 of "
            f"{data['device']} ({data['l2'] / 1e6:.0f} MB, {data['resident']} rows in flight).",
            table(
                ("order", *(f"V = {v:,}" for v in data["vocabularies"])),
                [(name, *(f"{figure:.1f}" for figure in of)) for name, of in data["bytes"].items()],
            ),
        ]
    )
