"""The layout of the fp32 rows that a forward pass writes besides the loss, for both backends.

This file imports nothing, so that it can be read where Triton is not installed.
"""

# The backward's input: lse of the teacher and of the student, the four coefficients of the
# gradient, the end of the full blocks and the size of a block.
STATE_WIDTH = 8
# The statistics of a token, in the order in which they are stored.
STATISTICS = ("forward_kl", "reverse_kl", "forward_weight", "head_mass", "head_size", "gap")
