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
