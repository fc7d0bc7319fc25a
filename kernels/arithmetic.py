"""The arithmetic of one logit: its map, probabilities, and what keeps their rounding harmless.

scaled(x) = log2(e) logit(x) / T - reference        p = 2^scaled(x), up to a factor of the row
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Finite logits so negative that scaling makes them -inf are held here, to keep 0 * u finite.
LOWEST = tl.constexpr(-(2.0**127))
# The largest number of bf16, so that it is finite in every dtype of that range.
LARGEST = tl.constexpr(3.3895313892515355e38)


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


@triton.jit
def next_above(x):
    """The smallest fp32 above x."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 1
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
