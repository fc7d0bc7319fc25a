"""Adaptive KL in plain PyTorch: the backend for CPU, MPS and wherever Triton is not.

Rows are taken a few at a time through a handful of fp32 work spaces that stay in the cache, so
nothing of the logits' size is ever allocated. On a CPU nothing is sorted but a sample of each row
and the few tokens around the head's boundary: see `_narrow`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .rows import STATE_WIDTH, STATS, LogitMap, RowResult, damping

TEMPORARY_BYTES = 64 * 2**20  # budget for the temporaries of a call; at least one row is taken
_BYTES_PER_LOGIT = 96  # of temporaries at worst: work spaces, masks, a sort and its fp64 sums
_CPU_CHUNK = 2**19  # logits in one work space on a CPU: the six of them stay in its cache
_SAMPLE = 256  # tokens that stand for a row when the head's last logit is guessed
_LOG2_E = math.log2(math.e)
IDENTITY = LogitMap()

_Rows: TypeAlias = slice | Tensor  # a run of rows, or the indices of scattered ones


class _Options(NamedTuple):
    mu: float
    temperature: float
    head: str
    ties: str
    weight: float | None  # None: the adaptive weight
    student_map: LogitMap
    teacher_map: LogitMap


class _Chunk(NamedTuple):
    """The exponentials of R rows relative to their maxima; V is the vocabulary both sides share."""

    d: Tensor  # [R, V] (t - max t) - (s - max s), of the logits that the maps give
    p: Tensor  # [R, V_t] exp((t - max t) / T)
    q: Tensor  # [R, V_s] exp((s - max s) / T)
    spare: Tensor  # [3, R, max(V_s, V_t)] free for use


class _Slope(NamedTuple):
    """Row constants of dloss/dstudent = q (a - k d) - b p, or q a_dropped where a side is -inf."""

    a: Tensor  # each [R, 1] fp32
    a_dropped: Tensor
    k: Tensor
    b: Tensor
    drops: Tensor  # 1 where the row has such a token


class _RowStats(NamedTuple):
    """Each [R, 1] fp32, in the order of STATS."""

    forward_kl: Tensor
    reverse_kl: Tensor
    head_weight: Tensor
    head_mass: Tensor
    head_size: Tensor
    gap: Tensor


def forward(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    *,
    mu: float,
    temperature: float,
    head: str,
    ties: str,
    weight: float | None,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
) -> RowResult:
    """Loss, backward state and statistics of every row that counts; zeros for the others.

    Shape:
        student [N, V_s], teacher [N, V_t], counted [N] bool or None where all rows count.
    Dtype:
        fp32, bf16 or fp16, also mixed; computed and returned in fp32.
    With a fixed weight there is no head: head_mass and head_size are then NaN.
    """
    options = _Options(mu, temperature, head, ties, weight, student_map, teacher_map)
    return _sweep(student, teacher, counted, options)


def forward_with_gradient(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    upstream: Tensor,
    *,
    mu: float,
    temperature: float,
    head: str,
    ties: str,
    weight: float | None,
    out: Tensor,
    damped: bool = False,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
) -> RowResult:
    """As `forward`, and upstream [N] * dloss/dstudent into out [N, V_s], which may be student.

    `damped` divides the gradient of a row by `damping` of its loss."""
    options = _Options(mu, temperature, head, ties, weight, student_map, teacher_map)
    return _sweep(student, teacher, counted, options, upstream, out, damped)


def backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    state: Tensor,
    *,
    temperature: float,
    out: Tensor,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
) -> None:
    """upstream [N] * dloss/dstudent into out [N, V_s], which may be student."""
    spaces = _work_spaces(student, teacher)
    for rows in _chunks(counted, student, spaces):
        max_t, max_s, *constants, _ = state[rows, :, None].unbind(1)
        slope = _Slope(*constants)
        s, t, maps = student[rows], teacher[rows], (student_map, teacher_map)
        chunk = _exponentials(s, t, max_t, max_s, temperature, maps, spaces)
        looks_kept = _sync_is_free(student) and not slope.drops.any()
        kept = None if looks_kept else _keep(chunk.d)
        _write_gradient(chunk, slope, kept, upstream[rows], s, student_map, out, rows)
    _clear_uncounted(out, counted)


def _sweep(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    options: _Options,
    upstream: Tensor | None = None,
    out: Tensor | None = None,
    damped: bool = False,
) -> RowResult:
    n, device = student.shape[0], student.device
    result = RowResult(
        loss=torch.zeros(n, device=device),
        state=torch.zeros(n, STATE_WIDTH, device=device),
        stats=torch.zeros(n, len(STATS), device=device),
    )
    spaces = _work_spaces(student, teacher)
    for rows in _chunks(counted, student, spaces):
        s, t = student[rows], teacher[rows]
        max_t, max_s = t.amax(-1, keepdim=True).float(), s.amax(-1, keepdim=True).float()
        maps = options.student_map, options.teacher_map
        chunk = _exponentials(s, t, max_t, max_s, options.temperature, maps, spaces)
        stats, slope, kept = _divergence(chunk, t, max_t, options)
        w = stats.head_weight
        loss = w * stats.forward_kl + (1.0 - w) * stats.reverse_kl
        result.loss[rows] = loss.squeeze(-1)
        result.state[rows, : 2 + len(slope)] = torch.cat((max_t, max_s, *slope), dim=-1)
        result.stats[rows] = torch.cat(stats, dim=-1)
        if upstream is not None and out is not None:
            g = upstream[rows]
            if damped:
                g = g / damping(loss.squeeze(-1))
            _write_gradient(chunk, slope, kept, g, s, options.student_map, out, rows)
    for rows_of in result:
        _clear_uncounted(rows_of, counted)
    if out is not None:
        _clear_uncounted(out, counted)
    return result


def _work_spaces(student: Tensor, teacher: Tensor) -> Tensor:
    """[6, R, max(V_s, V_t)] fp32, used again by every chunk of R rows."""
    vocabulary = max(student.shape[-1], teacher.shape[-1])
    rows = TEMPORARY_BYTES // (_BYTES_PER_LOGIT * vocabulary)
    if _sync_is_free(student):
        rows = min(rows, _CPU_CHUNK // vocabulary)
    rows = min(max(rows, 1), student.shape[0])
    return torch.empty(6, rows, vocabulary, dtype=torch.float32, device=student.device)


def _sync_is_free(x: Tensor) -> bool:
    """Whether Python may look at values without stalling the device."""
    return x.device.type == "cpu"


def _chunks(counted: Tensor | None, student: Tensor, spaces: Tensor) -> Iterator[_Rows]:
    """The rows, as many at a time as the spaces hold; where looking stalls, uncounted ones too."""
    n, step = student.shape[0], max(spaces.shape[1], 1)
    if counted is None or not _sync_is_free(student):
        yield from (slice(start, min(start + step, n)) for start in range(0, n, step))
        return
    rows = counted.nonzero().flatten()
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        first, end = int(some[0]), int(some[-1]) + 1
        # A run can be read where it lies; scattered rows have to be gathered.
        yield slice(first, end) if end - first == len(some) else some


def _clear_uncounted(x: Tensor, counted: Tensor | None) -> None:
    """Zero the rows of x that do not count, NaN included."""
    if counted is None:
        return
    if _sync_is_free(x):
        x.index_fill_(0, (~counted).nonzero().flatten(), 0.0)
    else:
        x.masked_fill_(~counted.view(-1, *[1] * (x.dim() - 1)), 0.0)


def _exponentials(
    student: Tensor,
    teacher: Tensor,
    max_t: Tensor,
    max_s: Tensor,
    temperature: float,
    maps: tuple[LogitMap, LogitMap],
    spaces: Tensor,
) -> _Chunk:
    rows, v_t, v_s = teacher.shape[0], teacher.shape[-1], student.shape[-1]
    x, p = spaces[:2, :rows, :v_t]
    q, y = spaces[2:4, :rows, :v_s]
    student_map, teacher_map = maps
    _below_maximum(teacher, max_t, teacher_map, out=x)
    _below_maximum(student, max_s, student_map, out=y)
    # exp2 is vectorised everywhere, exp only at half its speed.
    torch.mul(x, _LOG2_E / temperature, out=p).exp2_()
    torch.mul(y, _LOG2_E / temperature, out=q).exp2_()
    shared = min(v_t, v_s)
    d = x[:, :shared].sub_(y[:, :shared])
    return _Chunk(d, p, q, spare=spaces[3:, :rows])


def _below_maximum(x: Tensor, maximum: Tensor, logit_map: LogitMap, out: Tensor) -> None:
    """The logits of x [R, V], less that of `maximum` [R, 1], into out [R, V] fp32."""
    softcap, scale = logit_map
    if softcap is None:
        torch.sub(x, maximum, out=out)
        if scale != 1.0:
            out.mul_(scale)
        return
    out.copy_(x).mul_(scale / softcap).tanh_().mul_(softcap).sub_(_mapped(maximum, logit_map))
    out.masked_fill_(x == -torch.inf, -torch.inf).masked_fill_(x == torch.inf, torch.nan)


def _mapped(x: Tensor, logit_map: LogitMap) -> Tensor:
    softcap, scale = logit_map
    if softcap is None:
        return x if scale == 1.0 else x * scale
    return torch.where(x.isinf(), x, torch.tanh(x * (scale / softcap)) * softcap)


def _keep(d: Tensor) -> Tensor:
    """Zero d where a side is -inf; gives [R, V] fp32, 0 there and 1 elsewhere."""
    kept = (d - d).eq_(0.0)
    d.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return kept


def _divergence(
    chunk: _Chunk, teacher: Tensor, max_t: Tensor, options: _Options
) -> tuple[_RowStats, _Slope, Tensor | None]:
    """Statistics of R rows, what their gradient needs, and which entries of d are kept."""
    d, p, q, spare = chunk
    distance = spare[0, :, : p.shape[-1]]
    shared, temperature = d.shape[-1], options.temperature
    p_shared, q_shared = p[:, :shared], q[:, :shared]
    z_t, z_s = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)

    product = distance[:, :shared]

    def mean_d(weights: Tensor, z: Tensor) -> Tensor:
        return torch.mul(weights, d, out=product).sum(-1, keepdim=True) / (temperature * z)

    p_d, q_d = mean_d(p_shared, z_t), mean_d(q_shared, z_s)
    kept = None
    p_kept = p_shared.sum(-1, keepdim=True) / z_t
    q_kept = q_shared.sum(-1, keepdim=True) / z_s
    if not _sync_is_free(d) or not bool((p_d + q_d).isfinite().all()):
        kept = _keep(d)
        p_d, q_d = mean_d(p_shared, z_t), mean_d(q_shared, z_s)
        p_kept = torch.mul(p_shared, kept, out=product).sum(-1, keepdim=True) / z_t
        q_kept = torch.mul(q_shared, kept, out=product).sum(-1, keepdim=True) / z_s
    # u = d/T - c. From the quotient, c stays accurate where p is close to q.
    c = (z_t / z_s).log()
    forward_kl = p_d - c * p_kept
    reverse_kl = c * q_kept - q_d

    # |p - q|, in units of 1/z_t.
    torch.addcmul(p_shared, q_shared, z_t / z_s, value=-1, out=distance[:, :shared])
    distance[:, shared:] = p[:, shared:]
    distance.abs_()
    only_student = q[:, shared:].sum(-1, keepdim=True) * (z_t / z_s)
    gap = distance.sum(-1, keepdim=True) + only_student

    if options.weight is None:
        g_head, mass, size = _head(chunk, teacher, max_t, z_t, options)
        w = torch.where(gap == 0.0, 0.5, g_head / gap).clamp(max=1.0)
    else:
        w = torch.full_like(gap, options.weight)
        mass = size = torch.full_like(gap, torch.nan)
    w, mass, size = (x.masked_fill(gap.isnan(), torch.nan) for x in (w, mass, size))

    stats = _RowStats(forward_kl, reverse_kl, w, mass, size, gap / z_t)
    rate = options.student_map.scale / temperature
    of_q = rate / z_s
    slope = _Slope(
        a=(w * p_kept + (1.0 - w) * ((1.0 - q_kept) + c - reverse_kl)) * of_q,
        a_dropped=(w * p_kept - (1.0 - w) * (q_kept + reverse_kl)) * of_q,
        k=(1.0 - w) / temperature * of_q,
        b=w * rate / z_t,
        drops=torch.zeros_like(w) if kept is None else 1.0 - kept.amin(-1, keepdim=True),
    )
    return stats, slope, kept


def _write_gradient(
    chunk: _Chunk,
    slope: _Slope,
    kept: Tensor | None,
    upstream: Tensor,
    student: Tensor,
    student_map: LogitMap,
    out: Tensor,
    rows: _Rows,
) -> None:
    """out[rows] = upstream * dloss/dstudent. Uses up the chunk."""
    d, p, q = chunk.d, chunk.p[:, : chunk.d.shape[-1]], chunk.q
    shared = d.shape[-1]
    softcap, scale = student_map
    if softcap is not None:  # 1 - tanh^2; the scale is in the slope
        chain = chunk.spare[2, :, : q.shape[-1]]
        chain.copy_(student).mul_(scale / softcap).tanh_().square_().neg_().add_(1.0)
        q.mul_(chain)
        p.mul_(chain[:, :shared])
    a, a_dropped, k, b, _ = (x * upstream.float()[:, None] for x in slope)
    d.mul_(-k)
    if kept is None:
        d.add_(a)
    else:
        d.addcmul_(kept, a - a_dropped).add_(a_dropped)
        p.mul_(kept)
    d.mul_(q[:, :shared])
    here = isinstance(rows, slice)
    gradient = out[rows] if here else out.new_empty(d.shape[0], out.shape[-1])
    torch.addcmul(d, p, b, value=-1, out=gradient[:, :shared])
    torch.mul(q[:, shared:], a_dropped, out=gradient[:, shared:])
    if not here:
        out[rows] = gradient


def _head(
    chunk: _Chunk, teacher: Tensor, max_t: Tensor, z_t: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gap (in units of 1/z_t), mass and size of the head, each [R, 1] fp32.

    chunk.spare[0] holds |p - q| of the teacher's vocabulary, in the same units; the rest of it is
    written over.
    With v the logit at which the cumulative mass crosses mu, the head is every token above v and k
    of the n tokens equal to v.
    """
    # Metal has no fp64; its fp32 sums blur the boundary by a few more roundings.
    wide = torch.float32 if teacher.device.type == "mps" else torch.float64
    target = options.mu * z_t.to(wide)
    spare = chunk.spare[:, :, : chunk.p.shape[-1]]
    distance = spare[0]
    none = torch.zeros_like(target)
    window = _Window(teacher, chunk.p, distance, count_above=none, mass_above=none, gap_above=none)
    while _sync_is_free(teacher) and (width := window.logits.shape[-1]) >= 4 * _SAMPLE:
        window = _narrow(window, target, spare[1:, :, :width])
        if window.logits.shape[-1] > width // 2:
            break  # mostly one large group of ties
    logits = window.logits.float()

    ranked = logits.sort(dim=-1, descending=True).values
    below = _mapped(ranked.to(wide), options.teacher_map) - _mapped(max_t, options.teacher_map)
    masses = (below / options.temperature).exp_()
    cumulative = window.mass_above + masses.cumsum(-1)
    last = (ranked > -torch.inf).sum(-1, keepdim=True) - 1
    crossing = (cumulative <= target).sum(-1, keepdim=True).minimum(last).clamp(min=0)
    v, mass_v = ranked.gather(-1, crossing), masses.gather(-1, crossing)

    above, tied = logits > v, logits == v
    first, n = above.sum(-1, keepdim=True), tied.sum(-1, keepdim=True)
    count = window.count_above + first
    mass = (cumulative - masses).gather(-1, first)
    seats = (target - mass) / mass_v.clamp(min=torch.finfo(wide).tiny)
    seats = seats.floor() if options.head == "exclusive" else seats.ceil()
    k = seats.clamp(min=0).minimum(n).maximum(1 - count)

    stable = options.ties == "stable"
    share = tied & (tied.cumsum(-1) <= k) if stable else tied * (k / n)
    gap = window.gap_above + ((above + share) * window.distance).sum(-1, keepdim=True)
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


def _narrow(window: _Window, target: Tensor, spare: Tensor) -> _Window:
    """A window about a tenth as wide, certain to hold the crossing logit.

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
    spread = (2.0 * rank).sqrt().long() + 1
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

    row, token = inside.bool().nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    shape = (rows, max(int(count.max()), 1))

    def pack(x: Tensor, padding: float) -> Tensor:
        packed = torch.full(shape, padding)
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
