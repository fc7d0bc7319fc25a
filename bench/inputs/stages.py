"""The stages of a row in our kernels, and the kernels that a call launches.

A stage stands in results and tables by its name.
"""

from __future__ import annotations

STATISTICS, BOUNDARY = "statistics", "boundary"
DIVERGENCE, GRADIENT = "divergence", "gradient"
# The part of the boundary that searches for the cut in a group of ties; it has no exps.
CUT = "cut"
# A loop of a peer that computes both loss and gradient.
DIVERGENCE_AND_GRADIENT = "divergence and gradient"

# The device functions of a stage, of which a kernel has one, and the logits that it reads per
# position.
FUNCTIONS = {
    STATISTICS: ("row_statistics",),
    BOUNDARY: ("head_boundary",),
    DIVERGENCE: ("row_divergence",),
    GRADIENT: ("row_gradient",),
}
READS = {STATISTICS: 2, BOUNDARY: 1, DIVERGENCE: 2, GRADIENT: 2}
# These sweep a row as often as its logits require, or never; the others sweep it once.
SEARCHES = (BOUNDARY, CUT)

# Which kernels a call launches, in order. The first two are what a loss with its backward launches.
SEPARATE = ("forward", "backward")
IN_ONE = ("forward with gradient",)
# The stages that sweep a row in each kernel, except for the searches. KLs of fixed weights need no
# sweep of the divergence.
SWEEPS = {
    "forward": (STATISTICS, DIVERGENCE),
    "backward": (GRADIENT,),
    "forward with gradient": (STATISTICS, DIVERGENCE, GRADIENT),
}
