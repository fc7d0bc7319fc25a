"""The layout of the fp32 rows that a forward pass writes besides the loss, for both backends.

This file imports nothing, so that it can be read where Triton is not installed.
"""

# The backward's input: lse of the teacher and of the student, the six coefficients of the gradient,
# lse at T = 1 and the coefficient of the cross-entropy, the end of the full blocks and the size of
# a block.
STATE_WIDTH = 12
# The statistics of a token, in the order in which they are stored.
STATISTICS = (
    *("forward_kl", "reverse_kl", "forward_weight", "head_mass", "head_size", "gap"),
    *("student_entropy", "teacher_entropy", "top1_agreement", "cross_entropy"),
)
