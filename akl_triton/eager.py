"""The family in plain PyTorch: the backend for CPU, MPS and wherever Triton is not.

Rows are taken a few at a time through a handful of fp32 work spaces that stay in the cache
(eager_chunks.py), so nothing of the logits' size is ever allocated. A thread takes whole rows, so
that no two threads ever wait for each other (workers.py). The sums and the gradient of a chunk are
those of eager_kls.py or eager_terms.py; the head is found in eager_head.py, eager_labels.py has
what labels add, and eager_pairs.py the student's side of a teacher that is pairs.

Every result is the same for any number of threads, and finite where the logits are. What would not
be finite in fp32 is held: |ln p - ln q| at `LARGEST_U`, a gradient at the largest number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import workers
from .divergences import DKD, AdaptiveKL, ForwardKL, Rule, TwoKL
from .eager_chunks import (
    LARGEST,
    Rows,
    below_maximum,
    exponentials,
    rate_of,
    rescaled,
    softcap_slope,
    sync_is_free,
    wanted_by_any,
)
from .eager_kls import (
    KLSlope,
    held_nats,
    kl_divergence,
    kl_gradient,
    reverse_weight,
    statistics_of_sides,
)
from .eager_labels import (
    CrossEntropy,
    add_label_gradient,
    cross_entropy_of,
    label_apart,
    leave_out,
    log_odds,
    put,
    row_cross_entropy,
    softmax_of_labels,
    target_terms,
)
from .eager_pairs import entries_of_pairs, gradient_of_pairs
from .eager_terms import (
    TermsSlope,
    entries_of,
    mix_forward_kl,
    sums_of_terms,
    terms_divergence,
    terms_gradient,
    terms_stats,
)
from .rows import PairState, RowResult, blocks, damping

# Budget for the temporaries of a call; at least one row is taken.
TEMPORARY_BYTES = 64 * 2**20
_CHUNK_BYTES = 16 * 2**20  # of that for a thread of a CPU, whose work spaces stay near its cache
_SMALL_CHUNK = 2**16  # logits in one of them where rows are too few to occupy `_FEW` threads
_FEW = 8


class _Needs(NamedTuple):
    """Temporaries of a chunk: fp32 work spaces, and bytes per logit of all there is at worst."""

    spaces: int
    bytes: int


_OF_PAIRS = _Needs(3, 24)
_OF_TWO_KL = _Needs(4, 36)  # besides the spaces, masks and copies of rows that are scattered
_OF_OTHERS = _Needs(6, 64)  # also what terms are made of, or a sort and its fp64 sums


class _Made(NamedTuple):
    """What a forward pass makes of R rows."""

    loss: Tensor  # [R, 1]
    state: tuple[Tensor, ...]  # each [R, 1]
    stats: tuple[Tensor, ...]  # each [R, 1], or none
    gradient: Callable[[], Tensor]  # dloss/dstudent [R, V_s], asked for no more than once


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
    """`backend.Backend.forward`, where logits may also be [N, V].

    With a fixed weight there is no head: head_mass and head_size are then NaN. A sum of terms has
    no weight either."""
    student, teacher = _merged(student), _merged(teacher)
    cross_entropy, rule = cross_entropy_of(labels, rule), rescaled(rule)
    by_row = None if gradient is None else _merged(gradient)
    with_stats = len(result.stats) > 0

    def work(rows: Rows, spaces: Tensor) -> None:
        s, t = _take(student, rows), _take(teacher, rows)
        if isinstance(rule.divergence, DKD):
            assert labels is not None
            made = _with_label_apart(s, t, labels, cross_entropy, rows, rule, spaces, with_stats)
        else:
            made = _with_all_tokens(s, t, cross_entropy, rows, rule, spaces, with_stats)
        result.loss[rows] = made.loss.squeeze(-1)
        state = torch.cat(made.state, dim=-1)
        result.state[rows, : state.shape[-1]] = state
        if with_stats:
            result.stats[rows] = torch.cat(made.stats, dim=-1)
        if upstream is not None and by_row is not None:
            scale = upstream[rows]
            if damped:
                scale = scale / damping(made.loss.squeeze(-1))
            _write(made.gradient(), scale, by_row, rows)

    result.state.zero_()  # not all of its columns are written
    _for_each_chunk(work, student, teacher, valid, _needs(rule))
    for rows_of in (result.loss, result.state, *((result.stats,) if with_stats else ())):
        _clear_invalid(rows_of, valid)
    if by_row is not None:
        _clear_invalid(by_row, valid)


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
    """`backend.Backend.backward`, where logits may also be [N, V]."""
    student, teacher, by_row = _merged(student), _merged(teacher), _merged(gradient)
    cross_entropy, rule = cross_entropy_of(labels, rule), rescaled(rule)

    def work(rows: Rows, spaces: Tensor) -> None:
        s, t = _take(student, rows), _take(teacher, rows)
        max_t, max_s, z_1, *constants = state[rows, :, None].unbind(1)
        if isinstance(rule.divergence, DKD):
            assert labels is not None
            label, s, t = label_apart(s, t, labels, rows)
        if isinstance(rule.divergence, TwoKL):
            slope = KLSlope(*constants[: len(KLSlope._fields)])
            in_nats = wanted_by_any(slope.careful)
            with_d = in_nats or rule.divergence.fixed_weight != 1.0
            chunk, *_ = exponentials(s, t, max_t, max_s, rule, spaces, with_d)
            if isinstance(rule.divergence, DKD):
                leave_out(chunk, label)
            kept = held_nats(chunk.d, s, t, rule.temperature) if in_nats else None
            of_student = kl_gradient(chunk, slope, kept, s, rule)
        else:
            chunk, *_ = exponentials(s, t, max_t, max_s, rule, spaces)
            terms_slope = TermsSlope(*constants[: len(TermsSlope._fields)])
            z_t, z_s, _, share, careful = terms_slope
            entries = entries_of(chunk, s, t, z_t, z_s, rule, wanted_by_any(careful))
            _, g = sums_of_terms(entries, s.shape[-1], rule)
            mix_forward_kl(g, entries, share, rule)
            of_student = terms_gradient(chunk, terms_slope, g, s, rule)
        if cross_entropy is not None:
            add_label_gradient(of_student, chunk, s, max_s, z_1, cross_entropy, rows, rule)
        if isinstance(rule.divergence, DKD):
            put(of_student, label.token, constants[len(KLSlope._fields)])
        _write(of_student, upstream[rows], by_row, rows)

    _for_each_chunk(work, student, teacher, valid, _needs(rule))
    _clear_invalid(by_row, valid)


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
    """`backend.Backend.pairs`."""
    student = _merged(student)
    cross_entropy, rule = cross_entropy_of(labels, rule), rescaled(rule)

    def work(rows: Rows, spaces: Tensor) -> None:
        made = entries_of_pairs(
            _take(student, rows), ids[rows], teacher[rows], cross_entropy, rows, rule, spaces,
            with_stats,
        )  # fmt: skip
        state.log_q[rows] = made.log_q
        state.of_pairs[rows, : len(made.state)] = torch.cat(made.state, dim=-1)
        state.of_student[rows, : len(made.of_student)] = torch.cat(made.of_student, dim=-1)

    state.of_pairs.zero_()  # not all of their columns are written
    state.of_student.zero_()
    _for_each_chunk(work, student, student, valid, _OF_PAIRS)
    for rows_of in (state.log_q, state.of_pairs, state.of_student):
        _clear_invalid(rows_of, valid)


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
    """`backend.Backend.pairs_backward`."""
    student, by_row = _merged(student), _merged(gradient)
    cross_entropy, rule = cross_entropy_of(labels, rule), rescaled(rule)

    def work(rows: Rows, spaces: Tensor) -> None:
        by_label = None if of_label is None else of_label[rows, None]
        made = gradient_of_pairs(
            of_pairs[rows], by_label, _take(student, rows), ids[rows], state[rows], cross_entropy,
            rows, rule, spaces,
        )  # fmt: skip
        _write(made, None, by_row, rows)

    _for_each_chunk(work, student, student, valid, _OF_PAIRS)
    _clear_invalid(by_row, valid)


def rescale(rows: Tensor, factor: Tensor) -> None:
    """`backend.Backend.rescale`."""
    for block in blocks(rows):
        rows[block].mul_(factor[block, None])


def _with_all_tokens(
    student: Tensor,
    teacher: Tensor,
    cross_entropy: CrossEntropy | None,
    rows: Rows,
    rule: Rule,
    spaces: Tensor,
    with_stats: bool,
) -> _Made:
    """R rows of any divergence but `DKD`."""
    chunk, max_t, max_s = exponentials(student, teacher, None, None, rule, spaces)
    more = statistics_of_sides(chunk, student, teacher, max_s, max_t) if with_stats else ()
    of_labels, z_1 = row_cross_entropy(chunk, student, max_s, cross_entropy, rows, rule)
    q_weight = cross_entropy.weight if cross_entropy and cross_entropy.is_of_q else 0.0
    constants: tuple[Tensor, ...]
    if isinstance(rule.divergence, TwoKL):
        sums, slope, kept = kl_divergence(
            chunk, student, teacher, max_t, rule, q_weight, with_stats
        )
        loss = sums.forward_weight * sums.forward_kl
        loss = loss + reverse_weight(sums.forward_weight, rule) * sums.reverse_kl
        constants, of_divergence = slope, partial(kl_gradient, chunk, slope, kept, student, rule)
    else:
        entries, loss, terms_slope, g = terms_divergence(chunk, student, teacher, rule, q_weight)
        if with_stats:
            sums = terms_stats(entries, loss, terms_slope.share, rule)
        constants = terms_slope
        of_divergence = partial(terms_gradient, chunk, terms_slope, g, student, rule)
    if rule.divergence_weight != 1.0:
        loss = loss * rule.divergence_weight
    if cross_entropy is not None:
        loss = loss + of_labels * cross_entropy.weight

    def gradient() -> Tensor:
        of_student = of_divergence()
        if cross_entropy is not None:
            add_label_gradient(of_student, chunk, student, max_s, z_1, cross_entropy, rows, rule)
        return of_student

    stats = (*sums, *more, of_labels) if with_stats else ()
    return _Made(loss, (max_t, max_s, z_1, *constants), stats, gradient)


def _with_label_apart(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    cross_entropy: CrossEntropy | None,
    rows: Rows,
    rule: Rule,
    spaces: Tensor,
    with_stats: bool,
) -> _Made:
    """R rows of `DKD`: the forward KL without the label's token, and what that adds."""
    divergence = rule.divergence
    assert isinstance(divergence, DKD)
    stats: tuple[Tensor, ...] = ()
    if with_stats:  # of all tokens
        of_all = rule._replace(divergence=ForwardKL())
        made = _with_all_tokens(student, teacher, cross_entropy, rows, of_all, spaces, True)
        no_weight = torch.full_like(made.loss, torch.nan)
        stats = *made.stats[:2], no_weight, *made.stats[3:]
    label, student, teacher = label_apart(student, teacher, labels, rows)
    max_t, max_s = teacher.amax(-1, keepdim=True).float(), student.amax(-1, keepdim=True).float()
    no_others = max_t == -torch.inf, max_s == -torch.inf
    max_t, max_s = (x.masked_fill(no, 0.0) for x, no in zip((max_t, max_s), no_others, strict=True))
    chunk, *_ = exponentials(student, teacher, max_t, max_s, rule, spaces)
    z_1 = torch.ones_like(max_s)
    if cross_entropy is not None:
        z_1 = softmax_of_labels(chunk, student, max_s, cross_entropy, rule).sum(-1, keepdim=True)
    leave_out(chunk, label, *no_others)
    odds_t, odds_s = (
        log_odds(logit, maximum, mass.sum(-1, keepdim=True), none, of_side, 1.0 / rule.temperature)
        for logit, maximum, mass, none, of_side in (
            (label.teacher, max_t, chunk.p, no_others[0], rule.teacher_map),
            (label.student, max_s, chunk.q, no_others[1], rule.student_map),
        )
    )
    odds_s = odds_s.masked_fill(~label.known, torch.nan)
    target, pull = target_terms(odds_t, odds_s)

    of_target = rule.divergence_weight * divergence.alpha
    q_weight = -of_target * pull
    at_label = of_target * rate_of(rule) * pull
    loss = of_target * target
    if cross_entropy is not None:
        odds = log_odds(
            label.student, max_s, z_1, no_others[1], rule.student_map, cross_entropy.unit
        ).masked_fill(~label.known, torch.nan)
        loss = loss - cross_entropy.weight * F.logsigmoid(odds)
        of_others = cross_entropy.weight * torch.sigmoid(-odds)
        at_label = at_label - of_others * (cross_entropy.unit * rule.student_map.scale)
        if cross_entropy.is_of_q:
            q_weight = q_weight + of_others
        own = torch.empty_like(max_s)
        below_maximum(label.student, max_s, rule.student_map, out=own)
        z_1 = z_1 + own.mul_(cross_entropy.unit).exp_()
    if rule.student_map.softcap is not None:
        at_label = at_label * softcap_slope(label.student, rule.student_map)
    at_label = at_label.clamp(-LARGEST, LARGEST)

    weight = rule.divergence_weight * divergence.beta
    of_rest = rule._replace(divergence=ForwardKL(), divergence_weight=weight)
    sums, slope, kept = kl_divergence(chunk, student, teacher, max_t, of_rest, q_weight, False)
    loss = loss + weight * sums.forward_kl

    def gradient() -> Tensor:
        of_student = kl_gradient(chunk, slope, kept, student, rule)
        if cross_entropy is not None:
            add_label_gradient(of_student, chunk, student, max_s, z_1, cross_entropy, rows, rule)
        return put(of_student, label.token, at_label)

    return _Made(loss, (max_t, max_s, z_1, *slope, at_label), stats, gradient)


