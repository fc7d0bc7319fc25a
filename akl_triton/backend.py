"""The two backends behind one contract, and the choice between them.

The name is singular because torch.compile traces no file whose path has ``triton/backends`` in it.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from .divergences import (
    DKD,
    TERMS,
    AdaptiveKL,
    DecoupledKL,
    Divergence,
    EntropySwitch,
    LKHybrid,
    Rule,
    SumOfTerms,
    TwoKL,
)
from .pairs import BackendOfPairs
from .rows import PairState, RowResult
from .vocabulary import BackendOfVocabulary

TRITON, TORCH = "triton", "torch"


class Backend(Protocol):
    """The work of a backend on N = outer * inner rows of logits.

    Shape:
        student [outer, inner, V_s], teacher [outer, inner, V_t], unit stride in V; valid [N] bool,
        or None where every row counts; labels [N] int32 or int64, or None where the loss needs
        none; result as in `RowResult`.
    """

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        result: RowResult,
        *,
        upstream: Tensor | None = None,  # [N] fp32, any stride
        gradient: Tensor | None = None,  # like the student; may be the student
        damped: bool = False,
    ) -> None:
        """Fill `result`, and where they are given write upstream * dloss/dstudent into `gradient`.

        Statistics are left out where `result` has no rows for them. With a gradient the state may
        stay as it is. `damped` divides the gradient of a row by `rows.damping` of its loss."""

    def backward(
        self,
        upstream: Tensor,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        state: Tensor,
        rule: Rule,
        gradient: Tensor,
    ) -> None:
        """Write upstream * dloss/dstudent into `gradient`, from the state that `forward` left."""

    def pairs(
        self,
        student: Tensor,
        ids: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        state: PairState,
        with_stats: bool,
    ) -> None:
        """Fill all of the state but `of_entries`, for ids and teacher of `BackendOfPairs`.

        A row whose ids are not those of tokens, or come twice, is NaN. Entropy and agreement are
        left out without `with_stats`."""

    def pairs_backward(
        self,
        of_pairs: Tensor,
        of_label: Tensor | None,
        student: Tensor,
        ids: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        state: Tensor,
        rule: Rule,
        gradient: Tensor,
    ) -> None:
        """Write the gradient of the logits into `gradient`, which may be the student: from that of
        the entries [N, k + 1], that of the cross-entropy [N], and `PairState.of_pairs`."""

    def rescale(self, rows: Tensor, factor: Tensor) -> None:
        """rows [N, V] *= factor [N], in place."""


class Triton:
    """The kernels: the contract in their launchers' terms."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        result: RowResult,
        *,
        upstream: Tensor | None = None,
        gradient: Tensor | None = None,
        damped: bool = False,
    ) -> None:
        from .kernels import launch

        divergence = rule.divergence
        head = divergence if isinstance(divergence, AdaptiveKL) else AdaptiveKL()
        launch.forward(
            student,
            teacher,
            valid,
            labels,
            result.loss,
            result.state if gradient is None else None,
            result.stats if len(result.stats) else None,
            divergence_weight=rule.divergence_weight,
            label_weight=rule.label_weight,
            tau=divergence.tau if isinstance(divergence, EntropySwitch) else None,
            mu=head.mu,
            inclusive=head.head == "inclusive",
            stable=head.ties == "stable",
            weight=_fixed_weight(divergence),
            **_terms(divergence),
            parts=_parts(divergence),
            gradient=gradient,
            upstream=upstream,
            damped=damped,
            rest=rule.rest,
            **_maps(rule),
        )

    @staticmethod
    def backward(
        upstream: Tensor,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        state: Tensor,
        rule: Rule,
        gradient: Tensor,
    ) -> None:
        from .kernels import launch

        launch.backward(
            gradient,
            student,
            teacher,
            valid,
            labels,
            state,
            upstream,
            label_weight=rule.label_weight,
            weight=_fixed_weight(rule.divergence),
            **_terms(rule.divergence),
            parts=_parts(rule.divergence),
            **_maps(rule),
        )

    @staticmethod
    def pairs(
        student: Tensor,
        ids: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        state: PairState,
        with_stats: bool,
    ) -> None:
        from .kernels import launch

        launch.pairs(
            student,
            ids,
            teacher,
            valid,
            labels,
            state.log_q,
            state.of_pairs,
            state.of_student,
            rest=rule.rest,
            statistics=with_stats,
            **_map_of_student(rule),
        )

    @staticmethod
    def pairs_backward(
        of_pairs: Tensor,
        of_label: Tensor | None,
        student: Tensor,
        ids: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        state: Tensor,
        rule: Rule,
        gradient: Tensor,
    ) -> None:
        from .kernels import launch

        launch.pairs_backward(
            gradient,
            student,
            ids,
            valid,
            labels,
            state,
            of_pairs,
            of_label,
            **_map_of_student(rule),
        )

    @staticmethod
    def rescale(rows: Tensor, factor: Tensor) -> None:
        from .kernels import launch

        launch.rescale(rows, factor)


