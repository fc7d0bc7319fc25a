"""Several reductions over a block at once.

A reduction over the warps of a program has two barriers and one before the next. Accumulators that
are joined to one tensor share them, and are added in the same order as alone.
"""

import triton
import triton.language as tl

# NumPy, by which Triton's interpreter computes, adds the elements of a joined tensor in turn, and
# those of any other by pairs, which loses less: there each is reduced alone.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Nine would be filled up to 16.
MOST = tl.constexpr(8)


@triton.jit
def sums(values):
    """The sum of each [BLOCK] tensor of a tuple."""
    return _reduced(values, tl.sum)


@triton.jit
def maxima(values):
    """The maximum of each [BLOCK] tensor of a tuple."""
    return _reduced(values, tl.max)


@triton.jit
def wanted_sums(values, wanted):
    """Likewise, but 0 where `wanted`, a tuple of constants, is False."""
    return _in_place_of(_wanted(values, wanted), wanted, tl.sum)


@triton.jit
def wanted_maxima(values, wanted):
    """Likewise, but 0 where `wanted`, a tuple of constants, is False."""
    return _in_place_of(_wanted(values, wanted), wanted, tl.max)


@triton.jit
def _wanted(values, wanted):
    chosen = ()
    for i in tl.static_range(len(values)):
        if wanted[i]:
            chosen = chosen + (values[i],)
    return chosen


@triton.jit
def _in_place_of(chosen, wanted, REDUCTION: tl.constexpr):
    results = _reduced(chosen, REDUCTION)
    in_order = ()
    used = ()
    for i in tl.static_range(len(wanted)):
        if wanted[i]:
            in_order = in_order + (results[len(used)],)
            used = used + (0,)
        else:
            in_order = in_order + (0.0,)
    return in_order


@triton.jit
def _reduced(values, REDUCTION: tl.constexpr):
    at_once: tl.constexpr = 1 if INTERPRETED else MOST
    results = ()
    for begin in tl.static_range(0, len(values), at_once):
        results = results + _at_once(values[begin : begin + at_once], REDUCTION)
    return results


@triton.jit
def _at_once(values, REDUCTION: tl.constexpr):
    """Reduce up to MOST tensors as one of [BLOCK, 2, 2, ...]: it is filled up with the last one."""
    for _ in tl.static_range(MOST):
        if len(values) & (len(values) - 1) != 0:
            values = values + (values[len(values) - 1],)
    joins = ()
    for _ in tl.static_range(MOST):
        if len(values) > 1:
            pairs = ()
            for i in tl.static_range(len(values) // 2):
                pairs = pairs + (tl.join(values[i], values[i + len(values) // 2]),)
            values = pairs
            joins = joins + (0,)
    parts = (REDUCTION(values[0], axis=0),)
    for _ in tl.static_range(len(joins)):
        first = ()
        second = ()
        for i in tl.static_range(len(parts)):
            left, right = tl.split(parts[i])
            first = first + (left,)
            second = second + (right,)
        parts = first + second
    return parts
