"""A model, never a measurement, of the part of the sweeps over rows that an L2 serves.

The L2 is taken to be one set that drops the block used longest ago.  Rows in flight take turns, a
block each; one that is done makes place for the next, and at the start each stands somewhere else
in its row.  Output that overwrites its input takes no room of its own, and leaves once.  Real
caches hash their addresses, are split in two and choose otherwise: read the differences between
orders, not the figures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

GENERATIONS = 3  # rows that follow each other in a place while blocks are counted


class Access(NamedTuple):
    """An access to a block of a row."""

    tensor: str
    block: int
    write: bool = False
    keep: bool = True  # False: with a hint that it is not wanted again


class Cache:
    """Blocks in the order of their last use, and the number that went from and to the memory."""

    def __init__(self, room: int) -> None:
        self.room = room  # blocks
        self.held: OrderedDict[tuple[int, str, int], None] = OrderedDict()
        self.moved = 0

    def use(self, row: int, access: Access) -> None:
        """Read or write a block."""
        key = (row, access.tensor, access.block)
        if access.write or key not in self.held:
            self.moved += 1  # read, or to be written back one day
        self.held[key] = None
        self.held.move_to_end(key, last=access.keep)
        if len(self.held) > self.room:
            self.held.popitem(last=False)


def blocks_moved(room: int, resident: int, row: Sequence[Access]) -> float:
    """The blocks that go from and to the memory for each row, in steady state, with `resident` rows
    in flight."""
    cache = Cache(room)
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
    return cache.moved / (GENERATIONS * resident)
