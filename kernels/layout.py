"""The layout of the fp32 rows that a forward pass writes besides the loss, for both backends.

This file imports nothing, so that it can be read where Triton is not installed.
"""

# The backward's input: lse of the teacher, of the student and of the student at T = 1, the
# coefficient of the cross-entropy, the end of the full blocks, the size of a block, and the
# coefficients of the gradient.
COEFFICIENTS = 6
STATE_WIDTH = 6 + COEFFICIENTS
# The statistics of a token, in the order in which they are stored.
STATISTICS = (
    *("forward_kl", "reverse_kl", "forward_weight", "head_mass", "head_size", "gap"),
    *("student_entropy", "teacher_entropy", "top1_agreement", "cross_entropy"),
)

# The id of a pair that is not there, behind those that are.
ABSENT = 2**31 - 1
# The backward's input of a teacher of pairs: lse of the tokens that are no pair, and a factor of
# their exponentials, likewise of all tokens at T = 1, and what a backend adds. The statistics that
# the pairs do not show; the largest logit is behind them. The widths are those of rows, which start
# on 16 bytes whatever N is.
PAIRS_STATE_WIDTH = 8
OF_STUDENT = ("student_entropy", "top1_agreement", "cross_entropy")
OF_STUDENT_WIDTH = 4
LARGEST_LOGIT = len(OF_STUDENT)

# What a rank says of its shard of a row before any is known of the others: see shards.py of the
# kernels. x is a logit as its map gives it, in bits: Z = sum 2^(x - reference), in whose units the
# KLs and entropies are those of the shard's own softmax; the logits are as the models give them.
SHARD_STATISTICS = (
    *("reference_t", "z_t", "reference_s", "z_s", "reference_1", "z_1"),
    *("forward_kl", "reverse_kl", "kept_p", "kept_q", "entropy_t", "entropy_s"),
    *("agreement", "top_t", "top_s", "label_t", "label_s"),
)
# What else, of the teacher, finds a head: the key from which on all tokens are among the
# candidates, as bits; the heaviest tokens, -inf where there are no more; and about the mass that is
# above the shard's top less 1, 2, 3, ... strides, in bits, as a share of the shard's.
SHARD_CANDIDATES, SHARD_BINS, SHARD_STRIDE = 8, 16, 1.0
SHARD_HEAD_WIDTH = 1 + SHARD_CANDIDATES + SHARD_BINS
# Keys whose masses are asked for at once while a boundary is looked for.
SHARD_PIVOTS = 16
# A reference is held between these: a shard beyond them has no mass, or no softmax.
LARGEST_REFERENCE = 2.0**28
# What a rank sums over its shard once the softmax of all is known.
SHARD_SUMS = ("gap", "head_gap", "head_size", "total_x", "total_g", "variance")
