"""The family in plain PyTorch: the backend for CPU, MPS and wherever Triton is not.

Rows are taken a few at a time through a handful of fp32 work spaces that stay in the cache, so
nothing of the logits' size is ever allocated. On a CPU nothing is sorted but a sample of each row
and the few tokens around the head's boundary: see `_narrow`; and a thread takes whole rows, so that
no two threads ever wait for each other: see `workers`.

Every result is the same for any number of threads, and finite where the logits are. What would not
be finite in fp32 is held: |ln p - ln q| at `LARGEST_U`, a gradient at the largest number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import terms, workers
from .divergences import (
    DKD,
    TERMS,
    AdaptiveKL,
    DecoupledKL,
    EntropySwitch,
    ForwardKL,
    LKHybrid,
    Rule,
    SumOfTerms,
    TwoKL,
)
from .rows import LogitMap, RowResult, blocks, damping
from .terms import LARGEST_DIFFERENCE, LARGEST_LOG, LARGEST_U

# Budget for the temporaries of a call; at least one row is taken.
TEMPORARY_BYTES = 64 * 2**20
_CHUNK_BYTES = 16 * 2**20  # of that for a thread of a CPU, whose work spaces stay near its cache
_SMALL_CHUNK = 2**16  # logits in one of them where rows are too few to occupy `_FEW` threads
_FEW = 8
_SAMPLE = 256  # tokens that stand for a row when the head's last logit is guessed
_LOG2_E = math.log2(math.e)
_LARGEST = torch.finfo(torch.bfloat16).max  # finite in every dtype of that range
_SMALLEST = torch.finfo(torch.float32).tiny
_HUGE = 2.0**100  # sums this large, in logits or in nats, are taken with care
_STEEP = 2.0**20  # and everything where a unit of the logits is this many nats

_Rows: TypeAlias = slice | Tensor  # a run of rows, or the indices of scattered ones


class _Needs(NamedTuple):
    """Temporaries of a chunk: fp32 work spaces, and bytes per logit of all there is at worst."""

    spaces: int
    bytes: int


_OF_TWO_KL = _Needs(4, 36)  # besides the spaces, masks and copies of rows that are scattered
_OF_OTHERS = _Needs(6, 64)  # also what terms are made of, or a sort and its fp64 sums


class _Chunk(NamedTuple):
    """The exponentials of R rows relative to their maxima; V is the vocabulary both sides share."""

    d: Tensor  # [R, V] (t - max t) - (s - max s), of the logits that the maps give
    p: Tensor  # [R, V_t] exp((t - max t) / T)
    q: Tensor  # [R, V_s] exp((s - max s) / T)
    x: Tensor  # [R, V_t] t - max t, of which p takes the place where the loss is of the two KLs
    y: Tensor  # [R, V_s] s - max s, in spare[0], or of the two KLs in the place of q
    spare: Tensor  # [1 or 3, R, max(V_s, V_t)] free for use, but for y and for d, in spare[1]


class _Slope(NamedTuple):
    """Row constants of dloss/dstudent = rate (q (a - k (d - center)) - b p), or rate q a_dropped
    where a side is -inf; rate is the student's scale over T."""

    center: Tensor  # each [R, 1] fp32
    k: Tensor
    a: Tensor
    a_dropped: Tensor
    b: Tensor
    careful: Tensor  # 1 where d is in nats, held, and 0 where a side is -inf: see `_nats`


class _TermsSlope(NamedTuple):
    """Row constants of dloss/dstudent = rate (weight g - q pull) of a sum of terms."""

    z_t: Tensor  # each [R, 1] fp32: the sums of the chunk's p and q
    z_s: Tensor
    pull: Tensor  # weight times the sum of g, less what the cross-entropy adds to q
    share: Tensor  # of the forward KL that is mixed with the terms, in g already; 0 where none is
    careful: Tensor  # 1 where entries are held, and those at -inf are told apart


class _CrossEntropy(NamedTuple):
    """What is asked for besides the divergence: its own loss, times a weight."""

    labels: Tensor  # [N] int32 or int64
    weight: float
    unit: float  # nats at T = 1 that a unit of the rescaled logits is
    is_of_q: bool  # whether its softmax, at T = 1, is q


class _Label(NamedTuple):
    """The label's token, which `DKD` tells apart from the others; each [R, 1]."""

    token: Tensor  # int64
    known: Tensor  # bool, whether it is a token of the student
    student: Tensor  # its logits
    teacher: Tensor


class _Made(NamedTuple):
    """What a forward pass makes of R rows."""

    loss: Tensor  # [R, 1]
    state: tuple[Tensor, ...]  # each [R, 1]
    stats: tuple[Tensor, ...]  # each [R, 1], or none
    gradient: Callable[[], Tensor]  # dloss/dstudent [R, V_s], asked for no more than once


class _Sums(NamedTuple):
    """The first of STATISTICS, each [R, 1] fp32."""

    forward_kl: Tensor
    reverse_kl: Tensor
    forward_weight: Tensor
    head_mass: Tensor
    head_size: Tensor
    gap: Tensor


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
    cross_entropy, rule = _cross_entropy_of(labels, rule), _rescaled(rule)
    by_row = None if gradient is None else _merged(gradient)
    with_stats = len(result.stats) > 0

    def work(rows: _Rows, spaces: Tensor) -> None:
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
    cross_entropy, rule = _cross_entropy_of(labels, rule), _rescaled(rule)

    def work(rows: _Rows, spaces: Tensor) -> None:
        s, t = _take(student, rows), _take(teacher, rows)
        max_t, max_s, z_1, *constants = state[rows, :, None].unbind(1)
        if isinstance(rule.divergence, DKD):
            assert labels is not None
            label, s, t = _apart(s, t, labels, rows)
        if isinstance(rule.divergence, TwoKL):
            slope = _Slope(*constants[: len(_Slope._fields)])
            in_nats = _any(slope.careful)
            with_d = in_nats or rule.divergence.fixed_weight != 1.0
            chunk, *_ = _exponentials(s, t, max_t, max_s, rule, spaces, with_d)
            if isinstance(rule.divergence, DKD):
                _leave_out(chunk, label)
            kept = _nats(chunk.d, s, t, rule.temperature) if in_nats else None
            of_student = _gradient(chunk, slope, kept, s, rule)
        else:
            chunk, *_ = _exponentials(s, t, max_t, max_s, rule, spaces)
            terms_slope = _TermsSlope(*constants[: len(_TermsSlope._fields)])
            z_t, z_s, _, share, careful = terms_slope
            entries = _entries(chunk, s, t, z_t, z_s, rule, _any(careful))
            _, g = _sums(entries, s.shape[-1], rule)
            _mix_forward_kl(g, entries, share, rule)
            of_student = _terms_gradient(chunk, terms_slope, g, s, rule)
        if cross_entropy is not None:
            _add_label_gradient(of_student, chunk, s, max_s, z_1, cross_entropy, rows, rule)
        if isinstance(rule.divergence, DKD):
            _put(of_student, label.token, constants[len(_Slope._fields)])
        _write(of_student, upstream[rows], by_row, rows)

    _for_each_chunk(work, student, teacher, valid, _needs(rule))
    _clear_invalid(by_row, valid)


