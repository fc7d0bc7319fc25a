"""Head boundary: where the teacher's sorted mass reaches mu, without sorting.

    mass(x)  = sum of p_i over teacher logits t_i >= x          a step function
    crossing = largest x in the row with mass(x) > mu           (inclusive rule: >= mu)
    taken    = how many of the logits equal to `crossing` belong to the head
    cut      = offset behind the last of those, in index order   (ties="stable")

Logits are ordered by an integer key (the sign-magnitude bits of their own dtype, made monotone).
A bracket of two keys, of which the lower crosses mu and the upper does not, is narrowed by
evaluating mass() at PIVOTS keys at a time until the two are neighbours. mass() is summed over

  - the slot maxima of the statistics, which are in registers, where these are proven to suffice: a
    slot's mass less that of its maximum bounds every other token in it, so that no token heavier
    than the largest such rest, `hidden`, is missing among the maxima. Text at T = 1 needs no more.
  - otherwise the teacher's row, one sweep for every PIVOTS keys. The first stand around an
    estimate: the maxima are BLOCK tokens drawn from the top, and if a share f of them is >= x, then
    about -BLOCK ln(1 - f) tokens are (balls in bins), which says how much mass the maxima hide.
    Later ones stand where interpolation in the bracket expects the crossing, at distances of its
    expected error.
"""

import triton
import triton.language as tl

from .arithmetic import capped, scaled
from .blocks import load_edge, load_full
from .reductions import maxima, sums

PIVOTS = tl.constexpr(4)
# Full blocks per turn of a scan, whose loads are in flight together: the pivots leave no room for
# more.
SCAN_UNROLL = tl.constexpr(2)
# mu is exact to a few roundings of fp32, and a head of all the mass would have no boundary.
LARGEST_MU = tl.constexpr(1.0 - 2.0**-20)
# Nothing 2^-64 below the most probable token can hold a visible share of the mass.
DEPTH = tl.constexpr(64.0)
# Bins of the estimate, in powers of 2 of the mass: the first and the last.
BIN_LOG2 = tl.constexpr(2.0)
FINEST_BIN_LOG2 = tl.constexpr(1.0 / 32)
# How far, in units of T ln 2, the first pivots are from an estimate that is good, and from one that
# is poor since the maxima hide most of what is above it.
PIVOT_NEAR = tl.constexpr(0.01)
PIVOT_FAR = tl.constexpr(0.15)
# The error of an interpolation that the curvature of mass() makes, as a share of the bracket.
CURVATURE_ERROR = tl.constexpr(0.0012)


@triton.jit
def key_of(x, dtype: tl.constexpr):
    """Monotone integer key of the `dtype` value nearest to x; keys of fp32 may lie 2^32 apart."""
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 equals 0.0
    if dtype == tl.float16:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return bits ^ ((bits >> 31) & 0x7FFF)
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if dtype == tl.bfloat16:  # a negative number of bf16 ends in ones, and would be rounded up
        key = ((key + 0x8000) >> 16) + (key >> 31)
    return key


@triton.jit
def value_of(key, dtype: tl.constexpr):
    """The fp32 value whose key this is."""
    if dtype == tl.float16:
        bits = key ^ ((key >> 31) & 0x7FFF)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if dtype == tl.bfloat16:
        key = key << 16 | ((key >> 31) & 0xFFFF)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def lowest_key(dtype: tl.constexpr):
    """Key of the lowest finite number, in fp32 that of bf16."""
    lowest: tl.constexpr = -65504.0 if dtype == tl.float16 else -3.3895313892515355e38
    return key_of(tl.full((), lowest, tl.float32), dtype)


@triton.jit
def crosses(mass, target, INCLUSIVE: tl.constexpr):
    """Whether a prefix of this mass goes beyond mu."""
    if INCLUSIVE:
        return mass >= target
    return mass > target


