"""The losses with which ours is compared, as rows of one table.

Each row says what it computes: a kernel that gives the forward KL alone does less than AKL, and is
to be compared with our ``forward_kl``. Peers are optional, and are looked up when they are asked
for. The launch settings below are those of the versions in ``VERSIONS``:

    pip install liger-kernel==0.8.5
    pip install --no-deps speculators==0.9.0    # its losses need no more than transformers

Where Triton's kernels run on CPU tensors (``ptxcpu`` and ``record_launches`` in bench/lab), so do
those of the peers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import akl_triton
from akl_triton.backend import triton_obstacle
from akl_triton.reference import authors_adaptive_kl

Divergence = Literal["adaptive_kl", "forward_kl", "reverse_kl", "jsd"]
Kind = Literal["triton", "eager", "compiled"]
Loss = Callable[[Tensor, Tensor], Tensor]

OURS = "akl-triton"
VERSIONS = {
    "liger-kernel": "0.8.5",
    "megatron-core": "0.16.1",
    "nemo-automodel": "0.7.0",
    "nvidia-modelopt": "0.47.0",
    "speculators": "0.9.0",
    "trl": "1.16.0",
}


def installed(package: str) -> str | None:
    """The installed version of a distribution; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_obstacle(package: str) -> str | None:
    """The reason why figures would not be those of the measured version; None if they would be."""
    wanted, found = VERSIONS.get(package), installed(package)
    if wanted is None or found == wanted:
        return None
    return f"{package} {wanted} is measured, {found or 'none'} is installed"


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to compute a loss."""

    name: str
    package: str  # the distribution it comes from
    computes: Divergence
    kind: Kind
    # (student_logits [N, V], teacher_logits [N, V]) to the mean over rows, a scalar, differentiable
    # in the student's logits.
    loss: Loss

    @property
    def is_ours(self) -> bool:
        return self.package == OURS

    @property
    def version(self) -> str | None:
        """The installed version; None if there is none."""
        return installed(self.package)

    def obstacle(self, device: torch.device | str) -> str | None:
        """The reason why it cannot run on tensors of this device; None if it can."""
        obstacle = version_obstacle(self.package)
        if obstacle is None and self.kind == "triton":
            obstacle = triton_obstacle(torch.device(device).type)
        return obstacle


def runnable(device: torch.device | str) -> list[Peer]:
    """The rows of the table that can run on this device."""
    return [peer for peer in PEERS if peer.obstacle(device) is None]


# ---------------------------------------------------------------- plain PyTorch


def eager_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as most training code writes it."""
    log_q = F.log_softmax(student, dim=-1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, dim=-1, dtype=torch.float32)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@functools.cache
def _compiled(loss: Loss) -> Loss:
    compiled: Loss = torch.compile(loss)
    return compiled


def _compile(loss: Loss) -> Loss:
    """The loss under torch.compile, which is imported when it is first called."""

    @functools.wraps(loss)
    def run(student: Tensor, teacher: Tensor) -> Tensor:
        return _compiled(loss)(student, teacher)

    return run


# ---------------------------------------------------------------- Liger-Kernel


def _liger_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The KL of log-probabilities, which must be made first; they are fp32, as those in bf16 are
    off by 3 %."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_q = F.log_softmax(student, dim=-1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, dim=-1, dtype=torch.float32)
    loss: Tensor = LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p)
    return loss


def _liger_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers.jsd import LigerJSD

    log_q = F.log_softmax(student, dim=-1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, dim=-1, dtype=torch.float32)
    loss: Tensor = LigerJSD()(log_q, log_p)
    return loss


# ---------------------------------------------------------------- speculators


# The choice of its autotuner on an A100, according to the comment over _MAX_ELEMS_PER_THREAD of
# speculators/losses/fused.py: (largest V, block, warps). A GPU times the candidates itself.
SPECULATORS_TILES = ((65_536, 16_384, 16), (sys.maxsize, 8_192, 8))


