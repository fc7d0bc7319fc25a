"""Stage R, head boundary: where the teacher's sorted mass reaches mu, without sorting.

    mass(x)  = sum of p_i over teacher logits t_i >= x          a step function, read off the row
    crossing = largest x in the row with mass(x) > mu           (inclusive rule: >= mu)
    k        = how many of the logits equal to `crossing` belong to the head
    cut      = offset behind the k-th of them, in index order   (ties="stable")

Logits are ordered by an integer key (the sign-magnitude bits of their own dtype, made monotone),
and mass() is evaluated at PIVOTS keys in one sweep of the teacher's row, until two neighbouring
keys bracket mu. The first pivots stand around an estimate that costs no sweep: the slot maxima of
stage A are BLOCK tokens drawn from the top, and if a share f of the slots holds a logit >= x, then
about -BLOCK ln(1 - f) tokens are >= x (balls in bins), which says how much mass the maxima hide.
"""

import triton
import triton.language as tl

from .rows import LOWEST, load_edge, load_full

PIVOTS = tl.constexpr(6)
# The estimate narrows its bracket to a BINS-th every round; BINS x BLOCK values are in registers.
BINS = tl.constexpr(4)
ROUNDS = tl.constexpr(5)
# Nothing 2^-64 below the most probable token can hold a visible share of the mass.
DEPTH = tl.constexpr(64.0)
ESTIMATE_DEPTH = tl.constexpr(32.0)


@triton.jit
def key_of(x, dtype: tl.constexpr):
    """Monotone integer key of a value of `dtype` held in fp32; keys of fp32 may lie 2^32 apart."""
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 equals 0.0
    if dtype == tl.float16:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return bits ^ ((bits >> 31) & 0x7FFF)
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if dtype == tl.bfloat16:
        key = key >> 16
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
    scale,
    reference,  # of stage A
    z,  # Z_t of stage A
    slots,  # [BLOCK] slot maxima of stage A
    mu,
    INCLUSIVE: tl.constexpr,
    STABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(crossing logit, mass above it, k, mass of one such token, cut); masses are shares of Z.

    `cut` is end_t where all ties belong to the head, and 0 where none do or ties are averaged."""
    dtype: tl.constexpr = t_row.dtype.element_ty
    target = mu * z
    top = tl.max(slots, axis=0)
    top_mass = tl.exp2(top * scale - reference)
    crossing = top
    above = 0.0
    reached = top_mass
    # A token with more than half of the mass has no equal: nothing need be read. (NaN rows: also.)
    alone = (top_mass > 0.5 * z) & crosses(top_mass, target, INCLUSIVE)
    if (z == z) & (alone == 0):
        crossing, above, reached = _search(
            t_row, lead, end_t, scale, reference, z, slots, top, target, INCLUSIVE, dtype, BLOCK
        )
    each = tl.exp2(crossing * scale - reference)
    ties = tl.floor((reached - above) / each + 0.5)
    share = (target - above) / each
    if INCLUSIVE:
        k = tl.ceil(share)
        k = tl.minimum(tl.maximum(k, 1.0), ties)
    else:
        k = tl.floor(share)
        k = tl.minimum(tl.maximum(k, tl.where(above == 0.0, 1.0, 0.0)), ties)
    cut = 0
    if STABLE:
        if k > ties - 0.5:
            cut = end_t
        elif k > 0.5:
            cut = _cut_behind(t_row, lead, end_t, crossing, k, BLOCK)
    return crossing, above / z, k, each / z, cut


@triton.jit
def _estimate(slots, scale, reference, target, top, BLOCK: tl.constexpr):
    """Logit at which the slot maxima say that the mass reaches `target`, and the share f of slots
    above it: f near 1 means that they hide most tokens and the estimate is poor."""
    slot_mass = tl.exp2(slots * scale - reference)
    high = top  # the mass above `high`, estimated, and the slots that hold it
    mass_above = 0.0
    slots_above = 0.0
    step = ESTIMATE_DEPTH / (scale * BINS)
    for _ in range(ROUNDS):
        bins = tl.arange(0, BINS)
        bin_high = high - step * bins
        inside = (slots[:, None] > (bin_high - step)[None, :]) & (
            slots[:, None] <= bin_high[None, :]
        )
        held = tl.sum(inside.to(tl.float32), axis=0)
        total = tl.sum(tl.where(inside, slot_mass[:, None], 0.0), axis=0)
        count = tl.minimum(slots_above + tl.cumsum(held, axis=0), BLOCK - 0.5)
        tokens = BLOCK * tl.log((BLOCK - count + held) / (BLOCK - count))
        mass = mass_above + tl.cumsum(total * tl.where(held > 0.0, tokens / held, 1.0), axis=0)
        short = mass < target
        high -= step * tl.sum(short.to(tl.float32), axis=0)
        mass_above = tl.max(tl.where(short, mass, mass_above), axis=0)
        slots_above = tl.max(tl.where(short, count, slots_above), axis=0)
        step /= BINS
    return high, slots_above / BLOCK


@triton.jit
def _pivot_key(i, first, step, low, high, dtype: tl.constexpr):
    """Key of the i-th pivot, `step` keys apart from `first` down.

    Step 0 cuts the bracket in equal parts by value: around 0 it holds most keys and few logits."""
    if step > 0:
        key = first - i * step
    else:
        high_value = value_of(high, dtype)
        part = (i + 1) / (PIVOTS + 1)
        key = key_of(high_value - (high_value - value_of(low, dtype)) * part, dtype)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def _add_masses(t, mass, pivots, below, above, low_value, high_value, scale, reference, dtype):
    """Add a block of logits to the masses at the pivots, and to the logits nearest the bracket."""
    p = tl.exp2(t * scale - reference)
    new = ()
    for i in tl.static_range(PIVOTS):
        new = new + (mass[i] + tl.where(t >= pivots[i], p, 0.0),)
    if dtype == tl.float32:
        below = tl.maximum(below, tl.where(t < high_value, t, float("-inf")))
        above = tl.minimum(above, tl.where(t >= low_value, t, float("inf")))
    return new, below, above


@triton.jit
def _search(
    t_row, lead, end_t, scale, reference, z, slots, top, target,
    INCLUSIVE: tl.constexpr, dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(crossing logit, mass above it, mass at or above it), in units of Z.

    Invariant: mass(low) crosses, mass(high) does not; done when high is the key behind low."""
    columns = tl.arange(0, BLOCK)
    high = key_of(top, dtype) + 1
    mass_high = 0.0
    low = key_of(tl.maximum(top - DEPTH / scale, LOWEST), dtype) - 1
    mass_low = z
    guess, hidden = _estimate(slots, scale, reference, target, top, BLOCK)
    # One key of a 16-bit dtype, or 2^13 of fp32; wider where the slots hide much.
    unit: tl.constexpr = 8192 if dtype == tl.float32 else 1
    step = tl.where(hidden > 0.8, 3 * unit, unit)
    first = key_of(guess, dtype) + step
    last = end_t // BLOCK
    span = high.to(tl.int64) - low.to(tl.int64)
    while span > 1:
        keys = ()
        pivots = ()
        mass = ()
        for i in tl.static_range(PIVOTS):
            key = _pivot_key(i, first, step, low, high, dtype)
            keys = keys + (key,)
            pivots = pivots + (value_of(key, dtype),)
            mass = mass + (tl.zeros((BLOCK,), tl.float32),)
        below = tl.full((BLOCK,), float("-inf"), tl.float32)
        above = tl.full((BLOCK,), float("inf"), tl.float32)
        high_value = value_of(high, dtype)
        low_value = value_of(low, dtype)
        for block in range(1, last):
            t = load_full(t_row, block, True, BLOCK)
            mass, below, above = _add_masses(
                t, mass, pivots, below, above, low_value, high_value, scale, reference, dtype
            )
        for start in range(0, end_t, tl.maximum(last, 1) * BLOCK):
            t = load_edge(t_row, start + columns, lead, end_t)
            mass, below, above = _add_masses(
                t, mass, pivots, below, above, low_value, high_value, scale, reference, dtype
            )
        if dtype == tl.float32:
            # No logit lies between the bracket's ends and these: moving the ends keeps both masses.
            high = key_of(tl.max(below, axis=0), dtype) + 1
            low = key_of(tl.min(above, axis=0), dtype)
        for i in tl.static_range(PIVOTS):
            total = tl.sum(mass[i], axis=0)
            if crosses(total, target, INCLUSIVE):
                mass_low = tl.where(keys[i] >= low, total, mass_low)
                low = tl.maximum(low, keys[i])
            else:
                mass_high = tl.where(keys[i] <= high, total, mass_high)
                high = tl.minimum(high, keys[i])
        span = high.to(tl.int64) - low.to(tl.int64)
        equal = tl.cdiv(span, PIVOTS + 1).to(tl.int32)
        if (span > PIVOTS + 1) & (mass_low == z):  # still below all pivots: reach further down
            step = tl.minimum(4 * step, equal)
            first = high - step
        elif (span > PIVOTS + 1) & (mass_high == 0.0):  # still above all pivots
            step = tl.minimum(4 * step, equal)
            first = low + PIVOTS * step
        else:  # bracketed: equal parts, by key and by value in turn
            step = tl.where((step == 0) | (span <= PIVOTS + 1), equal, 0)
            first = high - step
    return value_of(low, dtype), mass_high, mass_low


