"""The terms of a divergence: what one entry of the vocabulary adds to the sums of its row.

    terms(log_p, log_q, u, f_p, f_q, a, b, CAREFUL) -> (x, g)      phi = x + g      g = q dphi/dq

    loss = ln 2 sum (x + g)      dloss/ds_j = ln 2 (g_j - q_j G) / T      G = sum g

log_p and log_q are logarithms to base 2, u is their difference, and x and g are in bits. This
function is all the device code that a divergence has of its own. Normalisers are rounded: the
probabilities are f_p 2^log_p and f_q 2^log_q with factors of the row that are close to 1, of which
u is free. The caller multiplies the sums of x by f_p and those of g by f_q, which are left out
where x is proportional to p and g to q. Phi is in normal form: it and its derivative are 0 at
p = q, which adding c (p - q) arranges and which changes nothing, as p and q have the same sum. An
error of a normaliser is then of second order.

CAREFUL marks the code of edge blocks, which is also that of rows at the ends of the fp32 range:
there a term holds what would be infinite, and where a side is -inf (log_p or log_q is LOWEST) it
has the limit of phi and g, if that is finite; the caller drops the entry if it is not.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .arithmetic import LOG2E, LOWEST, held

# A difference of logits is held here where it is squared, so that a row of them has a finite sum.
LARGEST_DIFFERENCE = tl.constexpr(2.0**50)
# A ratio of probabilities beyond 2^126 is as good as none: every term of it has reached its limit.
LARGEST_LOG_RATIO = tl.constexpr(126.0)
LARGEST_LOG = tl.constexpr(2.0**64)
SMALLEST = tl.constexpr(2.0**-100)
STEEP = tl.constexpr(2.0**100)
# Powers of probabilities are held here, so that a row of them has a finite sum.
LARGEST_LOG_POWER = tl.constexpr(100.0)


@triton.constexpr_function
def has_fast_math():
    """Whether log2 and the reciprocal are one instruction that libdevice names: on NVIDIA."""
    from triton import knobs
    from triton.runtime import driver

    return not knobs.runtime.interpret and driver.active.get_current_target().backend == "cuda"


@triton.jit
def careful_terms(
    t, s, log_p, log_q, shift, f_p, f_q, a, b, keep_p, keep_q, TERMS: tl.constexpr
):  # fmt: skip
    """(x, g, u) of entries that may be -inf on a side: x and g are 0 where the limit is infinite,
    and u is held where it is squared."""
    log_p = tl.maximum(log_p, LOWEST)
    log_q = tl.maximum(log_q, LOWEST)
    u = log_p - log_q + shift
    x, g = TERMS(log_p, log_q, u, f_p, f_q, a, b, True)
    counts = tl.where(
        t > float("-inf"),
        (s > float("-inf")) | (keep_p != 0.0),
        (s > float("-inf")) & (keep_q != 0.0),
    )
    return tl.where(counts, x, 0.0), tl.where(counts, g, 0.0), held(u, LARGEST_DIFFERENCE)


@triton.jit
def jensen_shannon(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """a p ln(p/m) + (1 - a) q ln(q/m), m = a p + (1 - a) q"""
    u = _log_ratio(u, CAREFUL)
    log_d = _log2(tl.exp2(u) * a + (1.0 - a))  # log2(m/q)
    return (tl.exp2(log_p) * a) * (u - log_d), (tl.exp2(log_q) * (a - 1.0)) * log_d


@triton.jit
def skew_kl(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """p ln(p/m) - (1 - a) (p - q), m = a p + (1 - a) q"""
    r = tl.exp2(_log_ratio(u, CAREFUL))
    d = r * a + (1.0 - a)  # m/q
    rest = (1.0 - r * _inverse(d)) * LOG2E  # 1 - p/m
    x = tl.exp2(log_p) * (rest * a + (_log_ratio(u, CAREFUL) - _log2(d)))
    return x, (tl.exp2(log_q) * (1.0 - a)) * rest


@triton.jit
def skew_reverse_kl(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """q ln(q/m) + (1 - a) (p - q), m = (1 - a) p + a q"""
    d = tl.exp2(_log_ratio(u, CAREFUL)) * (1.0 - a) + a  # m/q
    rest = (1.0 - _inverse(d)) * LOG2E  # 1 - q/m
    return (tl.exp2(log_p) * (1.0 - a)) * rest, tl.exp2(log_q) * (rest * a - _log2(d))


@triton.jit
def skew_reverse_kl_detached(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """The phi of skew_reverse_kl, its mixture m a constant of the backward pass."""
    q = tl.exp2(log_q)
    log_d = _log2(tl.exp2(_log_ratio(u, CAREFUL)) * (1.0 - a) + a)
    return (tl.exp2(log_p) - (f_q / f_p) * q) * ((1.0 - a) * LOG2E), -q * log_d


@triton.jit
def total_variation(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """max(p - q, 0), which is half of |p - q| but for half of p - q"""
    share = tl.clamp(u * STEEP + 0.5, 0.0, 1.0) * LOG2E  # 1 where p > q, 1/2 where they are equal
    return tl.exp2(log_p) * share, -(tl.exp2(log_q) * share)


@triton.jit
def alpha(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """(p^a q^(1-a) - a p - (1-a) q) / (a (a-1))"""
    log_p = _moderate(log_p, CAREFUL)
    log_q = _moderate(log_q, CAREFUL)
    u = _moderate(u, CAREFUL)
    log_power = log_q + u * a
    if CAREFUL:  # from the larger of the two, whose logarithm has the smaller rounding
        log_power = tl.where(u > 0.0, log_p + tl.log2(f_p / f_q) + u * (a - 1.0), log_power)
    power = _power(log_power, CAREFUL)
    x = (tl.exp2(log_p) - (f_q / f_p) * power) * (LOG2E / (1.0 - a))
    return x, (tl.exp2(log_q) - power) * (LOG2E / a)


@triton.jit
def alpha_beta(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """(a p^l + b q^l - l p^a q^b) / (a b l), l = a + b"""
    total = a + b
    ratio = f_q / f_p
    k_p = tl.exp2((total - 1.0) * tl.log2(f_p))
    k_q = tl.exp2((total - 1.0) * tl.log2(f_q))
    log_p = _moderate(log_p, CAREFUL) * total
    log_q = _moderate(log_q, CAREFUL) * total
    power = _power(log_q + _moderate(u, CAREFUL) * a, CAREFUL)
    # By Euler: phi is homogeneous of degree l, so that l phi = h + g with h = p dphi/dp.
    h = (_power(log_p, CAREFUL) * k_p - power * (k_q * ratio)) * (LOG2E / b)
    g = (_power(log_q, CAREFUL) - power) * (k_q * LOG2E / a)
    return (h + g * (ratio * (1.0 - total))) * (1.0 / total), g


@triton.jit
def todi(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """(p - q) ln(p/q), its KLs weighted by constants of the backward pass: see g"""
    p = tl.exp2(log_p) * (f_p / f_q)
    q = tl.exp2(log_q)
    both = p + q
    if CAREFUL:
        both = tl.maximum(both, SMALLEST)
    more = p - q
    less = more * LOG2E + u * (q * (q * _inverse(both)))  # -g
    return (f_q / f_p) * (less + u * more), -less


@triton.jit
def jeffreys(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """(p - q) ln(p/q)"""
    p = tl.exp2(log_p)
    q = tl.exp2(log_q)
    return p * u + (p - (f_q / f_p) * q) * LOG2E, (q - (f_p / f_q) * p) * LOG2E - q * u


@triton.jit
def moments(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """(w, w u), w = p^a up to a factor of the row: no x and g, but what gives mean and variance."""
    if CAREFUL:
        u = held(u, LARGEST_DIFFERENCE)
    w = tl.exp2(log_p * a)
    return w, w * u


@triton.jit
def log_ratio(t, s, log_p, log_q, scale, lse_t, lse_s, shift, ONE_SCALE: tl.constexpr):
    """u of finite logits. With one scale for both sides and no softcap they are subtracted before
    they are rounded: exact where they are close, and g needs no log_p."""
    if ONE_SCALE:
        return tl.fma(t - s, scale, shift - (lse_t - lse_s))
    else:
        return log_p - log_q + shift


@triton.jit
def _log_ratio(u, CAREFUL: tl.constexpr):
    """u, where it may be large held at the ratio's bounds."""
    if CAREFUL:
        u = tl.minimum(tl.maximum(u, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO)
    return u


@triton.jit
def _moderate(log, CAREFUL: tl.constexpr):
    """A logarithm, where it may be large held at what no power of it needs: its sums are finite."""
    if CAREFUL:
        log = tl.minimum(tl.maximum(log, -LARGEST_LOG), LARGEST_LOG)
    return log


@triton.jit
def _power(log, CAREFUL: tl.constexpr):
    """2^log, where it may be large held."""
    if CAREFUL:
        log = tl.minimum(log, LARGEST_LOG_POWER)
    return tl.exp2(log)


@triton.jit
def _log2(x):
    if has_fast_math():
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def _inverse(x):
    if has_fast_math():
        # Bare: libdevice's division scales what is large or small, in four instructions more.
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x