@triton.jit
def head_boundary(
    t_row,  # teacher logits of the row, offset 0
    lead,
    end_t,
    scale, gain,  # of `scaled`
    reference,  # of the statistics
    z,  # Z_t of the statistics
    slots,  # [BLOCK] slot maxima of the statistics
    top,  # the largest of them
    hidden,  # no token that is no slot maximum has a larger mass
    full_end,  # 0 if the row has a base
    mu,
    INCLUSIVE: tl.constexpr,
    STABLE: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether the slots are all tokens, and may not have enough of the mass
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(crossing logit, mass above it, taken, mass of one such token, cut); masses are shares of Z.

    `cut` is end_t where all ties belong to the head, and 0 where none do or ties are averaged. A
    PARTIAL row that does not reach mu is all head: the crossing is then -inf."""
    dtype: tl.constexpr = t_row.dtype.element_ty
    target = tl.minimum(mu, LARGEST_MU) * z
    base = tl.where(full_end == 0, 0.5 * capped(top, gain), 0.0)
    top_mass = mass_of(top, scale, gain, reference, base)
    crossing = top
    above = 0.0
    reached = top_mass
    # A token with more than half of the mass has no equal: nothing need be read. (NaN rows: also.)
    alone = (top_mass > 0.5 * z) & crosses(top_mass, target, INCLUSIVE)
    if (z == z) & (alone == 0):
        high = key_of(top, dtype) + 1
        slot_mass = mass_of(slots, scale, gain, reference, base)
        heavy = slot_mass > hidden
        low = key_of(tl.min(tl.where(heavy, slots, float("inf")), axis=0), dtype)
        known = tl.sum(tl.where(heavy, slot_mass, 0.0), axis=0)
        slots_suffice = (low < high) & crosses(known, target, INCLUSIVE)
        if not PARTIAL:
            slots_suffice = slots_suffice & (full_end > 0)
        if slots_suffice:
            crossing, above, reached = _search(
                t_row, lead, end_t, scale, gain, base, reference, slots, top, target, low, high,
                known, INCLUSIVE, True, dtype, BLOCK,
            )  # fmt: skip
        elif PARTIAL:
            crossing = float("-inf")
            above = known
            reached = known
        else:
            low = lowest_key(dtype)
            if gain is None:  # a softcap lifts all that is below
                low = tl.maximum(low, key_of(top - DEPTH / scale, dtype) - 1)
            low = tl.minimum(low, high - 1)  # fp32 goes on below the lowest number of bf16
            crossing, above, reached = _search(
                t_row, lead, end_t, scale, gain, base, reference, slots, top, target, low, high, z,
                INCLUSIVE, False, dtype, BLOCK,
            )  # fmt: skip
    tie_mass = mass_of(crossing, scale, gain, reference, base)
    ties = tl.floor((reached - above) / tie_mass + 0.5)
    fitting = (target - above) / tie_mass
    if INCLUSIVE:
        taken = tl.ceil(fitting)
        taken = tl.minimum(tl.maximum(taken, 1.0), ties)
    else:
        taken = tl.floor(fitting)
        taken = tl.minimum(tl.maximum(taken, tl.where(above == 0.0, 1.0, 0.0)), ties)
    if PARTIAL:
        taken = tl.where(crossing == float("-inf"), 0.0, taken)
        ties = tl.where(crossing == float("-inf"), 1.0, ties)
    cut = 0
    if STABLE:
        if taken > ties - 0.5:
            cut = end_t
        elif taken > 0.5:
            cut = cut_behind(t_row, lead, end_t, crossing, taken, ties, BLOCK)
    return crossing, above / z, taken, tie_mass / z, cut


@triton.jit
def mass_of(x, scale, gain, reference, base=None):
    """The mass of a logit, in units of Z."""
    return tl.exp2(scaled(x, scale, gain, reference, base))


@triton.jit
def steepness_of(scale, gain):
    """The most that the logarithm (to base 2) of a mass changes with x."""
    if gain is not None:
        scale *= gain
    return scale


@triton.jit
def _estimate(slots, scale, gain, base, reference, target, top, BLOCK: tl.constexpr):
    """Logit at which the slot maxima say that the mass reaches `target`, and the share f of slots
    above it: f near 1 means that they hide most tokens and the estimate is poor.

    Bins of a factor of 2^BIN_LOG2 go down from the top; the last of them is halved."""
    slot_mass = mass_of(slots, scale, gain, reference, base)
    steepness = steepness_of(scale, gain)
    high = top  # above it the estimated mass falls short of the target
    mass_above = 0.0
    slots_above = 0.0
    step = BIN_LOG2 / steepness
    finest = FINEST_BIN_LOG2 / steepness
    halving = 0
    # Where logits are so large that a step is lost in their rounding, there is nothing to halve.
    while (step > finest) & (high > top - DEPTH / steepness) & (high - step < high):
        inside = (slots > high - step) & (slots <= high)
        held, seen = sums((inside.to(tl.float32), tl.where(inside, slot_mass, 0.0)))
        held = tl.maximum(held, 0.5)
        count = tl.minimum(slots_above + held, BLOCK - 0.5)
        # Tokens in the bin for each that is seen: on average, and at the bin's upper end.
        tokens = BLOCK * tl.log((BLOCK - slots_above) / (BLOCK - count)) / held
        heaviest = BLOCK / (BLOCK - slots_above)
        mass = mass_above + seen * 0.5 * (tokens + heaviest)
        if (mass < target) & (count < BLOCK - 1):  # behind the last slot nothing is known
            high -= step
            mass_above = mass
            slots_above = count
        else:
            halving = 1
        if halving == 1:
            step *= 0.5
    return tl.max(tl.where(slots <= high, slots, float("-inf")), axis=0), slots_above / BLOCK


@triton.jit
def _pivots_around(x, distance, dtype: tl.constexpr):
    """Keys at about x - 5 d, x - d, x + d, x + 5 d, and no two of them the same; d may be 0."""
    key = key_of(x, dtype)
    return (
        tl.minimum(key_of(x - 5 * distance, dtype), key - 1),
        tl.minimum(key_of(x - distance, dtype), key),
        tl.maximum(key_of(x + distance, dtype), key + 1),
        tl.maximum(key_of(x + 5 * distance, dtype), key + 2),
    )


@triton.jit
def _interpolated(low_value, high_value, mass_low, mass_high, target, scale, gain, base, reference):
    """The logit where a line between the bracket's ends reaches `target`, and its likely error."""
    width = high_value - low_value
    share = (mass_low - target) / (mass_low - mass_high)
    x = low_value + width * share
    tokens = (mass_low - mass_high) / mass_of(x, scale, gain, reference, base)
    noise = tl.sqrt(tl.maximum(share * (1.0 - share), 0.02) / tl.maximum(tokens, 1.0))
    return x, width * (CURVATURE_ERROR + 0.15 * noise)


@triton.jit
def _add_masses(
    t, mass, pivots, below, above, low_value, high_value, scale, gain, reference, base, dtype
):
    """Add a block of logits to the masses at the pivots, and to the logits nearest the bracket."""
    p = mass_of(t, scale, gain, reference, base)
    new = ()
    for i in tl.static_range(PIVOTS):
        new = new + (mass[i] + tl.where(t >= pivots[i], p, 0.0),)
    if dtype == tl.float32:
        below = tl.maximum(below, tl.where(t < high_value, t, float("-inf")))
        above = tl.minimum(above, tl.where(t >= low_value, t, float("inf")))
    return new, below, above


@triton.jit
def _search(
    t_row, lead, end_t, scale, gain, base, reference, slots, top, target,
    low, high, mass_low,  # the bracket's keys: mass(low) crosses, mass(high) = 0 does not
    INCLUSIVE: tl.constexpr,
    SLOTS: tl.constexpr,  # sum over the slot maxima, not over the row
    dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(crossing logit, mass above it, mass at or above it), in units of Z."""
    columns = tl.arange(0, BLOCK)
    mass_high = 0.0
    equal_parts = SLOTS
    reach = 0.0  # of the last pivots, while none or all of these have crossed
    crossed = 0
    fell_short = 0
    x = value_of(high, dtype)
    if not SLOTS:
        x, saturation = _estimate(slots, scale, gain, base, reference, target, top, BLOCK)
        reach = tl.where(saturation > 0.8, PIVOT_FAR, PIVOT_NEAR) / steepness_of(scale, gain)
    last = tl.where(base == 0.0, end_t // BLOCK, 0)
    span = high.to(tl.int64) - low.to(tl.int64)
    while span > 1:
        low_value = value_of(low, dtype)
        high_value = value_of(high, dtype)
        if equal_parts | (span <= PIVOTS + 1):
            part = tl.maximum(span // (PIVOTS + 1), 1).to(tl.int32)
            keys = (low + part, low + 2 * part, low + 3 * part, low + 4 * part)
        else:
            distance = reach
            if reach == 0.0:
                x, distance = _interpolated(
                    low_value, high_value, mass_low, mass_high, target,
                    scale, gain, base, reference,
                )  # fmt: skip
            keys = _pivots_around(x, distance, dtype)
        pivots = ()
        mass = ()
        inside = ()
        for i in tl.static_range(PIVOTS):
            key = tl.minimum(tl.maximum(keys[i], low + 1), high - 1)
            inside = inside + (key,)
            pivots = pivots + (value_of(key, dtype),)
            mass = mass + (tl.zeros((BLOCK,), tl.float32),)
        below = tl.full((BLOCK,), float("-inf"), tl.float32)
        above = tl.full((BLOCK,), float("inf"), tl.float32)
        if SLOTS:
            mass, below, above = _add_masses(
                slots, mass, pivots, below, above, low_value, high_value,
                scale, gain, reference, None, dtype,
            )  # fmt: skip
        else:
            for block in tl.range(1, last, loop_unroll_factor=SCAN_UNROLL):
                t = load_full(t_row, block, True, BLOCK)
                mass, below, above = _add_masses(
                    t, mass, pivots, below, above, low_value, high_value,
                    scale, gain, reference, None, dtype,
                )  # fmt: skip
            for start in range(0, end_t, tl.maximum(last, 1) * BLOCK):
                t = load_edge(t_row, start + columns, lead, end_t)
                mass, below, above = _add_masses(
                    t, mass, pivots, below, above, low_value, high_value,
                    scale, gain, reference, base, dtype,
                )  # fmt: skip
        if dtype == tl.float32:
            # No logit lies between the bracket's ends and these: moving the ends keeps both masses.
            nearest_below, nearest_above = maxima((below, -above))
            high = key_of(nearest_below, dtype) + 1
            low = key_of(-nearest_above, dtype)
        totals = sums(mass)
        for i in tl.static_range(PIVOTS):
            total = totals[i]
            if crosses(total, target, INCLUSIVE):
                mass_low = tl.where(inside[i] >= low, total, mass_low)
                low = tl.maximum(low, inside[i])
                crossed = 1
            else:
                mass_high = tl.where(inside[i] <= high, total, mass_high)
                high = tl.minimum(high, inside[i])
                fell_short = 1
        narrowed = high.to(tl.int64) - low.to(tl.int64)
        if (reach > 0.0) & (crossed + fell_short < 2):  # the estimate was far off
            reach *= 4.0
            x = value_of(low, dtype) + 5 * reach
            if crossed == 0:
                x = value_of(high, dtype) - 5 * reach
        else:
            reach = 0.0
            equal_parts = SLOTS | (4 * narrowed > span)  # interpolation is no help: bisect
        span = narrowed
    return value_of(low, dtype), mass_high, mass_low


@triton.jit
def cut_behind(t_row, lead, end_t, crossing, taken, ties, BLOCK: tl.constexpr):
    """The offset before which `taken` of the logits equal to `crossing` stand, the others behind.

    The row is walked from the end that is nearer in ties, CHUNK blocks at a time, until it is seen
    where they part; a lane notes the blocks of its own ties as bits, with their count above."""
    columns = tl.arange(0, BLOCK)
    CHUNK: tl.constexpr = 4
    ONE: tl.constexpr = 1 << CHUNK
    onwards = 2.0 * taken <= ties
    wanted = tl.where(onwards, taken, ties - taken).to(tl.int32)
    chunks = tl.cdiv(end_t, CHUNK * BLOCK)
    last = end_t // BLOCK
    noted = tl.zeros((BLOCK,), tl.int32)
    seen = 0
    count = 0
    start = 0
    walked = 0
    while (walked < chunks) & (seen + count < wanted):
        seen += count
        start = tl.where(onwards, walked, chunks - 1 - walked) * CHUNK
        noted = tl.zeros((BLOCK,), tl.int32)
        for i in range(CHUNK):
            block = start + i
            if (block > 0) & (block < last):
                t = load_full(t_row, block, True, BLOCK)
            else:
                t = load_edge(t_row, block * BLOCK + columns, lead, end_t)
            noted += tl.where(t == crossing, ONE + (1 << i), 0)
        count = tl.sum(noted >> CHUNK, axis=0)
        walked += 1
    # The last tie before the cut, counted from the front of the chunk: which block, where in it.
    rank = tl.where(onwards, wanted - seen, count - (wanted - seen))
    of_block = ()
    for i in tl.static_range(CHUNK):
        of_block = of_block + ((noted >> i) & 1,)
    of_block = sums(of_block)
    block = 0
    before = 0
    behind = 0
    for i in tl.static_range(CHUNK - 1):
        behind += of_block[i]
        block += (behind < rank).to(tl.int32)
        before = tl.where(behind < rank, behind, before)
    tie = (noted >> block) & 1
    inside = (tie == 1) & (before + tl.cumsum(tie, axis=0) <= rank)
    return (start + block) * BLOCK + tl.max(tl.where(inside, columns + 1, 0), axis=0)
