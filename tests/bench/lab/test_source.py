# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The function that an instruction comes from, when all device functions are inlined into one
kernel."""

import functools
import inspect
from pathlib import Path

import pytest
import triton
import triton.language as tl

from bench.lab import sass
from bench.lab.compile import TARGETS, compile_for
from bench.lab.source import read_functions

BLOCK = 1024


@triton.jit
def loaded(x_ptr, start, V, BLOCK: tl.constexpr):
    """A function that both loops call."""
    offs = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + offs, mask=offs < V, other=0.0).to(tl.float32)


@triton.jit
def weighted(x):
    return tl.exp2(x) * x + tl.exp2(-x)


@triton.jit
def summed(x_ptr, V, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        total += weighted(loaded(x_ptr, start, V, BLOCK))
    return tl.sum(total, axis=0)


@triton.jit
def scaled(x_ptr, y_ptr, V, factor, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, factor * loaded(x_ptr, start, V, BLOCK), mask=offs < V)


@triton.jit
def two_stages(x_ptr, y_ptr, V, BLOCK: tl.constexpr):
    scaled(x_ptr, y_ptr, V, summed(x_ptr, V, BLOCK), BLOCK)


@functools.cache
def compiled(target: str):
    return compile_for(
        two_stages,
        {"x_ptr": "*bf16", "y_ptr": "*fp32", "V": "i32"},
        {"BLOCK": BLOCK},
        divisible={"x_ptr", "y_ptr", "V"},
        target=target,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_loops_are_those_of_their_functions_whatever_the_file(target: str) -> None:
    code = sass.analyse(compiled(target))
    by_function = code.loops_by_function(["scaled", "summed", "elsewhere"])
    ((of_scaled,), (of_summed,)) = by_function["scaled"], by_function["summed"]
    assert by_function["elsewhere"] == ()
    assert len(code.innermost_loops) == 2
    assert of_summed.body.special["ex2"] > 0 and not of_summed.body.bytes_stored
    assert of_scaled.body.bytes_stored and "ex2" not in of_scaled.body.special


def lines_of(function) -> set[int]:
    source, first = inspect.getsourcelines(function.fn)
    return set(range(first, first + len(source)))


def test_a_helper_counts_for_the_one_that_it_serves() -> None:
    functions = read_functions(compiled("sm_90").asm["source"])
    owners = functions.owners(["scaled", "summed"])
    # Triton's cache serves all folders, and keeps the path that it saw first.
    name = Path(__file__).name
    here = {line: owner for (path, line), owner in owners.items() if Path(path).name == name}
    assert set(here.values()) == {"scaled", "summed"}
    for line, owner in here.items():
        helped = lines_of(summed) | lines_of(weighted)
        assert line in (helped if owner == "summed" else lines_of(scaled))
    assert lines_of(weighted) & set(here)
    assert not lines_of(loaded) & set(here)


IR = """
#loc = loc("/there/kernel.py":3:0)
#loc1 = loc("/there/stages.py":7:4)
#loc2 = loc(unknown)
module {
  tt.func public @kernel(%x: i32 loc("x"(#loc))) attributes {noinline = false} {
    tt.call @there.stages.first__i32(%x) : (i32) -> () loc(#loc4)
    tt.call @"there.stages.second__i32_c'a'"(%x) : (i32) -> () loc(#loc)
    tt.return loc(#loc2)
  } loc(#loc)
  tt.func private @there.stages.first__i32(%x: i32 loc("x"(#loc1))) {
    %y = arith.addi %x, %x : i32 loc(#loc6)
  } loc(#loc1)
  tt.func private @"there.stages.second__i32_c'a'"(%x: i32 loc("x"(#loc3))) {
    tt.call @there.stages.first__i32(%x) : (i32) -> () loc(#loc3)
  } loc(#loc3)
}
#loc3 = loc("/there/stages.py":20:0)
#loc4 = loc("/there/kernel.py":4:11)
#loc5 = loc("/there/stages.py":8:11)
#loc6 = loc("y"(#loc5))
"""


def test_functions_of_an_ir() -> None:
    functions = read_functions(IR)
    first, second = "there.stages.first__i32", "there.stages.second__i32_c'a'"
    assert functions.lines == {
        "kernel": {("/there/kernel.py", 3), ("/there/kernel.py", 4)},
        first: {("/there/stages.py", 7), ("/there/stages.py", 8)},
        second: {("/there/stages.py", 20)},
    }
    assert functions.calls == {"kernel": {first, second}, first: set(), second: {first}}
    # Each name that is asked for is a root: the lines of `first` are its own, though `second` calls
    # it.
    assert functions.owners(["first", "second"]) == {
        ("/there/stages.py", 7): "first",
        ("/there/stages.py", 8): "first",
        ("/there/stages.py", 20): "second",
    }
    assert set(functions.owners(["second"])) == functions.lines[first] | functions.lines[second]
    assert functions.owners(["sec", "stages"]) == {}
