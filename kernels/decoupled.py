"""The label's token apart from all others, as decoupled knowledge distillation has it.

    P = p_label = 1 / (1 + 2^-odds)     odds = x_label - log2 Z, Z without the label     Q likewise
    target = P ln(P / Q) + (1 - P) ln((1 - P) / (1 - Q))
    loss = alpha target + beta KL(p' || q')       p', q' the distributions of the other tokens

    dloss/ds_label = alpha (Q - P) / T
    dloss/ds_j = (beta (q'_j - p'_j) - alpha (Q - P) q'_j) / T

The KL is that of the statistics, which leave out the label, so that nothing of 1 - P cancels. Where
a side has no other token, or forbids the label, what would be infinite is dropped, as from any KL.
"""

import triton
import triton.language as tl

from .arithmetic import LN2, scaled
from .blocks import row_base
from .cross_entropy import is_token


@triton.jit
def label_apart(
    t_row, s_row, apart, lead, end_t, end_s,
    scale_t, gain_t, scale_s, gain_s, scale_1,  # of `scaled`
    reference_t, z_t, reference_s, z_s, reference_1, z_1, full_end,  # of the other tokens
    UNTEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(target, dtarget/dodds of the student, cross-entropy, 1 - softmax(s)_label at T = 1, the
    three Z), Z as `_side_apart` gives it."""
    odds_t, z_t = _side_apart(
        t_row, apart, lead, end_t, scale_t, gain_t, reference_t, z_t, full_end,
        float("-inf"), BLOCK,
    )  # fmt: skip
    odds_s, z_s = _side_apart(
        s_row, apart, lead, end_s, scale_s, gain_s, reference_s, z_s, full_end,
        float("nan"), BLOCK,
    )  # fmt: skip
    odds_1 = odds_s
    if UNTEMPERED:
        odds_1, z_1 = _side_apart(
            s_row, apart, lead, end_s, scale_1, gain_s, reference_1, z_1, full_end,
            float("nan"), BLOCK,
        )  # fmt: skip
    target, pull = _target_terms(odds_t, odds_s)
    cross_entropy = -LN2 * _log2_sigmoid(odds_1)
    return target, pull, cross_entropy, tl.exp2(_log2_sigmoid(-odds_1)), z_t, z_s, z_1


@triton.jit
def _side_apart(
    row, apart, lead, end,
    scale, gain,  # of `scaled`
    reference, z, full_end,  # of the statistics without the label
    missing,  # what a label behind the end is: -inf, or NaN
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(log-odds of the label, in bits, Z): Z is 1 in place of 0, where there is no other token."""
    logit = tl.load(row + apart, mask=is_token(apart - lead, lead, end), other=missing)
    logit = logit.to(tl.float32)
    base = row_base(row, lead, end, gain, full_end, BLOCK, apart)
    odds = scaled(logit, scale, gain, reference, base) - tl.log2(z)
    alone = tl.where(tl.abs(logit) < float("inf"), float("inf"), float("nan"))
    odds = tl.where(z == 0.0, alone, odds)
    odds = tl.where(logit == float("inf"), float("nan"), odds)
    return odds, tl.where(z == 0.0, 1.0, z)


@triton.jit
def _target_terms(odds_t, odds_s):
    """(target, in nats, and its derivative by the odds of the student, in nats)."""
    log_p, log_q = _log2_sigmoid(odds_t), _log2_sigmoid(odds_s)
    log_not_p, log_not_q = _log2_sigmoid(-odds_t), _log2_sigmoid(-odds_s)
    p = tl.where(odds_s > float("-inf"), tl.exp2(log_p), 0.0)
    not_p = tl.where(odds_s < float("inf"), tl.exp2(log_not_p), 0.0)
    target = tl.where(p > 0.0, p * (log_p - log_q), 0.0)
    target += tl.where(not_p > 0.0, not_p * (log_not_p - log_not_q), 0.0)
    # As it is 0 at least where nothing is dropped.
    target = tl.where((tl.abs(odds_s) < float("inf")) & (target < 0.0), 0.0, target)
    pull = tl.exp2(log_q) * (p + not_p) - p
    known = (odds_t == odds_t) & (odds_s == odds_s)
    return tl.where(known, LN2 * target, float("nan")), tl.where(known, pull, float("nan"))


@triton.jit
def _log2_sigmoid(x):
    """-log2(1 + 2^-x)."""
    return tl.minimum(x, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(x)))
