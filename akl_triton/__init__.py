"""Adaptive KL distillation (arXiv 2404.02657) as fused Triton kernels: exact, without a sort and
without a probability tensor. See `adaptive_kl`."""

from .functional import DivergenceStats, adaptive_kl, forward_kl, mixed_kl, reverse_kl
from .linear import linear_adaptive_kl, linear_forward_kl, linear_mixed_kl, linear_reverse_kl
from .modules import (
    AdaptiveKLLoss,
    ForwardKLLoss,
    LinearAdaptiveKLLoss,
    LinearForwardKLLoss,
    LinearMixedKLLoss,
    LinearReverseKLLoss,
    MixedKLLoss,
    ReverseKLLoss,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLLoss",
    "DivergenceStats",
    "ForwardKLLoss",
    "LinearAdaptiveKLLoss",
    "LinearForwardKLLoss",
    "LinearMixedKLLoss",
    "LinearReverseKLLoss",
    "MixedKLLoss",
    "ReverseKLLoss",
    "adaptive_kl",
    "forward_kl",
    "linear_adaptive_kl",
    "linear_forward_kl",
    "linear_mixed_kl",
    "linear_reverse_kl",
    "mixed_kl",
    "reverse_kl",
]
