"""`python -m bench l2`: a model, never a measurement, of which sweeps of a row the L2 serves.

The L2 is taken to be one set of the size in devices.toml that drops the block used longest ago.
Every SM holds two rows; each in turn takes the next block of its sweeps, until it is done and the
next row follows, and at the start each stands somewhere else in its row. What is written takes no
room of its own where it stands over what it was made of, and leaves once. Real caches hash their
addresses, are split in two and choose otherwise: read the differences between orders, not the
figures.
"""

from __future__ import annotations

import tomllib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bench.questions.floor import DEVICES
from bench.report.tables import table

BLOCK = 4 * 2048  # a turn of a loop
BLOCK_BYTES = 2 * BLOCK  # bf16
ROWS_PER_SM = 2
GENERATIONS = 3  # rows that follow each other on an SM while it is counted
VOCABULARIES = (32_000, 49_152, 128_256, 151_936)


class Access(NamedTuple):
    """Of a block of a row."""

    tensor: str  # "teacher", "student", "gradient"
    block: int
    write: bool = False
    keep: bool = True  # False: with a hint that it is not wanted again


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


class Cache:
    """Blocks in the order of their last use, and how many went from and to the memory."""

    def __init__(self, size: int) -> None:
        self.room = size // BLOCK_BYTES
        self.held: OrderedDict[tuple[int, str, int], None] = OrderedDict()
        self.moved = 0

    def use(self, row: int, access: Access) -> None:
        """A block is read or written."""
        key = (row, access.tensor, access.block)
        if access.write or key not in self.held:
            self.moved += 1  # read, or to be written back one day
        self.held[key] = None
        self.held.move_to_end(key, last=access.keep)
        if len(self.held) > self.room:
            self.held.popitem(last=False)


def bytes_per_position(size: int, resident: int, row: Sequence[Access]) -> float:
    """From and to the memory, in steady state, with `resident` rows in flight."""
    cache = Cache(size)
    rows = list(range(resident))
    places = [len(row) * i // resident for i in range(resident)]
    warm = len(row)  # steps, in which every place works off one row
    for step in range((1 + GENERATIONS) * warm):
        if step == warm:
            cache.moved = 0
        for i in range(resident):
            cache.use(rows[i], row[places[i]])
            places[i] += 1
            if places[i] == len(row):
                rows[i], places[i] = rows[i] + resident, 0
    blocks = 1 + max(access.block for access in row)
    return cache.moved * BLOCK_BYTES / (GENERATIONS * resident * blocks * BLOCK)


def modelled(size: int, resident: int, vocabulary: int, order: Order) -> float:
    """Bytes per position of all launches of an order."""
    blocks = -(-vocabulary // BLOCK)
    return sum(
        bytes_per_position(size, resident, list(sweeps(blocks, order, stages)))
        for stages in order.launches
    )


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