def _with_all_tokens(
    student: Tensor,
    teacher: Tensor,
    cross_entropy: _CrossEntropy | None,
    rows: _Rows,
    rule: Rule,
    spaces: Tensor,
    with_stats: bool,
) -> _Made:
    """R rows of any divergence but `DKD`."""
    chunk, max_t, max_s = _exponentials(student, teacher, None, None, rule, spaces)
    more = _statistics_of_sides(chunk, student, teacher, max_s, max_t) if with_stats else ()
    of_labels, z_1 = _row_cross_entropy(chunk, student, max_s, cross_entropy, rows, rule)
    q_weight = cross_entropy.weight if cross_entropy and cross_entropy.is_of_q else 0.0
    constants: tuple[Tensor, ...]
    if isinstance(rule.divergence, TwoKL):
        sums, slope, kept = _divergence(chunk, student, teacher, max_t, rule, q_weight, with_stats)
        loss = sums.forward_weight * sums.forward_kl
        loss = loss + _reverse_weight(sums.forward_weight, rule) * sums.reverse_kl
        constants, of_divergence = slope, partial(_gradient, chunk, slope, kept, student, rule)
    else:
        entries, loss, terms_slope, g = _terms_divergence(chunk, student, teacher, rule, q_weight)
        if with_stats:
            sums = _terms_stats(entries, loss, terms_slope.share, rule)
        constants = terms_slope
        of_divergence = partial(_terms_gradient, chunk, terms_slope, g, student, rule)
    if rule.divergence_weight != 1.0:
        loss = loss * rule.divergence_weight
    if cross_entropy is not None:
        loss = loss + of_labels * cross_entropy.weight

    def gradient() -> Tensor:
        of_student = of_divergence()
        if cross_entropy is not None:
            _add_label_gradient(of_student, chunk, student, max_s, z_1, cross_entropy, rows, rule)
        return of_student

    stats = (*sums, *more, of_labels) if with_stats else ()
    return _Made(loss, (max_t, max_s, z_1, *constants), stats, gradient)


def rescale(rows: Tensor, factor: Tensor) -> None:
    """`backend.Backend.rescale`."""
    for block in blocks(rows):
        rows[block].mul_(factor[block, None])


def _cross_entropy_of(labels: Tensor | None, rule: Rule) -> _CrossEntropy | None:
    """The cross-entropy that the rule, not rescaled yet, asks for."""
    if labels is None or not rule.label_weight:
        return None
    unit = rule.temperature / _rescaled(rule).temperature
    return _CrossEntropy(labels, rule.label_weight, unit, rule.temperature == 1.0)


def _rescaled(rule: Rule) -> Rule:
    """The same losses with T < 2: both sides' logits are divided by a power of two."""
    temperature = max(rule.temperature, _SMALLEST)
    power = _power_of_two(min(max(temperature, 1.0), _HUGE))

    def divided(logit_map: LogitMap) -> LogitMap:
        softcap, scale = logit_map
        return LogitMap(None if softcap is None else softcap / power, scale / power)

    return rule._replace(
        temperature=temperature / power,
        student_map=divided(rule.student_map),
        teacher_map=divided(rule.teacher_map),
    )


def _power_of_two(x: float) -> float:
    """The largest power of two that is not above x."""
    return math.ldexp(1.0, math.frexp(x)[1] - 1)


def _for_each_chunk(
    work: Callable[[_Rows, Tensor], None],
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
    if _sync_is_free(student):
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


def _runs(n: int, step: int, counting: Tensor | None) -> list[_Rows]:
    """The n rows, or those whose indices are `counting`, `step` at a time."""
    if counting is None:
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]
    runs: list[_Rows] = []
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


def _take(x: Tensor, rows: _Rows) -> Tensor:
    """Rows of x [outer, inner, V] as [R, V]: a view if possible."""
    view = _view(x, rows)
    return x[_places(x, rows)] if view is None else view


def _view(x: Tensor, rows: _Rows) -> Tensor | None:
    if isinstance(rows, Tensor):
        return None
    outer, start = divmod(rows.start, x.shape[1])
    end = start + rows.stop - rows.start
    return x[outer, start:end] if end <= x.shape[1] else None


