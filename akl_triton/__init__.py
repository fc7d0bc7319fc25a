"""Distillation losses for language models as fused Triton kernels: adaptive KL and its family,
exact, without a sort and without a probability tensor. See `distillation_loss`."""

from .divergences import (
    AdaptiveKL,
    Alpha,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    MixedKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SumOfTerms,
    ToDi,
    TotalVariation,
    divergence,
    register,
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
    "Alpha",
    "AlphaBeta",
    "DistillationLoss",
    "Divergence",
    "DivergenceStats",
    "ForwardKL",
    "Jeffreys",
    "JensenShannon",
    "LinearDistillationLoss",
    "MixedKL",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SumOfTerms",
    "ToDi",
    "TotalVariation",
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
    "register",
    "reverse_kl",
]
