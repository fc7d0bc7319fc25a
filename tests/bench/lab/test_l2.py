"""The model of the L2, on sweeps that can be followed by hand."""

from __future__ import annotations

import pytest

from bench.lab.l2 import Access, Cache, blocks_moved

READ = [Access("x", block) for block in range(4)]


def test_the_block_used_longest_ago_goes() -> None:
    cache = Cache(room=2)
    for block in (0, 1, 0, 2, 0, 1):
        cache.use(0, Access("x", block))
    assert cache.moved == 4  # 0, 1 and 2, and 1 again, which 2 pushed out


def test_a_block_that_is_not_wanted_again_goes_first() -> None:
    cache = Cache(room=2)
    for block, keep in ((0, True), (1, False), (2, True), (0, True)):
        cache.use(0, Access("x", block, keep=keep))
    assert cache.moved == 3


@pytest.mark.parametrize(
    ("room", "row", "moved"),
    [
        (4, READ + READ, 4),  # the second sweep finds everything
        (3, READ + READ, 8),  # in the same order, it finds nothing
        (3, READ + READ[::-1], 5),  # backwards, it finds what the first has left
        (4, [*READ, *(Access("x", block, write=True) for block in range(4))], 8),
    ],
)
def test_blocks_moved_for_a_row(room: int, row: list[Access], moved: int) -> None:
    assert blocks_moved(room, 1, row) == moved


def test_rows_in_flight_share_the_room() -> None:
    assert blocks_moved(8, 2, READ + READ) == 4
    assert blocks_moved(4, 2, READ + READ) > 4
