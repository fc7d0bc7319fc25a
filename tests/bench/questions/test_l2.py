"""The model of the L2 in cases where the answer is known; its order of sweeps is that of the
kernels."""

from __future__ import annotations

import tomllib

import pytest

from akl_triton.kernels.launch_table import LARGEST_OF_TWO, launch_for
from bench.inputs.stages import BOUNDARY
from bench.questions.floor import DEVICES
from bench.questions.l2 import (
    BLOCK,
    BLOCK_BYTES,
    ORDERS,
    SWEPT,
    Order,
    modelled,
    of_launch,
    through_l2,
)

BLOCKS = 10
BY_NAME = {order.name: order for order in ORDERS}
IN_PLACE = BY_NAME["in place: forward"]
SERPENTINE = BY_NAME["in place: serpentine"]


def size_of_rows(rows: float) -> int:
    """The size of a cache that holds so many pairs of rows."""
    return int(rows * 2 * BLOCKS * BLOCK_BYTES)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_a_cache_that_holds_all_reads_a_launch_once(order: Order) -> None:
    found = modelled(size_of_rows(100), 4, BLOCKS * BLOCK, order)
    assert found == {1: 4 + 2, 2: 4 + 4 + 2}[len(order.launches)]


@pytest.mark.parametrize("order", [o for o in ORDERS if not o.serpentine], ids=lambda o: o.name)
def test_forward_order_finds_nothing_in_a_cache_that_is_too_small(order: Order) -> None:
    scans = sum(stages.count(BOUNDARY) for stages in order.launches)
    assert modelled(size_of_rows(0.4), 1, BLOCKS * BLOCK, order) == 14 + 2 * scans


def test_serpentine_order_finds_what_the_cache_holds() -> None:
    """A cache of one row serves half of the divergence, then half of the gradient."""
    found = modelled(size_of_rows(0.5), 1, BLOCKS * BLOCK, SERPENTINE)
    assert found == pytest.approx(14 - 4, abs=0.5)


def test_hints_make_room() -> None:
    size, resident = size_of_rows(4), 8
    without = modelled(size, resident, BLOCKS * BLOCK, SERPENTINE)
    hinted = modelled(size, resident, BLOCKS * BLOCK, SERPENTINE._replace(hints=True))
    assert hinted < without < modelled(size, resident, BLOCKS * BLOCK, IN_PLACE)


def test_all_bytes_pass_between_l2_and_sms() -> None:
    assert [through_l2(order) for order in SWEPT.values()] == [14, 16, 10]


@pytest.mark.parametrize("device", tomllib.loads(DEVICES.read_text("utf-8")))
def test_the_launch_table_holds_as_many_rows_as_the_model_finds_in_the_l2(device: str) -> None:
    """Two pairs an SM cost nothing up to LARGEST_OF_TWO; above it, one costs less somewhere, and
    nowhere more."""
    of_device = tomllib.loads(DEVICES.read_text("utf-8"))[device]
    sizes = (49_152, LARGEST_OF_TWO, 151_936, 262_144)
    one, two = (of_launch(of_device, "adaptive_kl", n, sizes)["picoseconds"] for n in (1, 2))
    assert two[:2] == pytest.approx(one[:2])
    assert one[3] < 0.9 * two[3]
    assert one[2] <= two[2]
    threads = [launch_for("head or statistics", v).threads for v in sizes]
    assert threads == [256, 256, 512, 512]
