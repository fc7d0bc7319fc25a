"""`python -m bench instructions`: the instructions of the compiled kernels, ours and the peers'.

Every kernel is compiled for GPUs that are not there, with the launch settings that its own launcher
chooses, and its machine code is read (bench/lab/sass.py). A figure per position is the static count
of a loop's body over the positions that a thread handles in one trip, which follow from the launch:
block, warps, and how many blocks' bytes a trip loads. Code outside of the loops (reductions, first
and last block of a row) is not in it; ``misaligned`` counts whole rows instead, dynamically.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from matplotlib.figure import Figure

import akl_triton
from akl_triton.cli.bench import make_logits
from bench.inputs.losses import FAMILY_LOSSES, LOSSES, OPTIONS
from bench.inputs.peers import PEERS, Peer, speculators_losses, speculators_tile
from bench.inputs.shapes import (
    ALIGNMENT_CLASSES,
    DTYPES,
    MAIN_VOCABULARY,
    PEER_VOCABULARIES,
    VOCABULARIES,
)
from bench.inputs.stages import (
    BOUNDARY,
    CUT,
    DIVERGENCE,
    DIVERGENCE_AND_GRADIENT,
    FUNCTIONS,
    GRADIENT,
    IN_ONE,
    READS,
    SEARCHES,
    SEPARATE,
    STATISTICS,
    SWEEPS,
)
from bench.lab import ptxcpu
from bench.lab.compile import NVIDIA, RecordedLaunch, record_launches
from bench.lab.sass import KernelCode, Loop, analyse
from bench.report.tables import number, table

MAIN_TARGET = "sm_90"
# The code for sm_86 and sm_89 is that for sm_80 but for a few scalar instructions, and that for
# gfx950 is that for gfx942 but for how it rounds to bf16.
GPUS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
NVIDIA_GPUS = tuple(target for target in GPUS if target in NVIDIA)

# The loops of a peer's kernel, in the order of the source: our stage that does such work, and the
# logits that an iteration reads per position. None: no work on logits.
PEER_LOOPS: dict[str, tuple[tuple[str, int] | None, ...]] = {
    "loss_forward_kernel": ((STATISTICS, 1), (STATISTICS, 1), (DIVERGENCE, 2)),
    "loss_backward_kernel": (None, (GRADIENT, 2)),
    "_kldiv_kernel_forward": ((DIVERGENCE, 2),),
    "_kldiv_kernel_backward": ((GRADIENT, 1),),
    "_jsd_kernel": ((DIVERGENCE_AND_GRADIENT, 2),),
}


@dataclass(frozen=True, slots=True)
class StageCost:
    """The loop over full blocks of one stage, per thread and trip."""

    stage: str
    positions: float  # vocabulary positions that a thread handles in a trip
    instructions: int
    exps: int
    loads: Mapping[str, int]  # global, by width in bytes
    stores: Mapping[str, int]
    local: int
    barriers: int
    shuffles: int

    @property
    def per_position(self) -> float:
        """Instructions per position."""
        return self.instructions / self.positions


@dataclass(frozen=True, slots=True)
class KernelCost:
    """A compiled kernel and its loops over full blocks."""

    kernel: str
    block: int
    warps: int
    registers: int
    stack_bytes: int
    local: int  # local-memory instructions in the whole kernel
    spilled_registers: int | None  # AMD only
    shared_bytes: int
    resident_blocks: int
    stages: tuple[StageCost, ...]

    @property
    def per_position(self) -> float:
        """The instructions per position of the stages that sweep a row once."""
        return sum(stage.per_position for stage in self.stages if stage.stage not in SEARCHES)


def _stage_cost(stage: str, loop: Loop, per_thread: float, bytes_per_position: int) -> StageCost:
    body = loop.body
    return StageCost(
        stage=stage,
        positions=per_thread * loop.steps(per_thread * bytes_per_position),
        instructions=body.instructions,
        exps=body.special.get("ex2", 0),
        loads=_by_width(body.global_loads),
        stores=_by_width(body.global_stores),
        local=body.local_accesses,
        barriers=body.barriers,
        shuffles=body.shuffles,
    )


def _by_width(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(width): count for width, count in counts.items()}


def _cost(
    kernel: str, launch: RecordedLaunch, code: KernelCode, stages: Iterable[StageCost]
) -> KernelCost:
    return KernelCost(
        kernel=kernel,
        block=_block(launch),
        warps=launch.num_warps,
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        local=code.whole.local_accesses,
        spilled_registers=code.spilled_registers,
        shared_bytes=code.shared_bytes,
        resident_blocks=code.resident_blocks,
        stages=tuple(stages),
    )


def _block(launch: RecordedLaunch) -> int:
    return int(launch.constexprs.get("BLOCK") or launch.constexprs["BLOCK_SIZE"])


# ---------------------------------------------------------------- our kernels


def record(
    loss: str, target: str, vocabulary: int, dtype: str = "bf16", options: str = "", rows: int = 2
) -> dict[str, RecordedLaunch]:
    """The kernels that a loss launches, by their place in SEPARATE and IN_ONE."""
    student = torch.zeros(rows, vocabulary, dtype=DTYPES[dtype])
    teacher = torch.zeros_like(student)
    function = functools.partial(
        (LOSSES | FAMILY_LOSSES)[loss], **OPTIONS[options], backend="triton"
    )
    with record_launches(target) as launches:
        result = function(student.requires_grad_(), teacher)
        (result[0] if isinstance(result, tuple) else result).backward()
        # The gradient overwrites the logits, which must not be a leaf.
        function(student.clone(), teacher, inplace=True)
    return dict(zip((*SEPARATE, *IN_ONE), launches, strict=True))


def kernel_costs(
    loss: str, target: str, vocabulary: int, dtype: str = "bf16", options: str = ""
) -> dict[str, KernelCost]:
    """The cost of each kernel that the loss launches."""
    launches = record(loss, target, vocabulary, dtype, options)
    return {name: _our_cost(name, launch, dtype) for name, launch in launches.items()}


def _our_cost(name: str, launch: RecordedLaunch, dtype: str) -> KernelCost:
    code = _analysed(launch.compiled.hash, launch)
    per_thread = code.elements_per_thread(_block(launch))
    by_function = code.loops_by_function([f for some in FUNCTIONS.values() for f in some])
    costs: dict[str, list[StageCost]] = {}
    for stage, functions in FUNCTIONS.items():
        for loop in (loop for function in functions for loop in by_function[function]):
            has_exps = loop.body.special.get("ex2", 0) > 0
            if loop.body.bytes_loaded and (has_exps or stage == BOUNDARY):
                part = stage if has_exps else CUT
                cost = _stage_cost(part, loop, per_thread, READS[stage] * DTYPES[dtype].itemsize)
                costs.setdefault(part, []).append(cost)
    # Masks make the loop over edge blocks the longer one; the loop that goes from block to block in
    # search of the cut adds up each of them.
    stages = [
        min(of_part, key=lambda cost: (cost.barriers, cost.per_position))
        for of_part in costs.values()
    ]
    expected = [stage for stage in SWEEPS[name] if stage != DIVERGENCE or _has_divergence(launch)]
    missing = [" or ".join(FUNCTIONS[stage]) for stage in expected if stage not in costs]
    if missing:
        raise ValueError(f"{launch.name}: no loop of {', '.join(missing)}")
    return _cost(name, launch, code, stages)


def _has_divergence(launch: RecordedLaunch) -> bool:
    """Whether a forward kernel sweeps the row again: it does not for the loss of KLs with fixed
    weights, without statistics."""
    return any(launch.constexprs.get(name) for name in ("HAS_HEAD", "STATS", "TERMS"))


_ANALYSED: dict[str, KernelCode] = {}


def _analysed(key: str, launch: RecordedLaunch) -> KernelCode:
    """The analysis of a launch: sizes of one alignment class share a kernel, which is read once."""
    if key not in _ANALYSED:
        _ANALYSED[key] = analyse(launch.compiled)
    return _ANALYSED[key]


# ---------------------------------------------------------------- the peers


def peer_costs(peer: Peer, target: str, vocabulary: int) -> dict[str, KernelCost]:
    """The cost of each Triton kernel that a peer launches; log_softmax and the like are
    PyTorch's."""
    student = torch.zeros(2, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    with record_launches(target) as launches:
        peer.loss(student, torch.zeros(2, vocabulary, dtype=torch.bfloat16)).backward()  # type: ignore[no-untyped-call]
    return {launch.name: _peer_cost(launch) for launch in launches}


def _peer_cost(launch: RecordedLaunch) -> KernelCost:
    code = _analysed(launch.compiled.hash, launch)
    expected = PEER_LOOPS[launch.name]
    if len(code.innermost_loops) != len(expected):
        raise ValueError(
            f"{launch.name}: {len(expected)} loops are in the source, "
            f"{len(code.innermost_loops)} in the machine code"
        )
    bytes_of = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
    itemsize = bytes_of[next(iter(launch.signature.values()))]
    per_thread = code.elements_per_thread(_block(launch))
    stages = []
    for loop, work in zip(code.innermost_loops, expected, strict=True):
        if work is not None:
            stage, reads = work
            stages.append(_stage_cost(stage, loop, per_thread, reads * itemsize))
    return _cost(launch.name, launch, code, stages)


def speculators_tiles(target: str) -> list[KernelCost]:
    """The cost of both forward KL kernels of speculators with every tile that its autotuner may
    choose."""
    fused = speculators_losses()
    v = MAIN_VOCABULARY
    logits = torch.zeros(2, v, dtype=torch.bfloat16)
    loss, stats = torch.zeros(2), torch.zeros(5, 2)
    costs = []
    # 131,072 with 32 warps is what its releases before the autotuner launched for V > 65,536.
    for config in [
        *fused.loss_forward_kernel.candidates,
        triton.Config({"BLOCK_SIZE": 131_072}, num_warps=32),
    ]:
        tile = {"OP": 0, "BLOCK_SIZE": config.kwargs["BLOCK_SIZE"], "num_warps": config.num_warps}
        with record_launches(target) as launches:
            fused.loss_forward_kernel.fn[(2,)](logits, logits, loss, stats, 2, v, **tile)
            fused.loss_backward_kernel.fn[(2,)](logits, logits, logits, loss, stats, 2, v, **tile)
        costs += [_peer_cost(launch) for launch in launches]
    return costs


# ---------------------------------------------------------------- whole rows, and compilations


def misaligned_rows() -> list[dict[str, Any]]:
    """The instructions of whole rows off the 16-byte boundaries, over those of rows on them.

    Rows of V = 50,257 start at each of the 8 places between two boundaries. The count is of all PTX
    instructions that all warps execute, first and last blocks included.
    """
    student, teacher = (
        x.detach() for x in make_logits(8, 50_257, torch.device("cpu"), DTYPES["bf16"])
    )
    counts: dict[str, dict[int, float]] = {}
    with ptxcpu.active(arch=90) as counters:
        for v in (50_257, 50_256):
            s, t = student[:, :v].contiguous(), teacher[:, :v].contiguous()
            counters.reset()
            loss = akl_triton.adaptive_kl(s.clone().requires_grad_(), t, backend="triton")
            counts.setdefault("forward", {})[v] = _executed(counters)
            counters.reset()
            loss.backward()  # type: ignore[no-untyped-call]
            counts.setdefault("backward", {})[v] = _executed(counters)
            counters.reset()
            akl_triton.adaptive_kl(s.requires_grad_().clone(), t, inplace=True, backend="triton")
            counts.setdefault("forward with gradient", {})[v] = _executed(counters)
    return [
        {
            "kernel": kernel,
            "misaligned": of_kernel[50_257] * 32 / (8 * 50_257),
            "aligned": of_kernel[50_256] * 32 / (8 * 50_256),
            "ratio": of_kernel[50_257] / of_kernel[50_256],
        }
        for kernel, of_kernel in counts.items()
    ]


def _executed(counters: ptxcpu.Counters) -> float:
    return float(sum(of_kernel["warp_instr"] for of_kernel in counters.values()))


def compilations(loss: str = "adaptive_kl", target: str = MAIN_TARGET) -> list[dict[str, Any]]:
    """The number of kernels that are compiled for all sizes of one class, and for N, mu and T."""
    found = []
    for name, sizes in ALIGNMENT_CLASSES.items():
        hashes: dict[str, set[str]] = {}
        calls = 0
        for v in sizes:
            for rows in (2, 7):
                calls += 1
                for kernel, launch in record(loss, target, v, rows=rows).items():
                    hashes.setdefault(kernel, set()).add(launch.compiled.hash)
        found.append(
            {
                "class": name,
                "vocabularies": list(sizes),
                "calls": calls,
                "compiled": {kernel: len(of_kernel) for kernel, of_kernel in hashes.items()},
            }
        )
    return found


# ---------------------------------------------------------------- the section


def _grouped(cases: Iterable[tuple[dict[str, Any], int, Mapping[str, KernelCost]]]) -> list[Any]:
    """The cases, with one entry for all vocabularies that have the same costs."""
    groups: list[dict[str, Any]] = []
    for case, vocabulary, costs in cases:
        entry = {**case, "kernels": {name: _as_json(cost) for name, cost in costs.items()}}
        for group in groups:
            if entry == {key: value for key, value in group.items() if key != "vocabularies"}:
                group["vocabularies"].append(vocabulary)
                break
        else:
            groups.append({"vocabularies": [vocabulary], **entry})
    return groups


def collect() -> dict[str, Any]:
    """All figures, about four minutes the first time."""
    return {
        "ours": _grouped(
            (
                {"loss": loss, "target": target, "dtype": dtype},
                vocabulary,
                kernel_costs(loss, target, vocabulary, dtype),
            )
            for loss in LOSSES
            for target in GPUS
            for dtype in DTYPES
            for vocabulary in VOCABULARIES
            if dtype == "bf16" or (target, vocabulary) == (MAIN_TARGET, MAIN_VOCABULARY)
        ),
        "options": _grouped(
            (
                {"loss": loss, "options": options},
                MAIN_VOCABULARY,
                kernel_costs(loss, MAIN_TARGET, MAIN_VOCABULARY, options=options),
            )
            for loss in ("adaptive_kl", "forward_kl")
            for options in OPTIONS
            # A loss without a head has no options of it.
            if loss == "adaptive_kl" or options in ("", "statistics", "softcaps")
        ),
        "peers": _grouped(
            (
                {
                    "peer": peer.name,
                    "version": peer.version,
                    "computes": peer.computes,
                    "target": target,
                },
                vocabulary,
                peer_costs(peer, target, vocabulary),
            )
            for peer in PEERS
            if peer.kind == "triton" and not peer.is_ours
            for target in NVIDIA_GPUS
            for vocabulary in PEER_VOCABULARIES
        ),
        "speculators_tiles": [_as_json(cost) for cost in speculators_tiles(MAIN_TARGET)],
        "misaligned": misaligned_rows(),
        "compilations": compilations(),
    }


def _as_json(cost: KernelCost) -> dict[str, Any]:
    return {**asdict(cost), "per_position": cost.per_position}


COLUMNS = (
    *("loss", "kernel", "V", STATISTICS, DIVERGENCE, GRADIENT, "sum", "boundary, cut", "exps"),
    *(
        "widths",
        "of boundary, cut",
        "barriers, shuffles",
        "local",
        "stack",
        "registers",
        "shared",
        "blocks an SM",
    ),
)
PEER_COLUMNS = (
    *("loss", "computes", "V", "tiles", STATISTICS, DIVERGENCE, GRADIENT, "all", "exps"),
    *("barriers, shuffles", "stack", "registers", "blocks an SM"),
)


def markdown(data: dict[str, Any]) -> str:
    ours, peers = data["ours"], data["peers"]
    return "\n\n".join(
        [
            "Instructions per vocabulary position, one (teacher, student) pair of logits. The sum "
            "is that of statistics, divergence and gradient. The head's boundary and the cut in a "
            "group of ties are listed apart: they scan the teacher's row a few times, or never. "
            "`forward with gradient` is all stages in one launch, which `inplace=True` makes; the "
            "other two kernels are the default. Widths are the bytes of the global loads / stores "
            "in the loops over full blocks. Where a loop has several branches, such as those for "
            "full and for edge blocks, all of them count. Barriers and shuffles are counted per "
            "trip of the loops in the sum, and local-memory instructions (local) in the whole "
            "kernel. Stack and shared memory are in bytes, registers per thread.",
            f"### Ours on {MAIN_TARGET}, bf16",
            table(COLUMNS, _our_rows(filter(_is_main, ours)), texts=3),
            "### Ours on other GPUs, and in other dtypes",
            f"`forward with gradient`, V = {MAIN_VOCABULARY:,}. On gfx942 a wave has 64 lanes, the "
            "registers are vector registers, and blocks are those of a compute unit.",
            table(("GPU", "dtype", *COLUMNS[:1], *COLUMNS[3:]), _other_rows(ours), texts=3),
            f"### Ours with options, {MAIN_TARGET}, bf16",
            f"`forward with gradient`, V = {MAIN_VOCABULARY:,}. Statistics: `return_stats=True`. "
            "Softcaps are on both sides; a tanh takes an exp, a division and a polynomial.",
            table(("loss", "with", *COLUMNS[3:]), _option_rows(data["options"]), texts=2),
            f"### Compared with the peers, {MAIN_TARGET}, bf16",
            "Each has its own launch settings (tiles: block x warps of the forward and the "
            "backward kernel). The work of PyTorch's own kernels before and after Liger's is not "
            "counted: a log_softmax of either side, its backward, and the scaling of the gradient. "
            "`both` marks one loop that computes divergence and gradient. Without a GPU to time "
            "its candidates on, speculators' autotuner is given the tiles that its source names "
            "for an A100.",
            table(
                PEER_COLUMNS,
                _like_rows(filter(_is_main, ours)) + _peer_rows(filter(_is_main, peers)),
                texts=4,
            ),
            "The same sums of all stages on the other GPUs, "
            f"V = {MAIN_VOCABULARY:,}, with forward and backward in two launches:",
            table(("loss", "computes", *NVIDIA_GPUS), _target_rows(ours, peers), texts=2),
            f"Tiles of speculators' forward KL, {MAIN_TARGET}, V = {MAIN_VOCABULARY:,}:",
            table(
                ("tile", "chosen", "forward", "backward", "both", "stack", "registers"),
                _tile_rows(data["speculators_tiles"]),
                texts=2,
            ),
            "### Rows off the 16-byte boundaries",
            "V = 50,257 compared with V = 50,256: the PTX instructions of one lane that whole rows "
            "of the adaptive loss execute, per position. The rows are random, of the shape that "
            "`akl-triton bench` measures with, so that the search for the boundary scans them.",
            table(
                ("kernel", "V = 50,257", "V = 50,256", "ratio"),
                [
                    (
                        r["kernel"],
                        f"{r['misaligned']:.1f}",
                        f"{r['aligned']:.1f}",
                        f"{r['ratio']:.3f}",
                    )
                    for r in data["misaligned"]
                ],
            ),
            "### Compilations",
            "The kernels of `adaptive_kl` for all V of a class and N = 2 and 7; T and mu are "
            "run-time values, too.",
            table(
                ("class", "V", "calls", *(*SEPARATE, *IN_ONE)),
                [
                    (
                        *(c["class"], _vocabularies(c["vocabularies"]), f"{c['calls']}"),
                        *(f"{c['compiled'][kernel]}" for kernel in (*SEPARATE, *IN_ONE)),
                    )
                    for c in data["compilations"]
                ],
                texts=2,
            ),
        ]
    )


def _is_main(case: Mapping[str, Any]) -> bool:
    return bool(case["target"] == MAIN_TARGET and case.get("dtype", "bf16") == "bf16")


def _vocabularies(sizes: Iterable[int]) -> str:
    return ", ".join(f"{size:,}" for size in sizes)


def _sum(cost: Mapping[str, Any], what: str) -> float:
    """The sum over the stages that sweep a row once, per position."""
    return float(
        sum(s[what] / s["positions"] for s in cost["stages"] if s["stage"] not in SEARCHES)
    )


def _stage(cost: Mapping[str, Any], stage: str) -> float:
    return float(
        sum(s["instructions"] / s["positions"] for s in cost["stages"] if s["stage"] == stage)
    )


def _cell(value: float) -> str:
    return f"{value:.1f}" if value else ""


def _widths(stages: Iterable[Mapping[str, Any]], kind: str) -> str:
    return ", ".join(sorted({width for s in stages for width in s[kind]}, key=int)) or "none"


def _figures(cost: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns from A on."""
    stages = [stage for stage in cost["stages"] if stage["stage"] not in SEARCHES]
    searches = [stage for stage in cost["stages"] if stage["stage"] in SEARCHES]
    barriers, shuffles = (sum(s[what] for s in stages) for what in ("barriers", "shuffles"))
    return (
        *(_cell(_stage(cost, stage)) for stage in (STATISTICS, DIVERGENCE, GRADIENT)),
        f"{cost['per_position']:.1f}",
        ", ".join(_cell(_stage(cost, s["stage"])) for s in searches),
        number(_sum(cost, "exps")),
        f"{_widths(stages, 'loads')} / {_widths(stages, 'stores')}",
        ", ".join(_widths([s], "loads") for s in searches),
        f"{barriers}, {shuffles}",
        *(str(cost[what]) for what in ("local", "stack_bytes", "registers", "shared_bytes")),
        str(cost["resident_blocks"]),
    )


def _our_rows(cases: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (case["loss"], kernel, _vocabularies(case["vocabularies"]), *_figures(cost))
        for case in cases
        for kernel, cost in case["kernels"].items()
    ]


def _other_rows(cases: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (case["target"], case["dtype"], case["loss"], *_figures(case["kernels"][IN_ONE[0]]))
        for case in cases
        if MAIN_VOCABULARY in case["vocabularies"] and not _is_main(case)
    ]


def _option_rows(cases: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (case["loss"], case["options"], *_figures(case["kernels"][IN_ONE[0]])) for case in cases
    ]


def _together(kernels: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """The columns from `tiles` on of the table of peers: the kernels of a forward and backward."""
    costs = [kernels[name] for name in names]
    stages = [s for cost in costs for s in cost["stages"] if s["stage"] not in SEARCHES]
    of_b = sum(_stage(cost, DIVERGENCE) for cost in costs)
    of_both = sum(_stage(cost, DIVERGENCE_AND_GRADIENT) for cost in costs)
    return (
        ", ".join(f"{cost['block']} x {cost['warps']}" for cost in costs),
        _cell(sum(_stage(cost, STATISTICS) for cost in costs)),
        f"both {of_both:.1f}" if of_both else _cell(of_b),
        _cell(sum(_stage(cost, GRADIENT) for cost in costs)),
        f"{sum(cost['per_position'] for cost in costs):.1f}",
        number(sum(_sum(cost, "exps") for cost in costs)),
        f"{sum(s['barriers'] for s in stages)}, {sum(s['shuffles'] for s in stages)}",
        *(
            ", ".join(str(cost[what]) for cost in costs)
            for what in ("stack_bytes", "registers", "resident_blocks")
        ),
    )


def _like_rows(cases: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            f"**{case['loss']}**{' in place' if names == IN_ONE else ''}",
            case["loss"],
            _vocabularies(v for v in case["vocabularies"] if v in PEER_VOCABULARIES),
            *_together(case["kernels"], names),
        )
        for case in cases
        if set(PEER_VOCABULARIES) & set(case["vocabularies"])
        for names in (IN_ONE, SEPARATE)
    ]


def _peer_rows(cases: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            case["peer"],
            case["computes"],
            _vocabularies(case["vocabularies"]),
            *_together(case["kernels"], case["kernels"]),
        )
        for case in cases
    ]


def _target_rows(ours: Iterable[dict[str, Any]], peers: Iterable[dict[str, Any]]) -> list[Any]:
    totals: dict[tuple[str, str], dict[str, float]] = {}
    for case in (*ours, *peers):
        if MAIN_VOCABULARY in case["vocabularies"] and case.get("dtype", "bf16") == "bf16":
            is_ours = "loss" in case
            name = (
                (f"**{case['loss']}**", case["loss"])
                if is_ours
                else (case["peer"], case["computes"])
            )
            kernels = SEPARATE if is_ours else case["kernels"]
            total = sum(case["kernels"][kernel]["per_position"] for kernel in kernels)
            totals.setdefault(name, {})[case["target"]] = total
    return [(*name, *(f"{of[gpu]:.1f}" for gpu in NVIDIA_GPUS)) for name, of in totals.items()]


def _tile_rows(costs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The tile of the source's comment, the tile with the fewest instructions, and the old fixed
    one."""
    pairs = list(zip(costs[::2], costs[1::2], strict=True))
    chosen = speculators_tile(MAIN_VOCABULARY)
    kinds = {
        "on an A100, by its source": next(
            pair for pair in pairs if (pair[0]["block"], pair[0]["warps"]) == chosen
        ),
        "fewest instructions": min(
            pairs, key=lambda pair: sum(float(cost["per_position"]) for cost in pair)
        ),
        "fixed, before it had an autotuner": pairs[-1],
    }
    return [
        (
            f"{pair[0]['block']:,} x {pair[0]['warps']}",
            kind,
            *(f"{cost['per_position']:.1f}" for cost in pair),
            f"{sum(cost['per_position'] for cost in pair):.1f}",
            *(", ".join(str(cost[what]) for cost in pair) for what in ("stack_bytes", "registers")),
        )
        for kind, pair in kinds.items()
    ]


COLOURS = {
    STATISTICS: "#0072B2",
    DIVERGENCE: "#E69F00",
    GRADIENT: "#009E73",
    DIVERGENCE_AND_GRADIENT: "#CC79A7",
}


def plot(data: dict[str, Any], path: os.PathLike[str]) -> None:
    """Draw instructions per position as bars, stage on stage, ours above the peers."""
    bars: dict[str, dict[str, float]] = {}
    for case in (*data["peers"][::-1], *data["ours"][::-1]):
        if not _is_main(case) or MAIN_VOCABULARY not in case["vocabularies"]:
            continue
        name = case.get("peer") or f"akl_triton {case['loss']}"
        kernels = [case["kernels"][k] for k in (SEPARATE if "loss" in case else case["kernels"])]
        bars[name] = {s: sum(_stage(kernel, s) for kernel in kernels) for s in COLOURS}
    figure = Figure(figsize=(8, 0.4 * len(bars) + 1.4), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(bars, 0.0)
    for stage, colour in COLOURS.items():
        axes.barh(
            list(bars),
            [of[stage] for of in bars.values()],
            left=list(left.values()),
            color=colour,
            label=stage,
        )
        left = {name: left[name] + of[stage] for name, of in bars.items()}
    for name, total in left.items():
        # Their log_softmax is PyTorch's, and not counted.
        more = " + log_softmax" if name.startswith("Liger") else ""
        axes.annotate(f" {total:.1f}{more}", (total, name), va="center", fontsize=8)
    axes.set_title(
        f"SASS instructions per vocabulary position, {MAIN_TARGET}, bf16, V = {MAIN_VOCABULARY:,}",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path, dpi=150)
