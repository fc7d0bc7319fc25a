"""ptxcpu: execute the PTX that Triton compiles on a CPU, counting what it does.

    import torch
    from bench.lab import ptxcpu

    with ptxcpu.active(arch=90, sched=1) as counters:
        softmax_kernel[(rows,)](x, y, columns, BLOCK=1024, num_warps=8)  # CPU tensors
    print(counters["softmax_kernel"]["gld_bytes"])

Launches work unchanged: autotuned kernels, autograd functions, custom ops.  See README.md.
"""

from .driver import Counters, CpuDriver, Launch, active, install, uninstall
from .execute import Executable, Range, load
from .memory import virtual_tensor
from .parse import PtxError

__all__ = [
    "Counters",
    "CpuDriver",
    "Executable",
    "Launch",
    "PtxError",
    "Range",
    "active",
    "install",
    "load",
    "uninstall",
    "virtual_tensor",
]