@triton.jit
def _cut_behind(t_row, lead, end_t, crossing, k, BLOCK: tl.constexpr):
    """Offset behind the k-th logit equal to `crossing`; end_t if there are fewer."""
    columns = tl.arange(0, BLOCK)
    STRIDE: tl.constexpr = 8 * BLOCK
    seen = 0
    wanted = k.to(tl.int32)
    start = 0
    count = 0
    while (start < end_t) & (seen + count < wanted):
        seen += count
        ties = tl.zeros((BLOCK,), tl.int32)
        for block in range(start, tl.minimum(start + STRIDE, end_t), BLOCK):
            t = load_edge(t_row, block + columns, lead, end_t)
            ties += (t == crossing).to(tl.int32)
        count = tl.sum(ties, axis=0)
        start += STRIDE
    cut = end_t
    if seen + count >= wanted:
        start -= STRIDE
        count = 0
        while seen + count < wanted:
            seen += count
            t = load_edge(t_row, start + columns, lead, end_t)
            count = tl.sum((t == crossing).to(tl.int32), axis=0)
            start += BLOCK
        tie = (load_edge(t_row, start - BLOCK + columns, lead, end_t) == crossing).to(tl.int32)
        rank = tl.cumsum(tie, axis=0)
        behind = tl.where((tie == 1) & (rank == wanted - seen), start - BLOCK + columns + 1, 0)
        cut = tl.max(behind, axis=0)
    return cut
