"""The block and the warps that a vocabulary size gets: the only place that decides them."""

from typing import NamedTuple


class Launch(NamedTuple):
    """Columns per block, and warps per row (one program)."""

    BLOCK: int
    num_warps: int


# (largest V, launch): 8 columns a thread, so that a thread's share of bf16 is one 16-byte access.
TABLE: tuple[tuple[float, Launch], ...] = (
    (256, Launch(256, 1)),
    (1024, Launch(1024, 4)),
    (float("inf"), Launch(2048, 8)),
)

# Registers a thread may have, on NVIDIA: 2, 3, 5, 4 blocks of 8 warps on an SM, and no spills but
# with a softcap a few outside the loops. Left to itself, ptxas takes 170 and one block, or spills
# some to reach more blocks than are asked for.
REGISTERS = {
    "head or statistics": 128,
    "fixed weight": 80,
    "terms": 80,
    "gradient": 48,
    "gradient with a softcap": 64,
    "gradient of terms": 56,
}

# The launches that AKL_AUTOTUNE=1 times.
CANDIDATES: tuple[Launch, ...] = tuple(
    Launch(block, warps) for block in (1024, 2048, 4096) for warps in (4, 8, 16)
)


def launch_for(vocabulary: int) -> Launch:
    """The table's launch for rows of this many columns."""
    return next(launch for largest, launch in TABLE if vocabulary <= largest)
