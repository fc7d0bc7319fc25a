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
# the pairs do not show. The widths are those of rows, which start on 16 bytes whatever N is.
PAIRS_STATE_WIDTH = 8
OF_STUDENT = ("student_entropy", "top1_agreement", "cross_entropy")
OF_STUDENT_WIDTH = 4
