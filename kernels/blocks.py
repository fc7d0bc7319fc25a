"""How a row of logits is cut into blocks, and how a block is read.

A row is walked in blocks of BLOCK columns. So that every block starts on a 16-byte boundary,
columns are counted from `lead` elements before the row: column i of the vocabulary stands at offset
lead + i, and 0 <= lead < 8 makes offset 0 aligned (V = 50,257 puts 7 rows of 8 off the boundary).

    block    0        1 .. full_end-1   full_end .. blocks-1
    kind     edge     full              edge
             masked   no mask           masked, and the extra vocabulary of one side

full_end = 0 marks a row that has a base (`row_base`); like full_end = 1, it makes every block an
edge.
"""

import triton
import triton.language as tl

from .arithmetic import capped

# Full blocks per turn of a loop: they share its own instructions, and more loads are in flight.
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
        # The mask changes nothing. It hides the sum from AMD's compiler, which takes sums apart and
        # forgets what is promised of them: loads and stores would be 2 bytes wide.
        pointer = tl.multiple_of((pointer.to(tl.int64) & -16).to(ptr.dtype), 16)
    return pointer


@triton.jit
def full_blocks_end(end_t, end_s, BLOCK: tl.constexpr):
    """Blocks 1 .. this-1 lie inside both rows."""
    return tl.maximum(tl.minimum(end_t, end_s) // BLOCK, 1)


@triton.jit
def full_end_of(found_end, found_block, BLOCK: tl.constexpr):
    """The end of the full blocks of another kernel, as fp32, in blocks of this one.

    That kernel found its own blocks finite, which may have been narrower; if they were wider,
    several of these lie in its block 0, where anything may stand."""
    found_block = found_block.to(tl.int32)
    found_end = found_end.to(tl.int32)
    full_end = tl.where(found_block <= BLOCK, found_end * found_block // BLOCK, 1)
    return tl.where(found_end == 0, 0, tl.maximum(full_end, 1))


@triton.jit
def edge_block(i, full):
    """The i-th edge block: 0, full, full + 1, ..."""
    return tl.where(i == 0, 0, tl.maximum(full, 1) + i - 1)


@triton.jit
def edge_count(full, blocks):
    """How many edge blocks a row has."""
    return 1 + tl.maximum(blocks - tl.maximum(full, 1), 0)


@triton.jit
def block_pointers(row_ptr, block, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses in a full block; its own is as wide as they are, so that they advance by a
    constant. ALIGNED is that of `row_pointer`."""
    pointers = (row_ptr + tl.arange(0, BLOCK)) + tl.cast(block, tl.int64) * BLOCK
    if ALIGNED:
        # Triton finds this by itself, but for some loops that start at a block found late, as those
        # over the blocks that fill no turn do.
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), BLOCK)
    return pointers


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
        pair = tl.load(block_pointers(words, block, True, BLOCK // 2), eviction_policy=POLICY)
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
        return tl.interleave(low, high)
    pointers = block_pointers(row_ptr, block, ALIGNED, BLOCK)
    return tl.load(pointers, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def load_edge(row_ptr, offsets, lead, end, apart=None):
    """Logits of an edge block, in fp32: -inf outside the row, and at `apart` if that is given."""
    inside = (offsets >= lead) & (offsets < end)
    if apart is not None:
        inside = inside & (offsets != apart)
    return tl.load(row_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def row_max(row, lead, end, BLOCK: tl.constexpr, apart=None):
    """max_i x_i, but for what stands at the offset `apart` where that is given."""
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, end, BLOCK):
        best = tl.maximum(best, load_edge(row, start + columns, lead, end, apart))
    return tl.max(best, axis=0)


@triton.jit
def row_base(row, lead, end, gain, full, BLOCK: tl.constexpr, apart=None):
    """Half the largest logit of a row whose `full` is 0, else 0. It is found anew where it is
    needed: kept, it would take a register in the loops of all other rows. `apart` is that of
    `row_max`; where it leaves nothing, the base is 0."""
    base = 0.0
    if full == 0:
        base = 0.5 * capped(row_max(row, lead, end, BLOCK, apart), gain)
        if apart is not None:
            base = tl.where(base > float("-inf"), base, 0.0)
    return base


@triton.jit
def zero_row(row_ptr, V, BLOCK: tl.constexpr):
    """row = 0."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        zero = tl.zeros((BLOCK,), row_ptr.dtype.element_ty)
        tl.store(row_ptr + start + columns, zero, mask=start + columns < V)