def _fixed_weight(divergence: Divergence) -> float | None:
    """w of the two KLs; None where each token has its own."""
    return divergence.fixed_weight if isinstance(divergence, TwoKL) else None


def _terms(divergence: Divergence) -> dict[str, Any]:
    """The launchers' arguments of a divergence that is a sum of terms."""
    if not isinstance(divergence, SumOfTerms):
        return {}
    from .kernels import terms

    own = TERMS.get(divergence.name)
    device_function = getattr(terms, divergence.terms) if own is None else own.triton
    if device_function is None:
        raise ValueError(
            f"backend: expected 'torch', as {divergence.name} was registered without triton="
        )
    return {
        "terms": device_function,
        "numbers": divergence.numbers,
        "limits": divergence.limits,
        "eta": divergence.eta if isinstance(divergence, LKHybrid) else None,
    }


def _parts(divergence: Divergence) -> tuple[float, float] | None:
    """The weights of the two parts of a decoupled loss."""
    if isinstance(divergence, (DKD, DecoupledKL)):
        return divergence.alpha, divergence.beta
    return None


def _maps(rule: Rule) -> dict[str, Any]:
    return {
        **_map_of_student(rule),
        "teacher_softcap": rule.teacher_map.softcap,
        "teacher_logit_scale": rule.teacher_map.scale,
    }


def _map_of_student(rule: Rule) -> dict[str, Any]:
    return {
        "temperature": rule.temperature,
        "student_softcap": rule.student_map.softcap,
        "student_logit_scale": rule.student_map.scale,
    }


def backend_of(name: str) -> Backend:
    """The backend of a name that `resolve_backend` gave."""
    if name == TRITON:
        return Triton()
    from . import eager

    return eager


def losses_of(
    name: str, ids: Tensor | None, vocab_size: int | None
) -> Backend | BackendOfPairs | BackendOfVocabulary:
    """The backend of that name for a teacher of pairs, if there are ids, and for a vocabulary that
    is padded, if its size is given."""
    backend: Backend | BackendOfPairs = backend_of(name)
    if ids is not None:
        backend = BackendOfPairs(backend_of(name), ids)
    if vocab_size is None:
        return backend
    return BackendOfVocabulary(backend, vocab_size, of_pairs=ids is not None)


def triton_obstacle(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device; None if they can."""
    try:
        from triton import knobs
        from triton.runtime import driver
    except ImportError:
        return "triton is not installed"
    if knobs.runtime.interpret:
        return None
    try:
        runs_on = driver.active.get_active_torch_device().type
    except RuntimeError:
        return "triton finds no GPU (TRITON_INTERPRET=1 interprets the kernels on CPU tensors)"
    return None if runs_on == device_type else f"triton runs on {runs_on}, not on {device_type}"


def resolve_backend(backend: str, device_type: str) -> str:
    """The backend that `backend` means for tensors of this device; ValueError if it cannot run."""
    if backend == TORCH:
        return TORCH
    obstacle = triton_obstacle(device_type)
    if obstacle is None:
        return TRITON
    if backend == TRITON:
        raise ValueError(f"backend: expected one that can run here, got 'triton', but {obstacle}")
    return TORCH


# torch.compiler.assume_constant_result sets this, too, but imports all of torch._dynamo.
resolve_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
