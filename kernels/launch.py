"""Launchers: they choose the launch and give the kernels their arguments.

Nothing of size [N, V] is allocated here: outputs come from the caller.
"""

import contextlib
from collections.abc import Callable

import torch
import triton
from triton.runtime import driver

from .launch_table import Launch, launch_for
from .pairs import pairs_gradient_kernel, pairs_kernel
from .row_kernels import backward_kernel, forward_kernel, rescale_kernel
from .shards import shard_masses_kernel, shard_statistics_kernel, shard_sums_kernel
from .tuning import is_autotuning, tuned_launch

LOG2E = 1.4426950408889634
LARGEST_LEAD = 7  # elements before a row, from a 16-byte boundary on
FEWEST_PAIRS = 32  # a warp has as many threads


def forward(
    student: torch.Tensor,  # [outer, inner, V_s] fp32 | bf16 | fp16, unit stride in V
    teacher: torch.Tensor,  # [outer, inner, V_t]
    valid: torch.Tensor | None,  # [N] bool, N = outer * inner
    labels: torch.Tensor | None,  # [N] int32 | int64, or None where the loss needs none
    loss: torch.Tensor,  # [N] fp32
    state: torch.Tensor | None,  # [N, 12] fp32, or None with a gradient
    stats: torch.Tensor | None,  # [N, 10] fp32, or None where nobody asks
    *,
    mu: float,
    temperature: float,
    inclusive: bool,
    stable: bool,
    weight: float | None,  # None: each token has its own, by its head or by tau
    tau: float | None = None,  # the entropy of the teacher above which there is a forward KL
    divergence_weight: float = 1.0,
    label_weight: float = 0.0,
    terms: Callable | None = None,  # of terms.py, in the place of the weighted KLs
    numbers: tuple[float, ...] = (),  # of the terms, at most two
    limits: tuple[bool, bool] = (True, True),  # whether the terms have one at (p, 0), at (0, q)
    eta: float | None = None,  # of the forward KL that is mixed with the terms
    parts: tuple[float, float] | None = None,  # alpha and beta of a decoupled loss
    student_softcap: float | None = None,  # logit = softcap tanh(logit_scale x / softcap)
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    gradient: torch.Tensor | None = None,  # [outer, inner, V_s] student's dtype; may be student
    upstream: torch.Tensor | None = None,  # [N] fp32, any stride
    damped: bool = False,  # divide the gradient of a row by `damping` of its loss
    rest: bool = False,  # whether the last token stands for others, and is in no head
) -> None:
    """Launch forward_kernel, which also writes the gradient where one is given."""
    maps = _maps(
        temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
    )
    has_head = weight is None and terms is None and tau is None
    arguments = dict(
        s_ptr=student,
        t_ptr=teacher,
        valid_ptr=valid,
        labels_ptr=labels,
        loss_ptr=loss,
        state_ptr=state,
        stats_ptr=stats,
        ds_ptr=gradient,
        upstream_ptr=upstream,
        stride_upstream=0 if upstream is None else upstream.stride(0),
        rate=_fp32(divergence_weight * student_logit_scale / temperature),
        label_rate=_fp32(label_weight * student_logit_scale),
        **maps,
        mu=mu,
        tau=tau or 0.0,
        eta=eta or 0.0,
        alpha=0.0 if parts is None else float(parts[0]),
        beta=0.0 if parts is None else float(parts[1]),
        forward_weight=_forward_weight(weight, terms, parts),
        divergence_weight=divergence_weight,
        label_weight=label_weight,
        **_of_terms(terms, numbers, limits, eta, parts, maps),
        HAS_HEAD=has_head,
        REST=rest and has_head,
        SWITCHES=tau is not None,
        INCLUSIVE=inclusive,
        STABLE=stable,
        FORWARD=stats is not None
        or (weight != 0.0 if terms is None else eta is not None or parts is not None),
        REVERSE=(terms is None and weight != 1.0) or stats is not None,
        STATS=stats is not None,
        **_of_labels(labels, temperature, apart=parts is not None and terms is None),
        HAS_MASK=valid is not None,
        HAS_GRADIENT=gradient is not None,
        DAMPED=damped,
        **_addressing(student, teacher, student if gradient is None else gradient),
    )
    with_statistics = stats is not None or has_head
    name = "head or statistics" if with_statistics else "terms" if terms else "fixed weight"
    name = "entries of pairs" if rest else name
    _launch(forward_kernel, name, loss.shape[0], arguments, in_one_block=rest)