def _for_each_chunk(
    work: Callable[[Rows, Tensor], None],
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    needs: _Needs,
) -> None:
    """work(rows, spaces) for runs of R rows that count, each with work spaces of its own: fp32
    [needs.spaces, R, max(V_s, V_t)].

    How rows are cut into runs must not depend on the number of threads: a row's rounding may depend
    on those that are computed with it."""
    n, vocabulary = student.shape[0] * student.shape[1], max(student.shape[-1], teacher.shape[-1])
    bytes_of_row = needs.bytes * vocabulary
    within_budget = max(TEMPORARY_BYTES // bytes_of_row, 1)
    step, threads, counting = within_budget, 1, None
    if sync_is_free(student):
        if valid is not None:
            counting = valid.nonzero().flatten()
            n = len(counting)
        step = min(_CHUNK_BYTES // bytes_of_row, max(n // _FEW, _SMALL_CHUNK // vocabulary))
        step = max(min(step, within_budget), 1)
        threads = torch.get_num_threads()
    chunks = _runs(n, step, counting)

    def spaces(threads: int) -> Tensor:
        shape = threads, needs.spaces, min(step, n), vocabulary
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    if threads > 1 and chunks:  # also for a single chunk, which is then as it is in one thread
        threads = min(threads, len(chunks), within_budget // step)
        workers.share_out(work, chunks, spaces(threads).unbind())
        return
    space = spaces(1)[0]
    for rows in chunks:
        work(rows, space)


def _needs(rule: Rule) -> _Needs:
    with_head = isinstance(rule.divergence, AdaptiveKL)
    return _OF_TWO_KL if isinstance(rule.divergence, TwoKL) and not with_head else _OF_OTHERS


def _runs(n: int, step: int, counting: Tensor | None) -> list[Rows]:
    """The n rows, or those whose indices are `counting`, `step` at a time."""
    if counting is None:
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]
    runs: list[Rows] = []
    for start in range(0, n, step):
        some = counting[start : start + step]
        first, end = int(some[0]), int(some[-1]) + 1
        # A run can be read where it lies; scattered rows have to be gathered.
        runs.append(slice(first, end) if end - first == len(some) else some)
    return runs


def _merged(x: Tensor) -> Tensor:
    """[N, V] or [outer, inner, V] as [outer, inner, V], outer 1 where the strides allow it."""
    if x.dim() == 2:
        return x[None]
    outer, inner, _ = x.shape
    if outer == 1 or inner == 1 or x.stride(0) == inner * x.stride(1):
        return x.view(1, outer * inner, -1)
    return x


def _take(x: Tensor, rows: Rows) -> Tensor:
    """Rows of x [outer, inner, V] as [R, V]: a view if possible."""
    view = _view(x, rows)
    return x[_places(x, rows)] if view is None else view


def _view(x: Tensor, rows: Rows) -> Tensor | None:
    if isinstance(rows, Tensor):
        return None
    outer, start = divmod(rows.start, x.shape[1])
    end = start + rows.stop - rows.start
    return x[outer, start:end] if end <= x.shape[1] else None


def _places(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """The places of the rows in x [outer, inner, V]."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    return rows // x.shape[1], rows % x.shape[1]


def _clear_invalid(x: Tensor, valid: Tensor | None) -> None:
    """Zero the rows of x, or its entries if it has one a row, that do not count, NaN included."""
    if valid is None:
        return
    invalid = ~valid.view(x.shape[: max(x.dim() - 1, 1)])
    if sync_is_free(x):
        x[invalid] = 0.0
    else:
        x.masked_fill_(invalid.view(*invalid.shape, *[1] * (x.dim() - invalid.dim())), 0.0)


def _write(gradient: Tensor, upstream: Tensor | None, out: Tensor, rows: Rows) -> None:
    """The rows of out [outer, inner, V_s] = upstream, if any, * gradient. Uses up the gradient."""
    view = _view(out, rows)
    if upstream is None:
        if view is None:
            out[_places(out, rows)] = gradient.to(out.dtype)
        else:
            view.copy_(gradient)
    elif view is None:
        out[_places(out, rows)] = gradient.mul_(upstream.float()[:, None]).to(out.dtype)
    elif out.dtype == gradient.dtype:
        torch.mul(gradient, upstream.float()[:, None], out=view)
    else:  # the product in another dtype would first be written elsewhere
        view.copy_(gradient.mul_(upstream.float()[:, None]))
