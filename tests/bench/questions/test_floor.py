"""Floors, and the work that they are computed from."""

from __future__ import annotations

from typing import Any

import pytest

from bench.questions.floor import Work, floor, work

DEVICE: dict[str, Any] = {
    **{"sms": 100, "clock": 1e9, "mufu": 10, "issue": 100},
    **{"bandwidth": 2e12, "copy": 1e12, "l2_rate": 4e12},
}


@pytest.mark.parametrize(
    ("of", "reuse", "seconds", "bound"),
    [
        (Work(bytes=14, bytes_once=6, exps=6, instructions=40), False, 14e-12, "bytes"),
        (Work(bytes=14, bytes_once=6, exps=8, instructions=40), True, 8e-12, "exps"),
        (Work(bytes=14, bytes_once=6, exps=6, instructions=150), True, 15e-12, "instructions"),
        (Work(bytes=32, bytes_once=6, exps=6, instructions=40), True, 8e-12, "L2"),
    ],
)
def test_the_floor_is_the_largest_of_four(
    of: Work, reuse: bool, seconds: float, bound: str
) -> None:
    at_least, limit = floor(of, DEVICE, reuse)
    assert at_least == pytest.approx(seconds)
    assert limit == bound


def test_without_a_measured_copy_the_data_sheet_counts() -> None:
    sheet = {key: value for key, value in DEVICE.items() if key != "copy"}
    of = Work(bytes=14, bytes_once=6, exps=0, instructions=0)
    assert floor(of, sheet, False)[0] == pytest.approx(7e-12)


def test_work_of_a_kernel() -> None:
    """Three sweeps of bf16 pairs and a gradient move 14 bytes, or 6 where each logit is read
    once."""

    def stage(name: str, width: int, stores: int) -> dict[str, Any]:
        return {
            **{"stage": name, "positions": 8.0, "instructions": 80, "exps": 16},
            **{"loads": {str(width): 2}, "stores": {"16": stores} if stores else {}},
        }

    stages = [
        stage("statistics", 16, 0),
        stage("boundary", 8, 0),
        stage("divergence", 16, 0),
        stage("gradient", 16, 1),
    ]
    kernel = {"stages": stages}
    none = {"boundary": 0.0}
    assert work([kernel], none) == Work(bytes=14, bytes_once=6, exps=6, instructions=30)
    assert work([kernel, kernel], none) == Work(28, bytes_once=12, exps=12, instructions=60)
    scanned = Work(bytes=19, bytes_once=6, exps=11, instructions=55)
    assert work([kernel], {"boundary": 2.5}) == scanned
    stages.append(stage("cut", 8, 0))
    assert work([kernel], {"boundary": 2.0, "cut": 0.5}) == scanned
