"""Cross-entropy of the student at T = 1 with the labels, from the sums of the statistics.

    cross_entropy = -ln softmax(s)_label = ln 2 (log2 Z - x_label)       Z and x are those of T = 1

Its gradient is softmax(s)_j - [j = label]: a part of each token's own coefficient where T = 1, and
one entry that is written apart (see gradient.py).
"""

import triton
import triton.language as tl

from .arithmetic import LN2, scaled
from .blocks import row_base


@triton.jit
def is_token(label, lead, end_s):
    """Whether the label is one of the student's vocabulary."""
    return (label >= 0) & (label < end_s - lead)


@triton.jit
def row_cross_entropy(
    s_row, label, lead, end_s,
    scale, gain,  # of `scaled`
    reference, z, full_end,  # of the statistics
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In nats; NaN where the label is no token."""
    s = tl.load(s_row + (lead + label), mask=is_token(label, lead, end_s), other=float("nan"))
    base = row_base(s_row, lead, end_s, gain, full_end, BLOCK)
    return LN2 * (tl.log2(z) - scaled(s.to(tl.float32), scale, gain, reference, base))
