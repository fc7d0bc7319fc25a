"""Losses of logits that tensor parallelism shards over the vocabulary: ours, and those of others.

A loss is called on every rank of a group with the rank's columns of the student's and the teacher's
logits, the labels of all rows, and the group. Peers are optional; their versions are those of
`bench.inputs.peers.VERSIONS`. Their losses need no more than PyTorch and what they import:

    pip install nvidia-modelopt==0.47.0
    pip install --no-deps megatron-core==0.16.1 nemo-automodel==0.7.0

megatron-core 0.16.1 is the newest for Python 3.11.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import akl_triton
from bench.inputs.peers import OURS, installed, version_obstacle

TOP_K = 1024  # ModelOpt's default

Computes = Literal["adaptive_kl", "forward_kl", "top_k_forward_kl", "cross_entropy"]
Group: TypeAlias = "dist.ProcessGroup"
ShardLoss = Callable[[Tensor, Tensor, Tensor, Group], Tensor]

# Others that are meant for such logits, and why they have no row.
LEFT_OUT = {
    "Fast-LLM": "is not on PyPI",
    "NeMo-RL": "is on PyPI without its losses, as 0.0.0",
    "verl 0.9.1 (`compute_forward_kl_topk`)": "wants Ray, and a teacher of pairs",
    "NeMo AutoModel's `TEParallelCrossEntropy`": "is a Triton kernel, which needs a GPU",
}


@dataclass(frozen=True, slots=True)
class ShardPeer:
    """One way to compute a loss of shards."""

    name: str
    package: str  # the distribution it comes from
    computes: Computes
    # (student [N, V_local], teacher [N, V_local], labels [N], group) to the sum over the rows, a
    # scalar on every rank, differentiable in the rank's own columns of the student's.
    loss: ShardLoss
    # In which the forward and the backward pass have to run.
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    remark: str = ""

    @property
    def is_ours(self) -> bool:
        return self.package == OURS

    @property
    def version(self) -> str | None:
        """The installed version; None if there is none."""
        return installed(self.package)

    def obstacle(self) -> str | None:
        """The reason why it is not measured here; None if it is."""
        return version_obstacle(self.package)


# ---------------------------------------------------------------- ours


def _ours(
    student: Tensor, teacher: Tensor, labels: Tensor, group: Group, *, function: Any, **options: Any
) -> Tensor:
    loss: Tensor = function(student, teacher, labels, group=group, reduction="sum", **options)
    return loss


# ---------------------------------------------------------------- PyTorch


def _loss_parallel() -> contextlib.AbstractContextManager[Any]:
    from torch.distributed.tensor.parallel import loss_parallel

    context: contextlib.AbstractContextManager[Any] = loss_parallel()
    return context


def _of_dtensor(student: Tensor, teacher: Tensor, labels: Tensor, group: Group) -> Tensor:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, student.device.type)
    logits = DTensor.from_local(student, mesh, [Shard(1)])
    loss: Any = F.cross_entropy(logits, labels, reduction="sum")
    local: Tensor = loss.to_local()
    return local


# ---------------------------------------------------------------- Megatron-core and ModelOpt


def _megatron_config(group: Group) -> Any:
    """Megatron's configuration of tensor parallelism over all ranks, which are those of `group`."""
    from megatron.core import ModelParallelConfig, parallel_state

    size = dist.get_world_size(group)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    return ModelParallelConfig(tensor_model_parallel_size=size)


def _megatron(student: Tensor, teacher: Tensor, labels: Tensor, group: Group) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _megatron_config(group)
    # [sequence, batch, vocabulary]
    loss: Tensor = vocab_parallel_cross_entropy(student[:, None], labels[:, None]).sum()
    return loss


def _megatron_fused(student: Tensor, teacher: Tensor, labels: Tensor, group: Group) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    loss: Tensor = fused_vocab_parallel_cross_entropy(
        student[:, None], labels[:, None], group
    ).sum()
    return loss


def _modelopt(
    student: Tensor, teacher: Tensor, labels: Tensor, group: Group, *, name: str, **options: Any
) -> Tensor:
    from modelopt.torch.distill.plugins import megatron

    loss_function = getattr(megatron, name)(_megatron_config(group), **options)
    of_rows, is_part, _ = loss_function(student[:, None], teacher[:, None])
    loss: Tensor = of_rows.sum()
    if is_part:
        # The caller is told to add the ranks' parts up. Megatron-LM does it in place, out of
        # autograd's sight: the gradient of a part is that of the sum.
        dist.all_reduce(loss, group=group)
    return loss


# ---------------------------------------------------------------- NeMo AutoModel


def _automodel(student: Tensor, teacher: Tensor, labels: Tensor, group: Group) -> Tensor:
    from nemo_automodel.components.loss.kd_loss import KDLoss

    loss: Tensor = KDLoss(tp_group=group)(student, teacher, labels, num_batch_labels=1)
    return loss


SHARD_PEERS: tuple[ShardPeer, ...] = (
    ShardPeer(
        *("adaptive_kl", OURS, "adaptive_kl"),
        functools.partial(_ours, function=akl_triton.adaptive_kl),
    ),
    ShardPeer(
        *("forward_kl", OURS, "forward_kl"),
        functools.partial(_ours, function=akl_triton.forward_kl),
    ),
    ShardPeer(
        *("ModelOpt LogitsKLLoss", "nvidia-modelopt", "forward_kl"),
        functools.partial(_modelopt, name="LogitsKLLoss"),
        remark="its parts added up as Megatron-LM does it",
    ),
    ShardPeer("NeMo AutoModel KDLoss", "nemo-automodel", "forward_kl", _automodel),
    ShardPeer(
        *("ModelOpt TopKLogitsKLLoss", "nvidia-modelopt", "top_k_forward_kl"),
        functools.partial(_modelopt, name="TopKLogitsKLLoss", top_k=TOP_K),
        remark="Gloo scatters from each rank in turn where NCCL has one reduce_scatter; of bf16 "
        "logits that tie at the last place it takes others than float64 does",
    ),
    ShardPeer(
        *("forward_kl, kd_ratio=0", OURS, "cross_entropy"),
        functools.partial(_ours, function=akl_triton.forward_kl, kd_ratio=0.0),
    ),
    ShardPeer(
        *("PyTorch loss_parallel", "torch", "cross_entropy"),
        _of_dtensor,
        context=_loss_parallel,
        remark="of bf16 logits its loss is bf16",
    ),
    ShardPeer("Megatron vocab_parallel_cross_entropy", "megatron-core", "cross_entropy", _megatron),
    ShardPeer(
        *("Megatron fused_vocab_parallel_cross_entropy", "megatron-core", "cross_entropy"),
        _megatron_fused,
        context=functools.partial(torch.compiler.set_stance, "force_eager"),
        remark="without its torch.compile; its gradient is rounded to bf16 whatever the logits are",
    ),
)
