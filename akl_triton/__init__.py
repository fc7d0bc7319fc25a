"""Distillation losses for language models as fused Triton kernels: adaptive KL and its family,
exact, without a sort and without a probability tensor. See `distillation_loss`."""

from .divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    MixedKL,
    ReverseKL,
    divergence,
)
from .linear_losses import (
    linear_adaptive_kl,
    linear_distillation_loss,
    linear_forward_kl,
    linear_mixed_kl,
    linear_reverse_kl,
)
from .losses import (
    DivergenceStats,
    adaptive_kl,
    distillation_loss,
    forward_kl,
    mixed_kl,
    reverse_kl,
)
from .modules import AdaptiveKLLoss, DistillationLoss, LinearDistillationLoss

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKL",
    "AdaptiveKLLoss",
    "DistillationLoss",
    "Divergence",
    "DivergenceStats",
    "ForwardKL",
    "LinearDistillationLoss",
    "MixedKL",
    "ReverseKL",
    "adaptive_kl",
    "distillation_loss",
    "divergence",
    "forward_kl",
    "linear_adaptive_kl",
    "linear_distillation_loss",
    "linear_forward_kl",
    "linear_mixed_kl",
    "linear_reverse_kl",
    "mixed_kl",
    "reverse_kl",
]
