"""The exponentials of a chunk of rows, from which all sums of the PyTorch backend are made."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .divergences import Rule, TwoKL
from .rows import LogitMap

LOG2_E = math.log2(math.e)
LARGEST = torch.finfo(torch.bfloat16).max  # finite in every dtype of that range
SMALLEST = torch.finfo(torch.float32).tiny
HUGE = 2.0**100  # sums this large, in logits or in nats, are taken with care
STEEP = 2.0**20  # and everything where a unit of the logits is this many nats

Rows: TypeAlias = slice | Tensor  # a run of rows, or the indices of scattered ones


class Chunk(NamedTuple):
    """The exponentials of R rows relative to their maxima; V is the vocabulary both sides share."""

    d: Tensor  # [R, V] (t - max t) - (s - max s), of the logits that the maps give
    p: Tensor  # [R, V_t] exp((t - max t) / T)
    q: Tensor  # [R, V_s] exp((s - max s) / T)
    x: Tensor  # [R, V_t] t - max t, of which p takes the place where the loss is of the two KLs
    y: Tensor  # [R, V_s] s - max s, in spare[0], or of the two KLs in the place of q
    spare: Tensor  # [1 or 3, R, max(V_s, V_t)] free for use, but for y and for d, in spare[1]


def exponentials(
    student: Tensor,
    teacher: Tensor,
    max_t: Tensor | None,
    max_s: Tensor | None,
    rule: Rule,
    spaces: Tensor,
    with_d: bool = True,
) -> tuple[Chunk, Tensor, Tensor]:
    """The chunk, and the maxima, which are looked for where they are not given.

    Without d, what is in its place is not defined."""
    rows, v_t, v_s = teacher.shape[0], teacher.shape[-1], student.shape[-1]
    first, p, q, *_ = spaces[:, :rows].unbind()
    p, q, spare, shared = p[:, :v_t], q[:, :v_s], spaces[3:, :rows], min(v_t, v_s)
    if isinstance(rule.divergence, TwoKL):
        x, y, d = p, q, first[:, :shared]
    else:
        x, y, d = first[:, :v_t], spare[0, :, :v_s], spare[1, :, :shared]
    max_t = below_maximum(teacher, max_t, rule.teacher_map, out=x)
    max_s = below_maximum(student, max_s, rule.student_map, out=y)
    if with_d:
        torch.sub(x[:, :shared], y[:, :shared], out=d)
    # exp2 is vectorised everywhere, exp only at half its speed.
    torch.mul(x, LOG2_E / rule.temperature, out=p).exp2_()
    torch.mul(y, LOG2_E / rule.temperature, out=q).exp2_()
    return Chunk(d, p, q, x, y, spare), max_t, max_s


def below_maximum(x: Tensor, maximum: Tensor | None, logit_map: LogitMap, out: Tensor) -> Tensor:
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
    out.masked_fill_(x == -torch.inf, -torch.inf).sub_(mapped(maximum, logit_map))
    return maximum


def mapped(x: Tensor, logit_map: LogitMap) -> Tensor:
    softcap, scale = logit_map
    if softcap is None:
        return x if scale == 1.0 else x * scale
    return torch.where(x.isinf(), x, torch.tanh(x * _gain(logit_map)) * softcap)


def _gain(logit_map: LogitMap) -> float:
    """The factor from a logit to the argument of tanh, held so that 0 times it is 0."""
    assert logit_map.softcap is not None
    return min(logit_map.scale / logit_map.softcap, LARGEST)


def softcap_slope(student: Tensor, student_map: LogitMap, out: Tensor | None = None) -> Tensor:
    """1 / cosh^2, the derivative of a capped logit; its scale is in the rate.

    1 - tanh^2 would cancel where the softcap saturates."""
    if out is None:
        out = torch.empty_like(student, dtype=torch.float32)
    return out.copy_(student).mul_(_gain(student_map)).cosh_().square_().reciprocal_()


def at_rate(gradient: Tensor, rule: Rule, *, held: bool) -> Tensor:
    """The derivative by a logit as the model gives it, of one by nats; in place."""
    rate = rate_of(rule)
    if rate != 1.0:
        gradient.mul_(rate)
    return gradient.clamp_(-LARGEST, LARGEST) if held else gradient


def rate_of(rule: Rule) -> float:
    """Nats that a unit of the student's logits is worth, where they are not capped."""
    return min(rule.rate, LARGEST)


def rescaled(rule: Rule) -> Rule:
    """The same losses with T < 2: both sides' logits are divided by a power of two."""
    temperature = max(rule.temperature, SMALLEST)
    power = _power_of_two(min(max(temperature, 1.0), HUGE))

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


def sync_is_free(x: Tensor) -> bool:
    """Whether Python may look at values without stalling the device."""
    return x.device.type == "cpu"


def wanted_by_any(asked: Tensor) -> bool:
    """Whether any row asks for what is to be done; where a look would stall, it is always done."""
    return not sync_is_free(asked) or bool(asked.any())
