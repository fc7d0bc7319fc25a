"""How a row of logits is cut into blocks, and how a block is read.

A row is walked in blocks of BLOCK columns. So that every block starts on a 16-byte boundary,
columns are counted from `lead` elements before the row: column i of the vocabulary stands at offset
lead + i, and 0 <= lead < 8 makes offset 0 aligned (V = 50,257 puts 7 rows of 8 off the boundary).

    block    0        1 .. full-1     full .. blocks-1
    kind     edge     full            edge
             masked   no mask         masked, and one side's extra vocabulary

full = 0 marks a row that has a base (`row_base`); like full = 1, it makes every block an edge.
"""

import triton
import triton.language as tl

# Rows whose sum of exponentials exceeds this are summed again from their true maximum: it keeps the
# arguments of exp2 below 20 + log2(V), where their rounding is harmless, and far from overflow.
SUM_LIMIT = tl.constexpr(2.0**20)
# Rows whose largest scaled logit exceeds this have it taken off before they are scaled, as
# `row_base`: the rounding of so large a reference would show, and then overflow.
REFERENCE_LIMIT = tl.constexpr(2.0**22)
# Finite logits so negative that scaling makes them -inf are held here, to keep 0 * u finite.
LOWEST = tl.constexpr(-(2.0**127))
# The largest number of bf16, so that it is finite in every dtype of that range.
LARGEST = tl.constexpr(3.3895313892515355e38)
# Full blocks a turn of a loop: the loop's own instructions are shared and more loads are in flight.
UNROLL = tl.constexpr(4)


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Elements before row `row` of a [outer, inner, V] tensor, in int64: N * V overflows int32."""
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def row_pointer(ptr, offset, lead, ALIGNED: tl.constexpr):
    """Address of offset 0 of a row; ALIGNED promises that it is a multiple of 16 bytes."""
    pointer = ptr + (offset - lead)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def full_blocks_end(end_t, end_s, BLOCK: tl.constexpr):
    """Blocks 1 .. this-1 lie inside both rows."""
    return tl.maximum(tl.minimum(end_t, end_s) // BLOCK, 1)


@triton.jit
def edge_block(i, full):
    """The i-th edge block: 0, full, full + 1, ..."""
    return tl.where(i == 0, 0, tl.maximum(full, 1) + i - 1)


@triton.jit
def edge_count(full, blocks):
    """How many edge blocks a row has."""
    return 1 + tl.maximum(blocks - tl.maximum(full, 1), 0)


@triton.jit
def block_offsets(block, BLOCK: tl.constexpr):
    """Offsets of a full block, as wide as addresses, so that these advance by a constant."""
    return tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_full(
    row_ptr, block,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    POLICY: tl.constexpr = tl.constexpr(""),  # noqa: B008 - Triton 3.6 takes no plain string here
):  # fmt: skip
    """Logits of a full block, in fp32; ALIGNED is that of `row_pointer`, POLICY that of the L2."""
    if ALIGNED and row_ptr.dtype.element_ty == tl.bfloat16:
        # Two a word: a shift or a mask an element, where a conversion takes one and a half.
        words = row_ptr.to(tl.pointer_type(tl.int32))
        words = (words + tl.arange(0, BLOCK // 2)) + tl.cast(block, tl.int64) * (BLOCK // 2)
        pair = tl.load(words, eviction_policy=POLICY)
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
        return tl.interleave(low, high)
    return tl.load(row_ptr + block_offsets(block, BLOCK), eviction_policy=POLICY).to(tl.float32)


@triton.jit
def load_edge(row_ptr, offsets, lead, end):
    """Logits of an edge block, in fp32, -inf outside the row."""
    inside = (offsets >= lead) & (offsets < end)
    return tl.load(row_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def row_max(row, lead, end, BLOCK: tl.constexpr):
    """max_i x_i."""
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, end, BLOCK):
        best = tl.maximum(best, load_edge(row, start + columns, lead, end))
    return tl.max(best, axis=0)


@triton.jit
def row_base(row, lead, end, gain, full, BLOCK: tl.constexpr):
    """Half the largest logit of a row whose `full` is 0, else 0. It is found anew where it is
    needed: kept, it would take a register in the loops of all other rows."""
    base = 0.0
    if full == 0:
        base = 0.5 * capped(row_max(row, lead, end, BLOCK), gain)
    return base


@triton.jit
def scaled(x, scale, gain, reference, base=None):
    """scale x - reference, or scale tanh(gain x) - reference where the logits have a softcap.

    One rounding: left to itself, the compiler fuses it or does not. `gain` is None without a
    softcap. `base` is that of `row_base`, and None in full blocks, of which rows with a base have
    none."""
    x = capped(x, gain)
    if base is not None:  # in halves: the largest number less the lowest would be infinite
        x = tl.fma(x, 0.5, -base)
        scale = 2.0 * scale
    return tl.fma(x, scale, -reference)


@triton.jit
def capped(x, gain):
    """x, or tanh(gain x); infinities stay, so that a forbidden token has no probability."""
    if gain is not None:
        x = tl.where(tl.abs(x) == float("inf"), x, _tanh(x * gain))
    return x


@triton.jit
def softcap_slope(x, gain):
    """1 - tanh^2(gain x), which does not cancel where the softcap saturates."""
    e = _decay(x * gain)
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _decay(x):
    """e^(-2 |x|)."""
    return tl.exp2(tl.abs(x) * -2.885390081777927)


@triton.jit
def _tanh(x):
    """tanh x: 1 - 2 e / (1 + e) with e = e^(-2 |x|), and near 0, where that cancels, a polynomial
    (that of tanhf in Cephes)."""
    e = _decay(x)
    far = 1.0 - 2.0 * e / (1.0 + e)
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def rounded_sum(a, b):
    """a + b as fp32 and what the rounding lost (Knuth's TwoSum)."""
    total = a + b
    b_part = total - a
    a_part = total - b_part
    return total, (a - a_part) + (b - b_part)


@triton.jit
def held(x, limit):
    """x between -limit and limit; NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
