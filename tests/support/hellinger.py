"""The device terms of the member that tests/test_register.py adds."""

import triton
import triton.language as tl


@triton.jit
def hellinger(log_p, log_q, u, f_p, f_q, a, b, CAREFUL: tl.constexpr):
    """a (sqrt p - sqrt q)^2"""
    both = tl.exp2(0.5 * (log_p + log_q))
    x = (tl.exp2(log_p) - both) * (a * 1.4426950408889634)
    return x, (tl.exp2(log_q) - both) * (a * 1.4426950408889634)