def _places(x: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """The places of the rows in x [outer, inner, V]."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    return rows // x.shape[1], rows % x.shape[1]


def _sync_is_free(x: Tensor) -> bool:
    """Whether Python may look at values without stalling the device."""
    return x.device.type == "cpu"


def _clear_invalid(x: Tensor, valid: Tensor | None) -> None:
    """Zero the rows of x, or its entries if it has one a row, that do not count, NaN included."""
    if valid is None:
        return
    invalid = ~valid.view(x.shape[: max(x.dim() - 1, 1)])
    if _sync_is_free(x):
        x[invalid] = 0.0
    else:
        x.masked_fill_(invalid.view(*invalid.shape, *[1] * (x.dim() - invalid.dim())), 0.0)


def _exponentials(
    student: Tensor,
    teacher: Tensor,
    max_t: Tensor | None,
    max_s: Tensor | None,
    rule: Rule,
    spaces: Tensor,
    with_d: bool = True,
) -> tuple[_Chunk, Tensor, Tensor]:
    """The chunk, and the maxima, which are looked for where they are not given.

    Without d, what is in its place is not defined."""
    rows, v_t, v_s = teacher.shape[0], teacher.shape[-1], student.shape[-1]
    first, p, q, *_ = spaces[:, :rows].unbind()
    p, q, spare, shared = p[:, :v_t], q[:, :v_s], spaces[3:, :rows], min(v_t, v_s)
    if isinstance(rule.divergence, TwoKL):
        x, y, d = p, q, first[:, :shared]
    else:
        x, y, d = first[:, :v_t], spare[0, :, :v_s], spare[1, :, :shared]
    max_t = _below_maximum(teacher, max_t, rule.teacher_map, out=x)
    max_s = _below_maximum(student, max_s, rule.student_map, out=y)
    if with_d:
        torch.sub(x[:, :shared], y[:, :shared], out=d)
    # exp2 is vectorised everywhere, exp only at half its speed.
    torch.mul(x, _LOG2_E / rule.temperature, out=p).exp2_()
    torch.mul(y, _LOG2_E / rule.temperature, out=q).exp2_()
    return _Chunk(d, p, q, x, y, spare), max_t, max_s


def _below_maximum(x: Tensor, maximum: Tensor | None, logit_map: LogitMap, out: Tensor) -> Tensor:
    """The logits of x [R, V], less that of `maximum` [R, 1], into out [R, V] fp32.

    Gives the maximum, that of x where it is None."""
    softcap, scale = logit_map
    # PyTorch converts much faster than it computes with two dtypes, or finds a maximum in 16 bits.
    wide = x if x.dtype == out.dtype else out.copy_(x)
    if maximum is None:
        maximum = wide.amax(-1, keepdim=True)
    if softcap is None:
        # Before the difference, which may be beyond fp32; a power of two, which rounds nothing.
        power = _power_of_two(min(scale, 1.0))
        torch.add(maximum * -power, wide, alpha=power, out=out)
        if scale != power:
            out.mul_(scale / power)
        return maximum
    torch.mul(wide, _gain(logit_map), out=out).tanh_().mul_(softcap)
    # Before the difference, so that a row with nothing finite is NaN.
    out.masked_fill_(x == -torch.inf, -torch.inf).sub_(_mapped(maximum, logit_map))
    return maximum


def _mapped(x: Tensor, logit_map: LogitMap) -> Tensor:
    softcap, scale = logit_map
    if softcap is None:
        return x if scale == 1.0 else x * scale
    return torch.where(x.isinf(), x, torch.tanh(x * _gain(logit_map)) * softcap)


def _gain(logit_map: LogitMap) -> float:
    """The factor from a logit to the argument of tanh, held so that 0 times it is 0."""
    assert logit_map.softcap is not None
    return min(logit_map.scale / logit_map.softcap, _LARGEST)


def _nats(d: Tensor, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """d over T, held within `LARGEST_U`, and 0 where a side is -inf; gives 0 there, 1 elsewhere."""
    shared = d.shape[-1]
    kept = torch.gt(teacher[:, :shared], -torch.inf, out=torch.empty_like(d))
    kept.mul_(student[:, :shared] > -torch.inf)
    # Where both sides are too far below their maximum for fp32, d is NaN, and p and q are 0.
    d.div_(temperature).nan_to_num_(nan=0.0, posinf=LARGEST_U, neginf=-LARGEST_U)
    d.clamp_(-LARGEST_U, LARGEST_U).mul_(kept)
    return kept


def _statistics_of_sides(
    chunk: _Chunk, student: Tensor, teacher: Tensor, max_s: Tensor, max_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The entropies of q and p, and whether some token is a most probable one of both; [R, 1]."""
    of_student, of_teacher = (
        _entropy(masses, masses.sum(-1, keepdim=True), out=chunk.spare[-1])
        for masses in (chunk.q, chunk.p)
    )
    shared = chunk.d.shape[-1]
    agree = (student[:, :shared] == max_s) & (teacher[:, :shared] == max_t)
    agreement = agree.any(-1, keepdim=True).float()
    broken = (of_student + of_teacher).isnan()
    student_entropy, teacher_entropy, agreement = (
        x.masked_fill(broken, torch.nan) for x in (of_student, of_teacher, agreement)
    )
    return student_entropy, teacher_entropy, agreement


def _entropy(masses: Tensor, z: Tensor, out: Tensor) -> Tensor:
    """[R, 1] of masses [R, V] that sum to z, by way of a work space of at least that width."""
    share = torch.div(masses, z, out=out[:, : masses.shape[-1]])
    torch.special.entr(share, out=share)
    return share.sum(-1, keepdim=True)


def _reverse_weight(w: Tensor, rule: Rule) -> Tensor:
    """The weight of the reverse KL where w is that of the forward KL."""
    return torch.ones_like(w) if isinstance(rule.divergence, EntropySwitch) else 1.0 - w


def _row_cross_entropy(
    chunk: _Chunk,
    student: Tensor,
    max_s: Tensor,
    cross_entropy: _CrossEntropy | None,
    rows: _Rows,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy at T = 1 and the denominator of its softmax, each [R, 1]; NaN and 1 without."""
    if cross_entropy is None:
        return torch.full_like(max_s, torch.nan), torch.ones_like(max_s)
    token, known = _tokens(cross_entropy.labels, rows, student.shape[-1])
    of_label = torch.empty_like(max_s)
    _below_maximum(student.gather(-1, token), max_s, rule.student_map, out=of_label)
    z_1 = _softmax_of_labels(chunk, student, max_s, cross_entropy, rule).sum(-1, keepdim=True)
    loss = z_1.log() - of_label * cross_entropy.unit
    return loss.masked_fill(~known, torch.nan), z_1.masked_fill(~known, torch.nan)


def _softmax_of_labels(
    chunk: _Chunk, student: Tensor, max_s: Tensor, cross_entropy: _CrossEntropy, rule: Rule
) -> Tensor:
    """exp(s - max s) at T = 1 [R, V_s], where that is not the chunk's q in chunk.spare[-1]."""
    if cross_entropy.is_of_q:
        return chunk.q
    space = chunk.spare[-1, :, : student.shape[-1]]
    _below_maximum(student, max_s, rule.student_map, out=space)
    return space.mul_(_LOG2_E * cross_entropy.unit).exp2_()


def _tokens(labels: Tensor, rows: _Rows, vocabulary: int) -> tuple[Tensor, Tensor]:
    """[R, 1] int64 tokens, and whether they are tokens of the student."""
    token = labels[rows, None].long()
    known = (token >= 0) & (token < vocabulary)
    return token.where(known, 0), known


def _add_label_gradient(
    gradient: Tensor,
    chunk: _Chunk,
    student: Tensor,
    max_s: Tensor,
    z_1: Tensor,
    cross_entropy: _CrossEntropy,
    rows: _Rows,
    rule: Rule,
) -> None:
    """Add weight (softmax(s) - [j = label]) by the logits, T = 1; in place.

    Where that softmax is q, the gradient of the divergence has the first term already."""
    rate = cross_entropy.weight * cross_entropy.unit * rule.student_map.scale
    token, known = _tokens(cross_entropy.labels, rows, student.shape[-1])
    of_label = torch.full_like(max_s, -rate)
    if rule.student_map.softcap is not None:
        of_label *= _chain(student.gather(-1, token), rule.student_map, torch.empty_like(max_s))
    if not cross_entropy.is_of_q:
        softmax = _softmax_of_labels(chunk, student, max_s, cross_entropy, rule).div_(z_1)
        if rule.student_map.softcap is not None:
            softmax.mul_(_chain(student, rule.student_map, out=torch.empty_like(softmax)))
        gradient.add_(softmax, alpha=rate)
    gradient.scatter_add_(-1, token, of_label)
    if _any(~known):
        gradient.masked_fill_(~known, torch.nan)


def _divergence(
    chunk: _Chunk,
    student: Tensor,
    teacher: Tensor,
    max_t: Tensor,
    rule: Rule,
    q_weight: float | Tensor,
    with_stats: bool,
) -> tuple[_Sums, _Slope, Tensor | None]:
    """Sums of R rows, what their gradient needs, and which entries of d are kept.

    To the gradient, q times q_weight is added, as the cross-entropy needs it at T = 1. Without
    statistics a KL of weight 0 is not made, nor the gap where no weight needs it: they are not what
    `_Sums` says then, but such a KL is finite where the row is."""
    assert isinstance(rule.divergence, TwoKL)
    weight = rule.divergence.fixed_weight
    d, p, q, _, _, spare = chunk
    distance = spare[0, :, : p.shape[-1]]
    shared, temperature = d.shape[-1], rule.temperature
    p_shared, q_shared = p[:, :shared], q[:, :shared]
    z_t, z_s = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    product = distance[:, :shared]

    def mean(weights: Tensor, z: Tensor, of: Tensor) -> Tensor:
        return torch.mul(weights, of, out=product).sum(-1, keepdim=True) / z

    p_kept = p_shared.sum(-1, keepdim=True) / z_t if shared < p.shape[-1] else z_t / z_t
    q_kept = q_shared.sum(-1, keepdim=True) / z_s if shared < q.shape[-1] else z_s / z_s
    p_d = mean(p_shared, z_t, d) if with_stats or weight != 0.0 else torch.zeros_like(z_t)
    q_d = mean(q_shared, z_s, d) if with_stats or weight != 1.0 else torch.zeros_like(z_s)
    kept, per_nat = None, temperature
    if (
        not _sync_is_free(d)
        or _rate(rule) > _STEEP
        or not bool((p_d.abs() + q_d.abs() < _HUGE * min(temperature, 1.0)).all())
    ):
        kept, per_nat = _nats(d, student, teacher, temperature), 1.0
        p_kept, q_kept = mean(p_shared, z_t, kept), mean(q_shared, z_s, kept)
        # Divided before they are summed: only the mean is known to be within what is held.
        p_d, q_d = (
            torch.mul(weights, d, out=product).div_(z).sum(-1, keepdim=True)
            for weights, z in ((p_shared, z_t), (q_shared, z_s))
        )
    # u = d/T - c. From the quotient, c stays accurate where p is close to q.
    c = (z_t / z_s).log()
    forward_kl = p_d / per_nat - c * p_kept
    reverse_kl = c * q_kept - q_d / per_nat
    # Only where a token is dropped can they be less than 0, but for rounding.
    if kept is None and shared == p.shape[-1]:
        forward_kl = forward_kl.clamp(min=0.0)
    if kept is None and shared == q.shape[-1]:
        reverse_kl = reverse_kl.clamp(min=0.0)

    gap = mass = size = torch.full_like(z_t, torch.nan)
    if with_stats or isinstance(rule.divergence, AdaptiveKL):
        # |p - q|, in units of 1/z_t.
        torch.mul(q_shared, z_t / z_s, out=product).sub_(p_shared)
        distance[:, shared:] = p[:, shared:]
        distance.abs_()
        only_student = q[:, shared:].sum(-1, keepdim=True) * (z_t / z_s)
        gap = distance.sum(-1, keepdim=True) + only_student

    if isinstance(rule.divergence, EntropySwitch):
        w = (_entropy(p, z_t, out=spare[-1]) > rule.divergence.tau).float()
    elif weight is None:
        g_head, mass, size = _head(chunk, teacher, max_t, z_t, rule)
        w = torch.where(gap == 0.0, 0.5, g_head / gap).clamp(max=1.0)
    else:
        w = torch.full_like(gap, weight)
    if with_stats:
        w, mass, size = (x.masked_fill(gap.isnan(), torch.nan) for x in (w, mass, size))

    sums = _Sums(forward_kl, reverse_kl, w, mass, size, gap / z_t)
    of_forward = rule.divergence_weight * w
    of_reverse = rule.divergence_weight * _reverse_weight(w, rule)
    of_q = of_q_dropped = of_forward * p_kept + q_weight
    if kept is not None or shared < q.shape[-1]:  # or else q_kept is 1, and nothing is dropped
        of_q_dropped = of_q - of_reverse * (q_kept + reverse_kl)
        of_q = of_q + of_reverse * (1.0 - q_kept) * (1.0 + c)
    slope = _Slope(
        center=q_d,
        k=of_reverse / per_nat / z_s,
        a=of_q / z_s,
        a_dropped=of_q_dropped / z_s,
        b=of_forward / z_t,
        careful=torch.full_like(w, kept is not None),
    )
    return sums, slope, kept


def _gradient(
    chunk: _Chunk, slope: _Slope, kept: Tensor | None, student: Tensor, rule: Rule
) -> Tensor:
    """dloss/dstudent [R, V_s] of the two KLs. Uses up the chunk."""
    assert isinstance(rule.divergence, TwoKL)
    weight = rule.divergence.fixed_weight
    d, p, q = chunk.d, chunk.p[:, : chunk.d.shape[-1]], chunk.q
    shared = d.shape[-1]
    if rule.student_map.softcap is not None:
        chain = _chain(student, rule.student_map, out=chunk.spare[-1, :, : q.shape[-1]])
        q.mul_(chain)
        p.mul_(chain[:, :shared])
    q_shared = q[:, :shared]
    if weight != 1.0:
        # Both addends of k are of the size of their difference, which is 0 where q is 1.
        d.sub_(slope.center).mul_(q_shared)
    factor = slope.a
    if kept is not None:
        d.mul_(kept)
        p.mul_(kept)
        factor = kept.mul_(slope.a - slope.a_dropped).add_(slope.a_dropped)
    q_shared.mul_(factor)
    if weight != 1.0:
        q_shared.addcmul_(d, slope.k, value=-1.0)
    if weight != 0.0:
        q_shared.addcmul_(p, slope.b, value=-1.0)
    q[:, shared:].mul_(slope.a_dropped)
    return _at_rate(q, rule, held=kept is not None)


def _chain(student: Tensor, student_map: LogitMap, out: Tensor) -> Tensor:
    """1 / cosh^2, the derivative of a capped logit; its scale is in the rate.

    1 - tanh^2 would cancel where the softcap saturates."""
    return out.copy_(student).mul_(_gain(student_map)).cosh_().square_().reciprocal_()


def _at_rate(gradient: Tensor, rule: Rule, *, held: bool) -> Tensor:
    """The derivative by a logit as the model gives it, of one by nats; in place."""
    rate = _rate(rule)
    if rate != 1.0:
        gradient.mul_(rate)
    return gradient.clamp_(-_LARGEST, _LARGEST) if held else gradient


def _write(gradient: Tensor, upstream: Tensor, out: Tensor, rows: _Rows) -> None:
    """The rows of out [outer, inner, V_s] = upstream * gradient. Uses up the gradient."""
    view = _view(out, rows)
    if view is None:
        out[_places(out, rows)] = gradient.mul_(upstream.float()[:, None]).to(out.dtype)
    elif out.dtype == gradient.dtype:
        torch.mul(gradient, upstream.float()[:, None], out=view)
    else:  # the product in another dtype would first be written elsewhere
        view.copy_(gradient.mul_(upstream.float()[:, None]))


def _rate(rule: Rule) -> float:
    """Nats that a unit of the student's logits is worth, where they are not capped."""
    return min(rule.rate, _LARGEST)


class _Entries(NamedTuple):
    """What the terms of R rows are made of, for a run of the vocabulary; fp32."""

    p: Tensor  # each [R, W]
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    u: Tensor  # ln p - ln q
    no_student: Tensor | None  # bool, where the student's logit is -inf; None: nowhere
    no_teacher: Tensor | None


def _terms_divergence(
    chunk: _Chunk, student: Tensor, teacher: Tensor, rule: Rule, q_weight: float
) -> tuple[list[_Entries], Tensor, _TermsSlope, Tensor]:
    """The entries of R rows, their loss [R, 1], what their gradient needs, and g [R, V_s].

    q_weight is that of `_divergence`."""
    z_t, z_s = chunk.p.sum(-1, keepdim=True), chunk.q.sum(-1, keepdim=True)
    entries = _entries(chunk, student, teacher, z_t, z_s, rule)
    x, g = _sums(entries, student.shape[-1], rule)
    total = g.sum(-1, keepdim=True)
    # A broken side may hide behind entries that are dropped because of the other.
    broken = (z_t + z_s).isnan()
    loss = (x + total).nan_to_num(_LARGEST, _LARGEST).clamp(min=0.0)  # no phi is less than 0
    loss = loss.masked_fill(broken, torch.nan)
    total = total.nan_to_num(0.0, _LARGEST, -_LARGEST).masked_fill(broken, torch.nan)
    share = _forward_share(loss, rule)
    if isinstance(rule.divergence, _MIXED):
        forward_kl, kept = _forward_kl(entries)
        if entries[0].no_student is None and chunk.p.shape[-1] == chunk.d.shape[-1]:
            forward_kl = forward_kl.clamp(min=0.0)  # as no token is dropped
        rest = _rest(share, rule)
        loss = share * forward_kl + rest * loss
        total = rest * total - share * kept
        _mix_forward_kl(g, entries, share, rule)
    careful = entries[0].no_student is not None or not bool((loss < _HUGE).all())
    pull = rule.divergence_weight * total - q_weight
    slope = _TermsSlope(z_t, z_s, pull, share, torch.full_like(loss, careful))
    return entries, loss, slope, g


def _entries(
    chunk: _Chunk,
    student: Tensor,
    teacher: Tensor,
    z_t: Tensor,
    z_s: Tensor,
    rule: Rule,
    careful: bool | None = None,
) -> list[_Entries]:
    """The entries of R rows that both sides have, then those that one has alone, if any.

    `careful` says whether a logit may be -inf or beyond what is held; None: to be found out. They
    take the place of the chunk, whose p and q become probabilities."""
    per_logit, shared = 1.0 / rule.temperature, chunk.d.shape[-1]
    p, q = chunk.p.div_(z_t), chunk.q.div_(z_s)
    # From the quotient, u stays accurate where p is close to q.
    u = torch.add((z_s / z_t).log(), chunk.d, alpha=per_logit, out=chunk.d)
    log_p, log_q = chunk.x, chunk.y
    for log, z in ((log_p, z_t), (log_q, z_s)):
        torch.add(-z.log(), log, alpha=per_logit, out=log)
    if careful is None:
        careful = (
            not _sync_is_free(u)
            or _rate(rule) > _STEEP
            or not bool((torch.linalg.vector_norm(u, dim=-1) < _HUGE).all())
        )
    no_student = no_teacher = None
    if careful:
        no_student, no_teacher = (x[:, :shared] == -torch.inf for x in (student, teacher))
        # Where both sides are too far below their maximum for fp32, u is NaN, and p and q are 0.
        u.nan_to_num_(nan=0.0, posinf=LARGEST_U, neginf=-LARGEST_U).clamp_(-LARGEST_U, LARGEST_U)
        u.masked_fill_(no_student, LARGEST_U).masked_fill_(no_teacher, -LARGEST_U)
        u.masked_fill_(no_student & no_teacher, 0.0)
    if careful or p.shape[-1] != q.shape[-1]:
        for log in (log_p, log_q):
            log.clamp_(min=-LARGEST_LOG)
    p_both, q_both = p[:, :shared], q[:, :shared]
    logs = log_p[:, :shared], log_q[:, :shared]
    entries = [_Entries(p_both, q_both, *logs, u, no_student, no_teacher)]
    for mass, log, logits in ((p, log_p, teacher), (q, log_q, student)):
        if mass.shape[-1] > shared:
            alone = [x[:, shared:] for x in (mass, log, logits)]
            entries.append(_one_sided(*alone, of_teacher=mass is p))
    return entries


def _one_sided(mass: Tensor, log: Tensor, logits: Tensor, *, of_teacher: bool) -> _Entries:
    """Entries that only one side has."""
    forbidden = logits == -torch.inf
    no_mass, no_log = torch.zeros_like(mass), torch.full_like(mass, -LARGEST_LOG)
    u = torch.full_like(mass, LARGEST_U if of_teacher else -LARGEST_U).masked_fill_(forbidden, 0.0)
    nowhere = torch.ones_like(forbidden)
    if of_teacher:
        return _Entries(mass, no_mass, log, no_log, u, nowhere, forbidden)
    return _Entries(no_mass, mass, no_log, log, u, forbidden, nowhere)


def _sums(entries: list[_Entries], v_s: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """(sum of x [R, 1], g [R, V_s]), where entries whose limit is infinite are dropped."""
    divergence = rule.divergence
    if isinstance(divergence, DecoupledKL):
        return _spread(entries[0], v_s, divergence)
    assert isinstance(divergence, SumOfTerms)
    own = TERMS.get(divergence.name)
    function = terms.TERMS[divergence.terms] if own is None else own.torch
    if function is None:
        raise ValueError(
            f"backend: expected 'triton', as {divergence.name} was registered without torch="
        )
    parts = []
    for *given, no_student, no_teacher in entries:
        x, g = function(*given, *divergence.numbers)
        for mask, finite in zip((no_student, no_teacher), divergence.limits, strict=True):
            if not finite and mask is not None:
                x, g = x.masked_fill(mask, 0.0), g.masked_fill(mask, 0.0)
        parts.append((x.sum(-1, keepdim=True), g))
    of_x, of_g = zip(*parts, strict=True)
    # Of the entries that the teacher has alone, g is 0.
    g = of_g[0] if of_g[0].shape[-1] == v_s else torch.cat(of_g, dim=-1)
    return torch.cat(of_x, dim=-1).sum(-1, keepdim=True), g


def _spread(entry: _Entries, v_s: int, divergence: DecoupledKL) -> tuple[Tensor, Tensor]:
    """(beta / 2 Var_w(u) [R, 1], g [R, V_s]), w proportional to p^kappa; g sums to 0."""
    _, _, log_p, _, u, no_student, no_teacher = entry
    w = torch.mul(log_p, divergence.kappa * _LOG2_E).exp2_()
    for mask in (no_student, no_teacher):
        if mask is not None:
            w.masked_fill_(mask, 0.0)
    w.div_(w.sum(-1, keepdim=True).clamp(min=_SMALLEST))
    u = u.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    centred = u.sub_((w * u).sum(-1, keepdim=True))
    # Again: what w lacks of a sum of 1 counts as many times as u is far from 0.
    centred.sub_((w * centred).sum(-1, keepdim=True))
    w.mul_(centred)
    spread = (w * centred).sum(-1, keepdim=True) * (0.5 * divergence.beta)
    return spread, F.pad(w.mul_(-divergence.beta), (0, v_s - w.shape[-1]))


# The divergences with which a share of the forward KL is mixed.
_MIXED = LKHybrid, DecoupledKL


def _forward_share(loss: Tensor, rule: Rule) -> Tensor:
    """The weight of the forward KL, where `loss` is that of the terms [R, 1]."""
    divergence = rule.divergence
    if isinstance(divergence, LKHybrid):
        return torch.exp((loss - 1.0) * divergence.eta)
    return torch.full_like(loss, divergence.alpha if isinstance(divergence, DecoupledKL) else 0.0)


def _rest(share: Tensor, rule: Rule) -> Tensor | float:
    """The weight of the terms where `share` is that of the forward KL."""
    return 1.0 - share if isinstance(rule.divergence, LKHybrid) else 1.0


def _forward_kl(entries: list[_Entries]) -> tuple[Tensor, Tensor]:
    """Forward KL [R, 1], and the teacher's mass of the entries that it does not drop."""
    p, _, _, _, u, no_student, _ = entries[0]
    if no_student is not None:  # where the teacher's logit is -inf, p is 0
        p = p.masked_fill(no_student, 0.0)
    return (p * u).sum(-1, keepdim=True), p.sum(-1, keepdim=True)


def _mix_forward_kl(g: Tensor, entries: list[_Entries], share: Tensor, rule: Rule) -> None:
    """g of the terms [R, V_s] becomes that of the mixture with a share of the forward KL."""
    if not isinstance(rule.divergence, _MIXED):
        return
    p, *_, no_student, _ = entries[0]
    p = p if no_student is None else p.masked_fill(no_student, 0.0)
    g.mul_(_rest(share, rule))
    g[:, : p.shape[-1]].sub_(p * share)


def _terms_stats(entries: list[_Entries], loss: Tensor, share: Tensor, rule: Rule) -> _Sums:
    """The statistics that need neither a head nor a weight; the others are NaN."""
    forward_kl, reverse_kl, gap = (torch.zeros_like(loss) for _ in range(3))
    for p, q, _, _, u, no_student, no_teacher in entries:
        for mask in (no_student, no_teacher):
            if mask is not None:
                u = u.masked_fill(mask, 0.0)
        forward_kl += (p * u).sum(-1, keepdim=True)
        reverse_kl -= (q * u).sum(-1, keepdim=True)
        gap += (p - q).abs_().sum(-1, keepdim=True)
    for x in (forward_kl, reverse_kl, gap):
        x.masked_fill_(loss.isnan(), torch.nan)
    nan = torch.full_like(gap, torch.nan)
    w = share if isinstance(rule.divergence, _MIXED) else nan
    return _Sums(forward_kl, reverse_kl, w, nan, nan, gap)


def _terms_gradient(
    chunk: _Chunk, slope: _TermsSlope, g: Tensor, student: Tensor, rule: Rule
) -> Tensor:
    """dloss/dstudent [R, V_s] of a sum of terms, in place of g."""
    if rule.divergence_weight != 1.0:
        g.mul_(rule.divergence_weight)
    g.addcmul_(chunk.q, slope.pull, value=-1.0)
    if rule.student_map.softcap is not None:
        g.mul_(_chain(student, rule.student_map, out=chunk.spare[2, :, : g.shape[-1]]))
    return _at_rate(g, rule, held=_any(slope.careful))


def _any(asked: Tensor) -> bool:
    """Whether any row asks for what is to be done; where a look would stall, it is always done."""
    return not _sync_is_free(asked) or bool(asked.any())


def _with_label_apart(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    cross_entropy: _CrossEntropy | None,
    rows: _Rows,
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
    label, student, teacher = _apart(student, teacher, labels, rows)
    max_t, max_s = teacher.amax(-1, keepdim=True).float(), student.amax(-1, keepdim=True).float()
    no_others = max_t == -torch.inf, max_s == -torch.inf
    max_t, max_s = (x.masked_fill(no, 0.0) for x, no in zip((max_t, max_s), no_others, strict=True))
    chunk, *_ = _exponentials(student, teacher, max_t, max_s, rule, spaces)
    z_1 = torch.ones_like(max_s)
    if cross_entropy is not None:
        z_1 = _softmax_of_labels(chunk, student, max_s, cross_entropy, rule).sum(-1, keepdim=True)
    _leave_out(chunk, label, *no_others)
    odds_t, odds_s = (
        _log_odds(logit, maximum, mass.sum(-1, keepdim=True), none, of_side, 1.0 / rule.temperature)
        for logit, maximum, mass, none, of_side in (
            (label.teacher, max_t, chunk.p, no_others[0], rule.teacher_map),
            (label.student, max_s, chunk.q, no_others[1], rule.student_map),
        )
    )
    odds_s = odds_s.masked_fill(~label.known, torch.nan)
    target, pull = _target(odds_t, odds_s)

    of_target = rule.divergence_weight * divergence.alpha
    q_weight = -of_target * pull
    at_label = of_target * _rate(rule) * pull
    loss = of_target * target
    if cross_entropy is not None:
        odds = _log_odds(
            label.student, max_s, z_1, no_others[1], rule.student_map, cross_entropy.unit
        ).masked_fill(~label.known, torch.nan)
        loss = loss - cross_entropy.weight * F.logsigmoid(odds)
        of_others = cross_entropy.weight * torch.sigmoid(-odds)
        at_label = at_label - of_others * (cross_entropy.unit * rule.student_map.scale)
        if cross_entropy.is_of_q:
            q_weight = q_weight + of_others
        own = torch.empty_like(max_s)
        _below_maximum(label.student, max_s, rule.student_map, out=own)
        z_1 = z_1 + own.mul_(cross_entropy.unit).exp_()
    if rule.student_map.softcap is not None:
        at_label = at_label * _chain(label.student, rule.student_map, torch.empty_like(max_s))
    at_label = at_label.clamp(-_LARGEST, _LARGEST)

    weight = rule.divergence_weight * divergence.beta
    of_rest = rule._replace(divergence=ForwardKL(), divergence_weight=weight)
    sums, slope, kept = _divergence(chunk, student, teacher, max_t, of_rest, q_weight, False)
    loss = loss + weight * sums.forward_kl

    def gradient() -> Tensor:
        of_student = _gradient(chunk, slope, kept, student, rule)
        if cross_entropy is not None:
            _add_label_gradient(of_student, chunk, student, max_s, z_1, cross_entropy, rows, rule)
        return _put(of_student, label.token, at_label)

    return _Made(loss, (max_t, max_s, z_1, *slope, at_label), stats, gradient)


def _apart(
    student: Tensor, teacher: Tensor, labels: Tensor, rows: _Rows
) -> tuple[_Label, Tensor, Tensor]:
    """The label's token, and copies of both sides [R, V] without it, where it is -inf."""
    token, known = _tokens(labels, rows, student.shape[-1])

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        logit = x.gather(-1, token.clamp(max=x.shape[-1] - 1))
        others = _put(x.clone(), token, torch.full_like(logit, -torch.inf))
        return logit.masked_fill(token >= x.shape[-1], -torch.inf), others

    (logit_s, student), (logit_t, teacher) = split(student), split(teacher)
    return _Label(token, known, logit_s, logit_t), student, teacher


def _put(x: Tensor, token: Tensor, value: Tensor) -> Tensor:
    """x[r, token[r]] = value[r], where there is such a column; in place."""
    inside = token < x.shape[-1]
    column = token.where(inside, 0)
    return x.scatter_(-1, column, value.to(x.dtype).where(inside, x.gather(-1, column)))


def _leave_out(
    chunk: _Chunk,
    label: _Label,
    no_teacher: Tensor | None = None,
    no_student: Tensor | None = None,
) -> None:
    """Give the label no part in the sums of a chunk.

    A side that has no other token is given this one, so that its sum is not 0, and d a NaN, so that
    it is noticed that no entry is kept."""
    nothing = torch.zeros_like(chunk.q[:, :1])
    no_teacher = nothing if no_teacher is None else no_teacher.float()
    no_student = nothing if no_student is None else no_student.float()
    _put(chunk.p, label.token, no_teacher)
    _put(chunk.q, label.token, no_student)
    _put(chunk.d, label.token, nothing.masked_fill(no_teacher + no_student > 0.0, torch.nan))


def _log_odds(
    logit: Tensor, maximum: Tensor, z: Tensor, none: Tensor, of_side: LogitMap, unit: float
) -> Tensor:
    """ln P/(1-P) of the label from its logit and the others' maximum and sum, all [R, 1].

    A unit of the mapped logits is so many nats; `none` is True where there are no others."""
    odds = torch.empty_like(maximum)
    _below_maximum(logit, maximum, of_side, out=odds)
    odds = (odds * unit - z.log()).clamp(-LARGEST_U, LARGEST_U)
    forbidden = logit == -torch.inf
    odds = odds.masked_fill(forbidden, -torch.inf).masked_fill(none, torch.inf)
    # NaN in the sum shows nowhere else where the label is forbidden.
    return odds.masked_fill((forbidden & none) | (logit == torch.inf) | z.isnan(), torch.nan)


def _target(odds_t: Tensor, odds_s: Tensor) -> tuple[Tensor, Tensor]:
    """KL of label and not label, and its derivative by the log-odds of the student."""
    p, not_p, q = torch.sigmoid(odds_t), torch.sigmoid(-odds_t), torch.sigmoid(odds_s)
    kl = torch.zeros_like(p)
    for mass, sign, kept in ((p, 1.0, odds_s > -torch.inf), (not_p, -1.0, odds_s < torch.inf)):
        u = F.logsigmoid(sign * odds_t) - F.logsigmoid(sign * odds_s)
        kl = kl + torch.where((mass > 0.0) & kept, mass * u, 0.0)
    p, not_p = p * (odds_s > -torch.inf), not_p * (odds_s < torch.inf)
    broken = (odds_t + odds_s).isnan() & ~(odds_t.isinf() & odds_s.isinf())
    return kl.masked_fill(broken, torch.nan), (q * (p + not_p) - p).masked_fill(broken, torch.nan)


def _head(
    chunk: _Chunk, teacher: Tensor, max_t: Tensor, z_t: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gap (in units of 1/z_t), mass and size of the head, each [R, 1] fp32.

    chunk.spare[0] holds |p - q| of the teacher's vocabulary, in the same units; the rest of it is
    written over.
    With v the logit at which the cumulative mass crosses mu, the head is every token above v and k
    of the n tokens equal to v.
    """
    divergence = rule.divergence
    assert isinstance(divergence, AdaptiveKL)
    # Metal has no fp64; its fp32 sums blur the boundary by a few more roundings.
    wide = torch.float32 if teacher.device.type == "mps" else torch.float64
    target = divergence.mu * z_t.to(wide)
    spare = chunk.spare[:, :, : chunk.p.shape[-1]]
    distance = spare[0]
    none = torch.zeros_like(target)
    window = _Window(teacher, chunk.p, distance, count_above=none, mass_above=none, gap_above=none)
    while _sync_is_free(teacher) and (width := window.logits.shape[-1]) >= 4 * _SAMPLE:
        narrower = _narrow(window, target, spare[1:, :, :width])
        if narrower is None:
            break
        window = narrower
    logits = window.logits.float()

    ranked = logits.sort(dim=-1, descending=True).values
    last = (ranked > -torch.inf).sum(-1, keepdim=True) - 1
    # In fp64, and over itself where it can be: a row of equal logits is here in its full width.
    masses = _mapped(ranked.to(wide, copy=True), rule.teacher_map)
    masses.sub_(_mapped(max_t.to(wide), rule.teacher_map)).div_(rule.temperature).exp_()
    cumulative = masses.cumsum(-1).add_(window.mass_above)
    crossing = (cumulative <= target).sum(-1, keepdim=True).minimum(last).clamp(min=0)
    v, mass_v = ranked.gather(-1, crossing), masses.gather(-1, crossing)

    above, tied = logits > v, logits == v
    first, n = above.sum(-1, keepdim=True), tied.sum(-1, keepdim=True)
    count = window.count_above + first
    mass = cumulative.gather(-1, first) - masses.gather(-1, first)
    del ranked, masses, cumulative
    seats = (target - mass) / mass_v.clamp(min=torch.finfo(wide).tiny)
    seats = seats.floor() if divergence.head == "exclusive" else seats.ceil()
    k = seats.clamp(min=0).minimum(n).maximum(1 - count)

    if divergence.ties == "stable":
        share = (tied & (tied.cumsum(-1, dtype=torch.int32) <= k)).float()
    else:
        share = tied * (k / n).float()
    gap = window.gap_above + share.add_(above).mul_(window.distance).sum(-1, keepdim=True)
    return gap.float(), ((mass + k * mass_v) / z_t).float(), (count + k).float()


class _Window(NamedTuple):
    """K tokens of each row, in index order, among which the crossing logit is.

    The sums are over the tokens above all of these: they belong to the head.
    """

    logits: Tensor  # [R, K], padded with -inf
    p: Tensor  # [R, K] fp32
    distance: Tensor  # [R, K] fp32
    count_above: Tensor  # [R, 1] fp64
    mass_above: Tensor  # [R, 1] fp64
    gap_above: Tensor  # [R, 1] fp64


def _narrow(window: _Window, target: Tensor, spare: Tensor) -> _Window | None:
    """A window about a tenth as wide, certain to hold the crossing logit; None if it stays wide.

    One token in so many is sampled. Light tokens are many and well sampled, so the mass down to a
    logit is what the sample's tail leaves over: that gives a bound on either side of the crossing.
    The true masses above the bounds then prove the guess; where it fails, a bound moves away.
    Comparisons write 0 or 1 into fp32, which is several times as fast as into bool.
    """
    logits, p, distance, *_ = window
    above, inside = spare
    rows, width = logits.shape
    stride = width // _SAMPLE
    sample, order = logits[:, ::stride].float().sort(dim=-1, descending=True)
    masses = p[:, ::stride].gather(-1, order).double() * stride
    below = masses.sum(-1, keepdim=True) - masses.cumsum(-1)
    total = window.mass_above + p.sum(-1, keepdim=True)
    rank = (total - below <= target).sum(-1, keepdim=True)
    spread = (2 * rank).float().sqrt().long() + 1
    low, high = rank + spread, rank - spread
    end = sample.shape[-1]
    while True:
        # No lower than the lowest number: a token at -inf is in no head.
        lower = sample.gather(-1, low.clamp(max=end - 1)).masked_fill(low >= end, -torch.inf)
        lower.clamp_(min=torch.finfo(torch.float32).min)
        upper = sample.gather(-1, high.clamp(min=0)).masked_fill(high < 0, torch.inf)
        torch.gt(logits, upper, out=above)
        count_above = window.count_above + above.sum(-1, keepdim=True)
        gap_above = window.gap_above + torch.mul(above, distance, out=inside).sum(-1, keepdim=True)
        mass_above = window.mass_above + torch.mul(above, p, out=inside).sum(-1, keepdim=True)
        torch.ge(logits, lower, out=inside).sub_(above)
        mass_inside = torch.mul(inside, p, out=above).sum(-1, keepdim=True)
        short = (mass_above + mass_inside <= target) & (low < end)
        over = (mass_above > target) & (high >= 0)
        if not (short | over).any():
            break
        low = torch.where(short, low + 2 * (low - rank), low)
        high = torch.where(over, high - 2 * (rank - high), high)

    widest = int(inside.sum(-1).max())
    if widest > width // 2:
        return None  # mostly one large group of ties
    row, token = inside.bool().nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device).sub_((count.cumsum(0) - count)[row])

    def pack(x: Tensor, padding: float) -> Tensor:
        packed = x.new_full((rows, max(widest, 1)), padding, dtype=torch.float32)
        packed[row, place] = x[row, token].float()
        return packed

    return _Window(
        pack(logits, -torch.inf),
        pack(p, 0.0),
        pack(distance, 0.0),
        count_above=count_above,
        mass_above=mass_above,
        gap_above=gap_above,
    )