def backward(
    gradient: torch.Tensor,  # [outer, inner, V_s] student's dtype; may be student itself
    student: torch.Tensor,  # [outer, inner, V_s]
    teacher: torch.Tensor,  # [outer, inner, V_t]
    valid: torch.Tensor | None,  # [N] bool
    labels: torch.Tensor | None,  # [N] int32 | int64
    state: torch.Tensor,  # [N, 12] fp32 of forward
    upstream: torch.Tensor,  # [N] fp32, any stride
    *,
    temperature: float,
    weight: float | None,  # as in `forward`
    label_weight: float = 0.0,
    terms: Callable | None = None,  # as in `forward`
    numbers: tuple[float, ...] = (),
    limits: tuple[bool, bool] = (True, True),
    eta: float | None = None,
    parts: tuple[float, float] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> None:
    """Launch backward_kernel."""
    softcap = student_softcap or teacher_softcap
    maps = _maps(
        temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
    )
    arguments = dict(
        ds_ptr=gradient,
        s_ptr=student,
        t_ptr=teacher,
        valid_ptr=valid,
        labels_ptr=labels,
        state_ptr=state,
        upstream_ptr=upstream,
        stride_upstream=upstream.stride(0),
        label_rate=_fp32(label_weight * student_logit_scale),
        **maps,
        **_of_terms(terms, numbers, limits, eta, parts, maps),
        FORWARD=weight != 0.0,
        REVERSE=weight != 1.0,
        **_of_labels(labels, temperature, apart=parts is not None and terms is None),
        HAS_MASK=valid is not None,
        **_addressing(student, teacher, gradient),
    )
    name = "gradient of terms" if terms else "gradient with a softcap" if softcap else "gradient"
    _launch(backward_kernel, name, upstream.shape[0], arguments)


def pairs(
    student: torch.Tensor,  # [outer, inner, V] fp32 | bf16 | fp16, unit stride in V
    ids: torch.Tensor,  # [N, k] int32, ascending, ABSENT last; contiguous
    teacher: torch.Tensor,  # [N, k + 1] fp32, ln p of the pairs and of the rest; contiguous
    valid: torch.Tensor | None,  # [N] bool, N = outer * inner
    labels: torch.Tensor | None,  # [N] int32 | int64
    log_q: torch.Tensor,  # [N, k + 1] fp32
    state: torch.Tensor,  # [N, 8] fp32
    of_student: torch.Tensor,  # [N, 4] fp32: layout.OF_STUDENT, and the largest logit
    *,
    temperature: float,
    rest: bool,  # whether the rest is an entry
    statistics: bool,  # whether entropy and agreement are wanted
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
) -> None:
    """Launch pairs_kernel."""
    arguments = dict(
        s_ptr=student,
        ids_ptr=ids,
        t_ptr=teacher,
        valid_ptr=valid,
        labels_ptr=labels,
        log_q_ptr=log_q,
        state_ptr=state,
        of_student_ptr=of_student,
        **_of_pairs(student, ids, temperature, student_softcap, student_logit_scale),
        REST=rest,
        STATS=statistics,
        HAS_LABELS=labels is not None,
        UNTEMPERED=labels is not None and temperature != 1.0,
        HAS_MASK=valid is not None,
    )
    _launch(pairs_kernel, "pairs", ids.shape[0], arguments)


def pairs_backward(
    gradient: torch.Tensor,  # [outer, inner, V] student's dtype; may be student itself
    student: torch.Tensor,  # [outer, inner, V]
    ids: torch.Tensor,  # [N, k] int32, as in `pairs`
    valid: torch.Tensor | None,  # [N] bool
    labels: torch.Tensor | None,  # [N] int32 | int64
    state: torch.Tensor,  # [N, 8] fp32 of pairs
    of_pairs: torch.Tensor,  # [N, k + 1] fp32, the gradient of log_q; contiguous
    of_label: torch.Tensor | None,  # [N] fp32, that of the cross-entropy; contiguous
    *,
    temperature: float,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
) -> None:
    """Launch pairs_gradient_kernel."""
    arguments = dict(
        ds_ptr=gradient,
        s_ptr=student,
        ids_ptr=ids,
        valid_ptr=valid,
        labels_ptr=labels,
        state_ptr=state,
        of_pairs_ptr=of_pairs,
        of_label_ptr=of_label,
        outer_ds=gradient.stride(0),
        inner_ds=gradient.stride(1),
        DS_ALIGNED=_lead(gradient) == _lead(student),
        **_of_pairs(student, ids, temperature, student_softcap, student_logit_scale),
        rate=_fp32(student_logit_scale / temperature),
        label_rate=_fp32(student_logit_scale),
        HAS_LABELS=labels is not None,
        UNTEMPERED=labels is not None and temperature != 1.0,
        HAS_MASK=valid is not None,
    )
    _launch(pairs_gradient_kernel, "gradient of pairs", ids.shape[0], arguments)


def shard_statistics(
    student: torch.Tensor,  # [outer, inner, V_s] a shard of the logits, unit stride in V
    teacher: torch.Tensor,  # [outer, inner, V_t]
    valid: torch.Tensor | None,  # [N] bool, N = outer * inner
    labels: torch.Tensor | None,  # [N] int64 token of the shard, or -1
    out: torch.Tensor,  # [N, W] fp32: layout.SHARD_STATISTICS, and what finds a head
    blocks: torch.Tensor,  # [N, 2] fp32
    *,
    temperature: float,
    mu: float | None,  # of the head, None without one
    statistics: bool,
    entropy: bool,  # whether that of the teacher is wanted in any case
    kls: tuple[bool, bool],  # whether the forward and the reverse one are
    apart: bool,  # whether the label is left out
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> None:
    """Launch shard_statistics_kernel."""
    arguments = dict(
        s_ptr=student,
        t_ptr=teacher,
        valid_ptr=valid,
        labels_ptr=labels,
        out_ptr=out,
        blocks_ptr=blocks,
        **_of_shard(student, teacher),
        **_maps(
            temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
        ),
        mu=mu or 0.0,
        HAS_HEAD=mu is not None,
        STATS=statistics,
        ENTROPY=entropy,
        FORWARD=kls[0],
        REVERSE=kls[1],
        **_of_labels(labels, temperature, apart=apart),
        HAS_MASK=valid is not None,
    )
    name = "fixed weight" if mu is None and not statistics else "head or statistics"
    _launch(shard_statistics_kernel, name, out.shape[0], arguments)


def shard_masses(
    teacher: torch.Tensor,  # [outer, inner, V_t] a shard of the logits, unit stride in V
    rows: torch.Tensor,  # [M] int64
    asked: torch.Tensor,  # [M, SHARD_PIVOTS + 3] fp32: pivots, reference, low, high
    out: torch.Tensor,  # [M, SHARD_PIVOTS + 2] fp32
    *,
    temperature: float,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
) -> None:
    """Launch shard_masses_kernel."""
    maps = _maps(temperature, None, teacher_softcap, 1.0, teacher_logit_scale)
    lead = _lead(teacher)
    launch = launch_for("masses", teacher.shape[2])
    with _device_of(teacher):
        shard_masses_kernel[(rows.shape[0],)](
            t_ptr=teacher,
            rows_ptr=rows,
            asked_ptr=asked,
            out_ptr=out,
            outer_t=teacher.stride(0),
            inner_t=teacher.stride(1),
            inner=teacher.shape[1],
            V_t=teacher.shape[2],
            base_lead=lead[0],
            scale_t=maps["scale_t"],
            gain_t=maps["gain_t"],
            HAS_LEAD=any(lead),
            **_options(launch),
        )


def shard_sums(
    student: torch.Tensor,  # [outer, inner, V_s] a shard of the logits, unit stride in V
    teacher: torch.Tensor,  # [outer, inner, V_t]
    valid: torch.Tensor | None,  # [N] bool
    softmaxes: torch.Tensor,  # [N, 5] fp32: reference and Z of teacher and student, pivot
    boundary: torch.Tensor | None,  # [N, 3] fp32: crossing, taken, ties; with a head
    blocks: torch.Tensor,  # [N, 2] fp32 of shard_statistics, brought up to date
    out: torch.Tensor,  # [N, 6] fp32: layout.SHARD_SUMS
    *,
    temperature: float,
    stable: bool,
    statistics: bool,
    terms: Callable | None = None,  # as in `forward`
    numbers: tuple[float, ...] = (),
    limits: tuple[bool, bool] = (True, True),
    eta: float | None = None,
    parts: tuple[float, float] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> None:
    """Launch shard_sums_kernel."""
    maps = _maps(
        temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
    )
    of_terms = _of_terms(terms, numbers, limits, eta, parts, maps)
    del maps["scale_1"], of_terms["HYBRID"]
    arguments = dict(
        s_ptr=student,
        t_ptr=teacher,
        valid_ptr=valid,
        softmax_ptr=softmaxes,
        boundary_ptr=boundary,
        blocks_ptr=blocks,
        out_ptr=out,
        **_of_shard(student, teacher),
        **maps,
        **of_terms,
        HAS_HEAD=boundary is not None,
        STABLE=stable,
        STATS=statistics,
        HAS_MASK=valid is not None,
    )
    name = "terms" if terms and not statistics else "head or statistics"
    _launch(shard_sums_kernel, name, out.shape[0], arguments)


def rescale(
    rows: torch.Tensor,  # [N, V], contiguous
    factor: torch.Tensor,  # [N] fp32, any stride
) -> None:
    """Launch rows *= factor, in place."""
    launch = launch_for("gradient", rows.shape[1])
    with _device_of(rows):
        rescale_kernel[(rows.shape[0],)](
            x_ptr=rows,
            factor_ptr=factor,
            stride_factor=factor.stride(0),
            V=rows.shape[1],
            **_options(launch),
        )


def _launch(kernel, name, rows, arguments, *, in_one_block=False) -> None:
    """Launch a kernel, named in the launch table, over rows.

    `in_one_block` asks for a block that holds all of a row, wherever that starts."""
    student = arguments["s_ptr"]
    sizes = {key: value for key, value in arguments.items() if key[0] == "V"}

    def run(rows: int, launch: Launch) -> None:
        kernel[(rows,)](**arguments, **_options(launch))

    with _device_of(student):
        if is_autotuning() and not in_one_block:
            gradient = arguments.get("ds_ptr")
            in_place = gradient is not None and gradient.data_ptr() == student.data_ptr()
            options = (value for key, value in arguments.items() if key.isupper())
            logits = [arguments[x] for x in ("s_ptr", "t_ptr") if x in arguments]
            capped = [arguments.get(x) is None for x in ("gain_s", "gain_t")]
            launch = tuned_launch(
                name,
                run,
                rows,
                student if in_place else None,
                *(x.dtype for x in logits),
                *capped,
                in_place,
                *sizes.values(),
                *options,
            )
        else:
            room = LARGEST_LEAD if in_one_block else 0
            launch = launch_for(name, max(sizes.values()) + room)
        run(rows, launch)


def _maps(
    temperature, student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale
) -> dict:
    """Arguments of `scaled` for both sides."""
    arguments = {}
    for side, softcap, logit_scale in (
        ("t", teacher_softcap, teacher_logit_scale),
        ("s", student_softcap, student_logit_scale),
    ):
        arguments[f"scale_{side}"] = _fp32(LOG2E * (softcap or logit_scale) / temperature)
        arguments[f"gain_{side}"] = None if softcap is None else _fp32(logit_scale / softcap)
    arguments["scale_1"] = _fp32(LOG2E * (student_softcap or student_logit_scale))
    return arguments


def _of_pairs(student, ids, temperature, softcap, logit_scale) -> dict:
    """Arguments of the kernels of pairs, of the student's logits and of the pairs."""
    maps = _maps(temperature, softcap, None, logit_scale, 1.0)
    lead = _lead(student)
    return {
        **{name: maps[name] for name in ("scale_s", "gain_s", "scale_1")},
        "outer_s": student.stride(0),
        "inner_s": student.stride(1),
        "inner": student.shape[1],
        "V": student.shape[2],
        "k": ids.shape[1],
        "base_lead": lead[0],
        "HAS_LEAD": any(lead),
        "PAIRS": max(triton.next_power_of_2(ids.shape[1]), FEWEST_PAIRS),
    }


def _forward_weight(weight, terms, parts) -> float:
    """The weight of the forward KL where no stage finds it; NaN where there is none, as the
    statistic of that name has to be."""
    if parts is not None:
        return float("nan") if terms is None else float(parts[0])
    return (weight or 0.0) if terms is None else float("nan")


def _of_labels(labels, temperature, *, apart) -> dict:
    """Whether there are any, whether their softmax at T = 1 is another than q, and whether their
    tokens are apart from all others."""
    return {
        "HAS_LABELS": labels is not None,
        "UNTEMPERED": labels is not None and temperature != 1.0,
        "APART": apart,
    }


def _of_terms(terms, numbers, limits, eta, parts, maps) -> dict:
    """Arguments of a divergence that is a sum of terms; its function is compiled, no number is."""
    capped = maps["gain_t"] is not None or maps["gain_s"] is not None
    a, b = (*numbers, 0.0, 0.0)[:2]
    return {
        "a": float(a),
        "b": float(b),
        # Not ints: Triton compiles 1 anew.
        "keep_p": float(limits[0]),
        "keep_q": float(limits[1]),
        "TERMS": terms,
        "HYBRID": terms is not None and (eta is not None or parts is not None),
        "MOMENTS": terms is not None and parts is not None,
        "ONE_SCALE": terms is not None and not capped and maps["scale_t"] == maps["scale_s"],
    }


def _fp32(number: float) -> float:
    """A number >= 0, or 2^126, of which twice is a number of fp32, too."""
    return min(number, 2.0**126)


def _addressing(student, teacher, gradient) -> dict:
    """Strides, sizes and alignment.

    Tensors that stand where the teacher stands between 16-byte boundaries, in every row, are read
    and written 16 bytes at a time."""
    lead = _lead(teacher)
    return {
        "outer_s": student.stride(0),
        "outer_t": teacher.stride(0),
        "outer_ds": gradient.stride(0),
        "inner_s": student.stride(1),
        "inner_t": teacher.stride(1),
        "inner_ds": gradient.stride(1),
        "inner": student.shape[1],
        "V_s": student.shape[2],
        "V_t": teacher.shape[2],
        "base_lead": lead[0],
        "HAS_LEAD": any(lead),
        "S_ALIGNED": _lead(student) == lead,
        "DS_ALIGNED": _lead(gradient) == lead,
    }


def _of_shard(student, teacher) -> dict:
    """`_addressing` of kernels that write no gradient."""
    arguments = _addressing(student, teacher, student)
    return {name: x for name, x in arguments.items() if "ds" not in name.lower()}


def _lead(logits) -> tuple[int, int, int]:
    """The position of rows between 16-byte boundaries, in elements of 2 bytes: that of the first,
    and the steps to the next ones."""
    base = logits.data_ptr() // logits.element_size()
    outer = logits.stride(0) if logits.shape[0] > 1 else 0
    return base % 8, outer % 8, logits.stride(1) % 8


def _options(launch: Launch) -> dict:
    """A launch as Triton's options."""
    options = {"BLOCK": launch.BLOCK}
    if not triton.knobs.runtime.interpret:
        target = driver.active.get_current_target()
        options["enable_fp_fusion"] = True  # Triton's default, but no longer from 3.10 on
        options["num_warps"] = max(launch.threads // target.warp_size, 1)
        if target.backend == "cuda":
            options["maxnreg"] = launch.registers
    return options


def _device_of(tensor):
    """Make the tensor's device current: Triton launches there."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
