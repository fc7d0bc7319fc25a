"""The two backends behind one contract, and the choice between them.

The name is singular because torch.compile traces no file whose path has ``triton/backends`` in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
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
from .kernels.layout import (
    LARGEST_LOGIT,
    SHARD_HEAD_WIDTH,
    SHARD_PIVOTS,
    SHARD_STATISTICS,
    SHARD_SUMS,
)
from .pairs import BackendOfPairs
from .rows import PairState, RowResult
from .shard_maps import in_bits
from .vocabulary import BackendOfVocabulary

if TYPE_CHECKING:
    from .shard_pairs import BackendOfShardedPairs
    from .shards import BackendOfShards

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


class ShardSweeps(Protocol):
    """The work of a backend on a shard of the vocabulary: the sums of its columns of every row.

    Shape:
        logits, valid and labels as for `Backend`; a label that is no token of the shard is -1.
        A shard may have no columns, and nothing finite on a side: that is no error of the row.
    """

    def statistics(
        self,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        with_stats: bool,
    ) -> tuple[Tensor, Tensor]:
        """([N, W] fp32, blocks): layout.SHARD_STATISTICS, and for `AdaptiveKL` what finds a head.

        Rows that are not valid are 0. Columns that the rule does not need are anything finite.
        Blocks [N, 2] fp32 are what the backend notes for `sums` and `gradient`."""

    def masses(self, teacher: Tensor, rows: Tensor, asked: Tensor, rule: Rule) -> Tensor:
        """[M, SHARD_PIVOTS + 2] fp32 of the rows [M] int64: the masses 2^(x - reference) at or
        above each pivot, the largest logit below `high`, the smallest at or above `low`.

        asked [M, SHARD_PIVOTS + 3] fp32: the pivots, which are logits, reference, low and high."""

    def sums(
        self,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        rule: Rule,
        softmaxes: Tensor,
        boundary: Tensor | None,
        blocks: Tensor,
        with_stats: bool,
    ) -> Tensor:
        """[N, 6] fp32: layout.SHARD_SUMS, which with the softmaxes of all shards are additive, but
        for the last two of `DecoupledKL`, which are mean and variance of u - pivot.

        softmaxes [N, 5] fp32: reference_t, z_t, reference_s, z_s, pivot; boundary [N, 3] fp32 of
        `AdaptiveKL`: crossing, how many of this shard's ties are taken, how many there are."""

    def gradient(
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
        """Write upstream * dloss/dstudent into `gradient`, which may be the student, from the state
        that `layout` describes, of the softmaxes of all shards."""

    def pair_masses(self, state: PairState, rule: Rule) -> Tensor:
        """[N, 3] fp64: log2 of the sums of e^logit over the shard that `Backend.pairs` has noted:
        of all tokens, of those that are no pair, and of all tokens at T = 1; -inf where it has
        none. Without labels the last is anything."""

    def set_pair_masses(self, state: PairState, masses: Tensor, rule: Rule) -> None:
        """Make the state that `Backend.pairs` has left for this shard one for its gradient, from
        those of all tokens [N, 3]."""


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


class TritonShards:
    """`ShardSweeps` by the kernels."""

    @staticmethod
    def statistics(
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        labels: Tensor | None,
        rule: Rule,
        with_stats: bool,
    ) -> tuple[Tensor, Tensor]:
        from .kernels import launch

        divergence, n = rule.divergence, student.shape[0] * student.shape[1]
        mu = divergence.mu if isinstance(divergence, AdaptiveKL) else None
        width = len(SHARD_STATISTICS) + (0 if mu is None else SHARD_HEAD_WIDTH)
        out = torch.empty(n, width, dtype=torch.float32, device=student.device)
        blocks = out.new_empty(n, 2)
        launch.shard_statistics(
            student,
            teacher,
            valid,
            labels,
            out,
            blocks,
            mu=mu,
            statistics=with_stats,
            entropy=isinstance(divergence, EntropySwitch),
            kls=wanted_kls(divergence, with_stats),
            apart=isinstance(divergence, DKD),
            **_maps(rule),
        )
        return out, blocks

    @staticmethod
    def masses(teacher: Tensor, rows: Tensor, asked: Tensor, rule: Rule) -> Tensor:
        from .kernels import launch

        out = asked.new_empty(asked.shape[0], SHARD_PIVOTS + 2)
        launch.shard_masses(
            teacher,
            rows,
            asked,
            out,
            temperature=rule.temperature,
            teacher_softcap=rule.teacher_map.softcap,
            teacher_logit_scale=rule.teacher_map.scale,
        )
        return out

    @staticmethod
    def sums(
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        rule: Rule,
        softmaxes: Tensor,
        boundary: Tensor | None,
        blocks: Tensor,
        with_stats: bool,
    ) -> Tensor:
        from .kernels import launch

        divergence = rule.divergence
        out = softmaxes.new_empty(softmaxes.shape[0], len(SHARD_SUMS))
        launch.shard_sums(
            student,
            teacher,
            valid,
            softmaxes,
            boundary,
            blocks,
            out,
            stable=isinstance(divergence, AdaptiveKL) and divergence.ties == "stable",
            statistics=with_stats,
            **_terms(divergence),
            parts=_parts(divergence),
            **_maps(rule),
        )
        return out

    gradient = staticmethod(Triton.backward)

    @staticmethod
    def pair_masses(state: PairState, rule: Rule) -> Tensor:
        lse_rest, of_rest, lse_1, _, has_reference, lse, of_all, of_1 = (
            state.of_pairs.double().unbind(1)
        )
        largest = state.of_student[:, LARGEST_LOGIT]
        masses = []
        for lse_of, factor, temperature in (
            (lse, of_all, rule.temperature),
            (lse_rest, of_rest, rule.temperature),
            (lse_1, of_1, 1.0),
        ):
            # A row that has a base has it in place of a reference: see blocks.py of the kernels.
            base = in_bits(largest, rule.student_map, temperature)
            mass = lse_of - factor.log2() + torch.where(has_reference == 0.0, base, 0.0)
            masses.append(mass.masked_fill((factor == 0.0) | (largest == -torch.inf), -torch.inf))
        return torch.stack(masses, 1)

    @staticmethod
    def set_pair_masses(state: PairState, masses: Tensor, rule: Rule) -> None:
        lse, lse_rest, lse_1 = masses.unbind(1)
        some = lse_rest != -torch.inf
        lse_rest = lse_rest.where(some, lse)
        # What each loses when it is rounded is a factor; no row has a base any more.
        of_rest, of_1 = ((x.float() - x).exp2() for x in (lse_rest, lse_1))
        columns = lse_rest, of_rest.where(some, 0.0), lse_1, of_1, torch.ones_like(lse)
        state.of_pairs.zero_()[:, : len(columns)] = torch.stack(columns, 1)


def wanted_kls(divergence: Divergence, with_stats: bool) -> tuple[bool, bool]:
    """Whether a loss needs the forward KL of a row, and the reverse one."""
    if with_stats:
        return True, True
    if isinstance(divergence, TwoKL):
        return divergence.fixed_weight != 0.0, divergence.fixed_weight != 1.0
    return isinstance(divergence, (LKHybrid, DecoupledKL)), False


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


def shard_sweeps_of(name: str) -> ShardSweeps:
    """The same backend's work on a shard of the vocabulary."""
    if name == TRITON:
        return TritonShards()
    from . import eager_shards

    return eager_shards


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


def shard_losses_of(
    name: str, ids: Tensor | None, vocab_size: int | None, shards: Tensor, group: str
) -> BackendOfShards | BackendOfShardedPairs:
    """The same where the vocabulary is sharded over a group, with the widths [R, 2] of the shards
    of all its ranks."""
    from .exchange import group_of
    from .shard_pairs import BackendOfShardedPairs
    from .shards import BackendOfShards, Shards

    own = Shards.of(shards, group_of(group).rank(), vocab_size)
    if ids is not None:
        return BackendOfShardedPairs(name, own, group, ids)
    return BackendOfShards(name, own, group)


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
