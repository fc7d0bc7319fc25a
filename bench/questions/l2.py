"""`python -m bench l2`: which sweeps of a row the L2 would serve, by a model of it (lab/l2.py).

Every SM holds two rows.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bench.inputs.stages import BOUNDARY, DIVERGENCE, GRADIENT, STATISTICS, SWEEPS
from bench.lab.l2 import Access, blocks_moved
from bench.questions.floor import DEVICES
from bench.report.tables import table

BLOCK = 4 * 2048  # a turn of a loop
BLOCK_BYTES = 2 * BLOCK  # bf16
ROWS_PER_SM = 2
VOCABULARIES = (32_000, 49_152, 128_256, 151_936)


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


def collect(device: str = "H100", vocabularies: Sequence[int] = VOCABULARIES) -> dict[str, Any]:
    """The modelled bytes per position of every order; `device` is a name in devices.toml."""
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
