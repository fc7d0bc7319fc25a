"""Every collective is recorded once, however it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from bench.lab.collectives import Collective, record_collectives

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@torch.library.custom_op("bench_test::summed", mutates_args=())
def summed(x: Tensor) -> Tensor:
    y = x.clone()
    dist.all_reduce(y)
    return y


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


X = torch.ones(5, 3, dtype=torch.bfloat16)
WAYS: dict[str, tuple[Callable[[], object], str]] = {
    "in place": (lambda: dist.all_reduce(X.clone()), "all_reduce"),
    "not awaited at once": (
        lambda: dist.all_reduce(X.clone(), async_op=True).wait(),
        "all_reduce",
    ),
    "functional": (lambda: functional.all_reduce(X, "sum", world()).sum(), "all_reduce"),
    "by the group": (lambda: world().allreduce([X.clone()]).wait(), "all_reduce"),
    "inside of an operator": (lambda: summed(X), "all_reduce"),
    "gathered": (lambda: dist.all_gather([torch.empty_like(X)], X), "all_gather"),
    "scattered": (lambda: dist.scatter(torch.empty_like(X), [X]), "scatter"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_collective_is_recorded_with_what_is_handed_over(way: str, one_rank: None) -> None:
    call, name = WAYS[way]
    with record_collectives() as found:
        call()
    assert found == [Collective(name, 2 * 5 * 3)]


def test_order_is_that_of_the_calls_and_the_block_is_all(one_rank: None) -> None:
    dist.all_reduce(torch.ones(1))
    with record_collectives() as found:
        dist.all_reduce(torch.ones(2))
        dist.broadcast(torch.ones(3, dtype=torch.int64), 0)
    dist.all_reduce(torch.ones(4))
    assert found == [Collective("all_reduce", 8), Collective("broadcast", 24)]
