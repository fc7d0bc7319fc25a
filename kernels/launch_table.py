"""The launch that a kernel and a vocabulary size get: the only place that decides it."""

from typing import NamedTuple


class Launch(NamedTuple):
    """Columns per block, threads per row (one program; warps have 32 of them on NVIDIA, 64 on AMD's
    data centre GPUs), and the most registers that a thread may have, which only NVIDIA's compiler
    can be told."""

    BLOCK: int
    threads: int
    registers: int

    def __str__(self) -> str:
        return f"BLOCK = {self.BLOCK}, {self.threads} threads, {self.registers} registers"


# Up to this V, two row pairs an SM of an A100, H100, B200 or RTX 4090 stay in its L2 between their
# sweeps (`python -m bench l2`). Of longer rows only one does: kernels with several sweeps then have
# one block an SM, of 512 threads, each of which may have 128 registers.
LARGEST_OF_TWO = 65_536
REGISTERS = 65_536  # of an SM


def _by_vocabulary(
    registers: int, of_long_rows: int | None = None
) -> tuple[tuple[float, Launch], ...]:
    """(largest V, launch): 8 columns a thread, so that its share of bf16 is one 16-byte access."""
    short = (256, Launch(256, 32, registers)), (1024, Launch(1024, 128, registers))
    if of_long_rows is None:
        return (*short, (float("inf"), Launch(2048, 256, registers)))
    return (
        *short,
        (LARGEST_OF_TWO, Launch(2048, 256, registers)),
        (float("inf"), Launch(4096, 512, of_long_rows)),
    )


# The limits on registers leave room for 2, 3, 3, 4, 4, 4 blocks of 256 threads an SM. By itself,
# ptxas takes 170 and one block, or spills some to reach more blocks than are asked for. A gradient
# has the block of its forward: a narrower one knows too little of what that found.
TABLE = {
    "head or statistics": _by_vocabulary(128, 128),
    "fixed weight": _by_vocabulary(80, 128),
    "terms": _by_vocabulary(80, 128),
    "gradient": _by_vocabulary(56, 56),
    "gradient with a softcap": _by_vocabulary(64, 64),
    "gradient of terms": _by_vocabulary(56, 56),
    # A sweep each, and nothing that has to stay in the L2.
    "pairs": _by_vocabulary(80),
    "gradient of pairs": _by_vocabulary(80),
    # As many sums as there are pivots, in registers: 4 columns a thread.
    "masses": (
        (128, Launch(128, 32, 128)),
        (float("inf"), Launch(1024, 256, 128)),
    ),
    # Rows that are short, so that registers are plenty.
    "entries of pairs": _by_vocabulary(168),
}


def launch_for(kernel: str, vocabulary: int) -> Launch:
    """The launch of a kernel, named in TABLE, for rows of this many columns."""
    return next(launch for largest, launch in TABLE[kernel] if vocabulary <= largest)


def candidates(kernel: str) -> tuple[Launch, ...]:
    """The launches that are worth timing: 4 or 8 columns a thread, as more would not fit into the
    registers, and fewer leave loads of less than 8 bytes in bf16."""
    registers = launch_for(kernel, 2048).registers
    shapes = ((1024, 128), (1024, 256), (2048, 256), (2048, 512))
    fewer = (Launch(2048, 256, 48), Launch(2048, 256, 40)) if kernel == "gradient" else ()
    longest = launch_for(kernel, LARGEST_OF_TWO + 1)
    wide = (Launch(b, n, min(registers, REGISTERS // n)) for b, n in shapes)
    launches = (*wide, *fewer, longest)
    return tuple(dict.fromkeys(launches))