@functools.cache
def speculators_losses() -> ModuleType:
    """The module speculators.losses.fused, without the package around it.

    Importing the package brings in its training and data code, and with that openai, datasets and
    more, none of which the losses use.
    """
    if "speculators" not in sys.modules:
        spec = importlib.util.find_spec("speculators")
        if spec is None:
            raise ModuleNotFoundError("speculators is not installed", name="speculators")
        for name, path in (
            ("speculators", spec.submodule_search_locations),
            ("speculators.utils", [f"{p}/utils" for p in spec.submodule_search_locations or ()]),
            ("speculators.losses", [f"{p}/losses" for p in spec.submodule_search_locations or ()]),
        ):
            package = importlib.machinery.ModuleSpec(name, None, is_package=True)
            package.submodule_search_locations = list(path or ())
            sys.modules[name] = importlib.util.module_from_spec(package)
    fused = importlib.import_module("speculators.losses.fused")
    for kernel in (fused.loss_forward_kernel, fused.loss_backward_kernel):
        kernel.candidates = list(kernel.configs)
    return fused


def speculators_tile(vocabulary: int) -> tuple[int, int]:
    """(block, warps) from SPECULATORS_TILES, with a block no wider than the row needs."""
    import triton

    block, warps = next((b, w) for largest, b, w in SPECULATORS_TILES if vocabulary <= largest)
    return min(block, max(triton.next_power_of_2(vocabulary), 512)), warps


def _speculators(name: str) -> Loss:
    def run(student: Tensor, teacher: Tensor) -> Tensor:
        import triton

        fused = speculators_losses()
        block, warps = speculators_tile(student.shape[-1])
        as_on_a100 = [triton.Config({"BLOCK_SIZE": block}, num_warps=warps)]
        for kernel in (fused.loss_forward_kernel, fused.loss_backward_kernel):
            # Without a GPU there is nothing to time: a choice by CPU time would mean nothing.
            kernel.configs = kernel.candidates if student.device.type != "cpu" else as_on_a100
        loss: Tensor = getattr(fused, name)(student[None], teacher[None]).mean()
        return loss

    return run


# ---------------------------------------------------------------- ours


def _ours(function: Any) -> Loss:
    def run(student: Tensor, teacher: Tensor) -> Tensor:
        loss: Tensor = function(student, teacher, backend="triton")
        return loss

    return run


PEERS: tuple[Peer, ...] = (
    Peer("adaptive_kl", OURS, "adaptive_kl", "triton", _ours(akl_triton.adaptive_kl)),
    Peer("forward_kl", OURS, "forward_kl", "triton", _ours(akl_triton.forward_kl)),
    Peer("reverse_kl", OURS, "reverse_kl", "triton", _ours(akl_triton.reverse_kl)),
    Peer("authors, eager", "torch", "adaptive_kl", "eager", authors_adaptive_kl),
    Peer("authors, compiled", "torch", "adaptive_kl", "compiled", _compile(authors_adaptive_kl)),
    Peer("PyTorch, eager", "torch", "forward_kl", "eager", eager_forward_kl),
    Peer("PyTorch, compiled", "torch", "forward_kl", "compiled", _compile(eager_forward_kl)),
    Peer("LigerKLDIVLoss", "liger-kernel", "forward_kl", "triton", _liger_forward_kl),
    Peer("LigerJSD", "liger-kernel", "jsd", "triton", _liger_jsd),
    Peer(
        *("speculators kl_div", "speculators", "forward_kl", "triton"),
        _speculators("fused_kl_div_loss"),
    ),
    Peer(
        *("speculators rkl", "speculators", "reverse_kl", "triton"),
        _speculators("fused_reverse_kl_div_loss"),
    ),
    Peer(
        *("speculators jsd", "speculators", "jsd", "triton"),
        _speculators("fused_js_div_loss"),
    ),
)
