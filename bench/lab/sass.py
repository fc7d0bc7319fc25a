"""An analyser of machine code: loops, instruction mix, registers and occupancy of a compiled
kernel.

NVIDIA cubins are disassembled with the tools in Triton's wheel, AMD kernels come as assembly.
Either becomes basic blocks, of which the natural loops are found (a branch back to a block that
dominates it), and the instructions in them are counted.  Counts are per thread and static: every
instruction once, predicated ones included, padding NOPs and unreachable code excluded.  The number
of elements that an iteration handles follows from the launch, which the caller knows: see
``KernelCode.elements_per_thread`` and ``Loop.steps``.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel

from .source import Functions, Line, read_functions

# ---------------------------------------------------------------- what is reported


@dataclass(frozen=True, slots=True)
class Mix:
    """Static counts of a stretch of code, per thread."""

    instructions: int
    opcodes: Mapping[str, int]
    special: Mapping[str, int]  # special-function unit (MUFU) by kind: ex2, lg2, rcp, ...
    global_loads: Mapping[int, int]  # by width in bytes
    global_stores: Mapping[int, int]
    local_loads: int  # local memory: spills, and arrays that are no registers
    local_stores: int
    shared_loads: int
    shared_stores: int
    barriers: int
    shuffles: int  # with warp-wide reductions and AMD's cross-lane moves
    atomics: int

    @property
    def local_accesses(self) -> int:
        return self.local_loads + self.local_stores

    @property
    def bytes_loaded(self) -> int:
        """Global bytes that a thread loads if every load is executed once."""
        return sum(width * count for width, count in self.global_loads.items())

    @property
    def bytes_stored(self) -> int:
        """Global bytes that a thread stores if every store is executed once."""
        return sum(width * count for width, count in self.global_stores.items())


@dataclass(frozen=True, slots=True)
class Loop:
    """A natural loop."""

    depth: int  # 1 for an outermost loop
    is_innermost: bool
    body: Mix  # all its blocks, also those of the loops inside
    # The path round the loop on which every forward branch falls through; None if it leaves the
    # loop.
    straight: Mix | None
    sources: Mapping[Line, int]  # instructions by line of the source

    def steps(self, bytes_per_step: float) -> int:
        """The number of iterations of the source's loop in one trip: the compiler may have unrolled
        it.

        ``bytes_per_step`` is the number of bytes that a thread loads in one iteration of the
        source's loop, according to the launch: elements per thread times bytes per element of every
        tensor it reads.
        """
        steps, rest = divmod(self.body.bytes_loaded, bytes_per_step)
        if rest or not steps:
            raise ValueError(
                f"the loop loads {self.body.bytes_loaded} bytes a trip, no multiple of the "
                f"{bytes_per_step:g} that an iteration of the source loads"
            )
        return int(steps)


@dataclass(frozen=True, slots=True)
class KernelCode:
    """The machine code of one compiled kernel."""

    name: str
    target: str
    num_warps: int
    warp_size: int
    registers: int  # per thread; on AMD, vector registers with accumulators
    scalar_registers: int | None  # AMD only
    spilled_registers: int | None  # AMD only; elsewhere see whole.local_accesses
    stack_bytes: int  # per thread
    shared_bytes: int  # per block, as the launch asks for it
    resident_blocks: int  # per SM (per compute unit on AMD), by registers, shared memory and warps
    whole: Mix
    loops: tuple[Loop, ...]  # in the order of their first instruction
    functions: Functions  # the device functions that were inlined

    @property
    def innermost_loops(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.loops if loop.is_innermost)

    def elements_per_thread(self, block: int) -> float:
        """The elements of a block (``BLOCK`` of the launch) that one thread handles."""
        return block / (self.num_warps * self.warp_size)

    def loops_by_function(self, names: Sequence[str]) -> dict[str, tuple[Loop, ...]]:
        """The innermost loops, grouped by the device function from which most of each loop comes.

        With a function for each stage of a kernel, these are the loops of the stages.  A helper
        that several of them call, such as those of Triton's library, does not decide.
        """
        owners = self.functions.owners(names)
        by_function: dict[str, tuple[Loop, ...]] = {name: () for name in names}
        for loop in self.innermost_loops:
            counts: Counter[str] = Counter()
            for line, count in loop.sources.items():
                if line in owners:
                    counts[owners[line]] += count
            if counts:
                by_function[max(names, key=lambda name: counts[name])] += (loop,)
        return by_function


def analyse(kernel: CompiledKernel) -> KernelCode:
    """Report on a kernel compiled for NVIDIA or AMD (``bench.lab.compile`` compiles without a GPU).

    Example:
        >>> code = analyse(compile_for(kernel, signature, {"BLOCK": 2048}, num_warps=8))
        >>> (loop,) = code.innermost_loops
        >>> elements = code.elements_per_thread(2048)
        >>> loop.body.instructions / elements / loop.steps(elements * bytes_per_element)
    """
    if kernel.metadata.target.backend == "hip":
        return _analyse_amd(kernel)
    return _analyse_nvidia(kernel)


# ---------------------------------------------------------------- occupancy


@dataclass(frozen=True, slots=True)
class _Multiprocessor:
    """The resources that the blocks on one SM share (CUDA programming guide, compute
    capabilities)."""

    warps: int
    blocks: int
    shared_bytes: int
    reserved_shared_bytes: int = 1024  # per block, by the system
    registers: int = 65536


_MULTIPROCESSORS = {
    80: _Multiprocessor(warps=64, blocks=32, shared_bytes=164 * 1024),
    86: _Multiprocessor(warps=48, blocks=16, shared_bytes=100 * 1024),
    89: _Multiprocessor(warps=48, blocks=24, shared_bytes=100 * 1024),
    90: _Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
    100: _Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
    120: _Multiprocessor(warps=48, blocks=24, shared_bytes=100 * 1024),
}


def resident_blocks(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks that fit on one SM of compute capability ``arch`` (90 is sm_90) at the same time."""
    sm = _MULTIPROCESSORS[arch]
    # Registers come in units of 256 per warp, from the quarter of the SM that the warp runs on.
    registers_per_warp = _round_up(max(registers, 1) * 32, 256)
    warps = min(sm.warps, sm.registers // 4 // registers_per_warp * 4)
    shared = _round_up(shared_bytes + sm.reserved_shared_bytes, 128)
    return min(sm.blocks, warps // num_warps, sm.shared_bytes // shared)


# Shared memory of a compute unit, and the unit in which blocks get it.
_COMPUTE_UNITS = {"gfx942": (64 * 1024, 512), "gfx950": (160 * 1024, 1280)}


def _resident_blocks_amd(
    arch: str, vector_registers: int, shared_bytes: int, num_warps: int
) -> int:
    """The same for a compute unit of CDNA 3 or 4: four SIMDs of 512 registers and up to 8 waves."""
    waves = 4 * min(8, 512 // _round_up(max(vector_registers, 1), 8))
    blocks = min(16 if num_warps > 1 else 32, waves // num_warps)
    available, unit = _COMPUTE_UNITS[arch]
    return min(blocks, available // _round_up(shared_bytes, unit)) if shared_bytes else blocks


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# ---------------------------------------------------------------- instructions and their flow


@dataclass(frozen=True, slots=True)
class _Instruction:
    opcode: str
    operands: str
    guard: str  # the predicate in front of it; "" if it is always executed
    source: Line | None


@dataclass(slots=True)
class _Listing:
    """The code of one kernel; ``labels`` give the index of the instruction that follows them."""

    instructions: list[_Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


class _Flow(NamedTuple):
    """The places to which control goes after an instruction that ends a block."""

    target: str | None
    falls_through: bool


_Follow = Callable[[_Instruction], _Flow | None]
_Classify = Callable[[str], tuple[str, str | int] | None]


def _mix(instructions: Iterable[_Instruction], classify: _Classify) -> Mix:
    opcodes = Counter(i.opcode for i in instructions)
    counts: dict[str, Counter[str | int]] = {}
    for opcode, count in opcodes.items():
        found = classify(opcode)
        if found is not None:
            kind, key = found
            counts.setdefault(kind, Counter())[key] += count

    def total(kind: str) -> int:
        return sum(counts.get(kind, {}).values())

    def widths(kind: str) -> dict[int, int]:
        return {int(width): count for width, count in sorted(counts.get(kind, {}).items())}

    return Mix(
        instructions=sum(opcodes.values()),
        opcodes=dict(opcodes),
        special={str(kind): count for kind, count in sorted(counts.get("special", {}).items())},
        global_loads=widths("global_load"),
        global_stores=widths("global_store"),
        local_loads=total("local_load"),
        local_stores=total("local_store"),
        shared_loads=total("shared_load"),
        shared_stores=total("shared_store"),
        barriers=total("barrier"),
        shuffles=total("shuffle"),
        atomics=total("atomic"),
    )


@dataclass(frozen=True, slots=True)
class _Block:
    start: int
    end: int
    next: int | None  # block that follows if no branch is taken
    target: int | None  # block that the branch at the end leads to
    call: int | None  # subroutine that the block calls at its end

    @property
    def successors(self) -> list[int]:
        return [block for block in (self.next, self.target) if block is not None]


class _Graph:
    """The basic blocks, those that are reachable, and the natural loops."""

    def __init__(self, listing: _Listing, follow: _Follow):
        self._listing = listing
        self.blocks = _split(listing, follow)
        self.reachable, self._predecessors = self._explore()
        self.loops = self._find_loops()

    def instructions(self, blocks: Iterable[int]) -> list[_Instruction]:
        return [
            instruction
            for k in sorted(blocks)
            for instruction in self._listing.instructions[self.blocks[k].start : self.blocks[k].end]
        ]

    def _explore(self) -> tuple[list[int], dict[int, list[int]]]:
        """The blocks that control can get to, the entry first, and the predecessors of each."""
        reachable: dict[int, None] = {}
        predecessors: dict[int, list[int]] = {}
        pending = [0]
        while pending:
            k = pending.pop()
            if k in reachable:
                continue
            reachable[k] = None
            block = self.blocks[k]
            for successor in block.successors:
                predecessors.setdefault(successor, []).append(k)
                pending.append(successor)
            if block.call is not None:
                pending.append(block.call)
        return list(reachable), predecessors

    def _dominators(self) -> dict[int, set[int]]:
        """For each block, the blocks that every path to it goes through."""
        entries = {0} | {b.call for k in self.reachable if (b := self.blocks[k]).call is not None}
        everything = set(self.reachable)
        dominators = {k: {k} if k in entries else set(everything) for k in self.reachable}
        changed = True
        while changed:
            changed = False
            for k in self.reachable:
                if k in entries:
                    continue
                ways = [dominators[p] for p in self._predecessors[k]]
                updated = {k} | set.intersection(*ways)
                if updated != dominators[k]:
                    dominators[k] = updated
                    changed = True
        return dominators

    def _find_loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop, by the block that control enters it at."""
        dominators = self._dominators()
        loops: dict[int, set[int]] = {}
        for k in self.reachable:
            for header in self.blocks[k].successors:
                if header not in dominators[k]:
                    continue
                body = loops.setdefault(header, {header})
                pending = [k]
                while pending:
                    block = pending.pop()
                    if block not in body:
                        body.add(block)
                        pending += self._predecessors[block]
        return dict(sorted(loops.items()))

    def straight(self, header: int) -> list[int] | None:
        """The blocks passed from the header back to it without taking a forward branch."""
        body = self.loops[header]
        path: list[int] = []
        inside = [header]
        while inside and inside[0] not in path:
            path.append(inside[0])
            block = self.blocks[path[-1]]
            inside = [b for b in (block.next, block.target) if b is not None and b in body]
        return path if inside[:1] == [header] else None


def _split(listing: _Listing, follow: _Follow) -> list[_Block]:
    instructions, labels = listing.instructions, listing.labels
    flows = {k: flow for k, i in enumerate(instructions) if (flow := follow(i)) is not None}
    targets = {labels[f.target] for f in flows.values() if f.target in labels}
    count = len(instructions)
    starts = sorted(s for s in {0} | targets | {k + 1 for k in flows} if s < count)
    block_at = {start: k for k, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        flow = flows.get(end - 1, _Flow(None, True))
        target = block_at.get(labels[flow.target]) if flow.target in labels else None
        is_call = instructions[end - 1].opcode.startswith(_CALLS)
        blocks.append(
            _Block(
                start,
                end,
                next=block_at.get(end) if flow.falls_through else None,
                target=None if is_call else target,
                call=target if is_call else None,
            )
        )
    return blocks


_CALLS = ("CALL", "s_swappc")


def _loops(graph: _Graph, classify: _Classify) -> tuple[Loop, ...]:
    found = []
    for header, body in graph.loops.items():
        instructions = graph.instructions(body)
        straight = graph.straight(header)
        found.append(
            Loop(
                depth=sum(header in other for other in graph.loops.values()),
                is_innermost=not any(h in body for h in graph.loops if h != header),
                body=_mix(instructions, classify),
                straight=None if straight is None else _mix(graph.instructions(straight), classify),
                sources=Counter(i.source for i in instructions if i.source is not None),
            )
        )
    return tuple(found)


# ---------------------------------------------------------------- NVIDIA

_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_LABEL = re.compile(r"\s*([.$\w]+):\s*$")
_SASS_SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
_SASS_TARGET = re.compile(r"^(.*?)`\(([^)]+)\)")
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_SASS_KINDS = {
    **dict.fromkeys(("LDG", "LDGSTS", "LD"), "global_load"),
    **dict.fromkeys(("STG", "ST"), "global_store"),
    **{"LDL": "local_load", "STL": "local_store"},
    **dict.fromkeys(("LDS", "LDSM"), "shared_load"),
    **dict.fromkeys(("STS", "STSM"), "shared_store"),
    "BAR": "barrier",
    **dict.fromkeys(("SHFL", "REDUX", "CREDUX"), "shuffle"),
    **dict.fromkeys(("RED", "REDG", "ATOM", "ATOMG", "ATOMS"), "atomic"),
}


def _classify_sass(opcode: str) -> tuple[str, str | int] | None:
    root, *modifiers = opcode.split(".")
    if root == "MUFU":
        return "special", modifiers[0].lower()
    kind = _SASS_KINDS.get(root)
    if kind is None:
        return None
    return kind, next((_SASS_WIDTHS[m] for m in modifiers if m in _SASS_WIDTHS), 4)


def _follow_sass(i: _Instruction) -> _Flow | None:
    root = i.opcode.split(".")[0]
    is_guarded = i.guard not in ("", "@PT", "@UPT")
    if root in ("EXIT", "RET", "KILL"):
        return _Flow(None, is_guarded)
    if root in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ValueError(f"{i.opcode} {i.operands}: the targets of indirect branches are unknown")
    if root in ("BRA", "JMP", "CALL"):
        target = _SASS_TARGET.match(i.operands)
        if target is None:
            raise ValueError(f"{i.opcode} {i.operands}: no label to follow")
        # A branch may have its condition among the operands: BRA.U UP0, `(.L_x_1).
        may_go_on = is_guarded or target.group(1).strip() != "" or root == "CALL"
        return _Flow(target.group(2), may_go_on)
    return None


def _read_sass(text: str, kernel: str) -> _Listing:
    listing = _Listing()
    inside = False
    source = None
    for line in text.splitlines():
        if "//---" in line and ".text." in line:
            inside = f".text.{kernel} " in line
        if not inside:
            continue
        if found := _SASS_SOURCE.match(line):
            source = (found.group(1), int(found.group(2)))
        elif found := _SASS_LABEL.match(line):
            listing.labels[found.group(1)] = len(listing.instructions)
        elif found := _SASS_LINE.match(line):
            guard, opcode, operands = found.groups()
            if opcode != "NOP":
                listing.instructions.append(
                    _Instruction(opcode, operands.strip(), guard or "", source)
                )
    if not listing.instructions:
        raise ValueError(f"nvdisasm shows no code of {kernel}")
    return listing


@functools.lru_cache(maxsize=64)
def disassemble(cubin: bytes) -> tuple[str, str]:
    """The output of nvdisasm (code with source lines) and cuobjdump (resource usage) for a
    cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [knobs.nvidia.nvdisasm.path, "-c", "-g", file.name],
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
        )
        code, usage = (
            subprocess.run(command, check=True, text=True, capture_output=True).stdout
            for command in commands
        )
    return code, usage


def _analyse_nvidia(kernel: CompiledKernel) -> KernelCode:
    metadata = kernel.metadata
    code, usage = disassemble(kernel.asm["cubin"])
    resources = _one(rf"Function {re.escape(metadata.name)}:\s*\n\s*REG:(\d+) STACK:(\d+)", usage)
    registers, stack_bytes = (int(number) for number in resources)
    graph = _Graph(_read_sass(code, metadata.name), _follow_sass)
    return KernelCode(
        name=metadata.name,
        target=f"sm_{metadata.target.arch}",
        num_warps=metadata.num_warps,
        warp_size=metadata.target.warp_size,
        registers=registers,
        scalar_registers=None,
        spilled_registers=None,
        stack_bytes=stack_bytes,
        shared_bytes=metadata.shared,
        resident_blocks=resident_blocks(
            metadata.target.arch, registers, metadata.shared, metadata.num_warps
        ),
        whole=_mix(graph.instructions(graph.reachable), _classify_sass),
        loops=_loops(graph, _classify_sass),
        functions=read_functions(kernel.asm["source"]),
    )


def _one(pattern: str, text: str) -> Sequence[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no match for {pattern!r} in what the tools say")
    return found.groups()


# ---------------------------------------------------------------- AMD

_AMD_LINE = re.compile(r"\t([a-z]\w*)\s*([^;]*)")
_AMD_LABEL = re.compile(r"([.\w]+):")
_AMD_FILE = re.compile(r'\t\.file\t(\d+) (?:"([^"]+)" )?"([^"]+)"(?: md5.*)?$')
_AMD_SOURCE = re.compile(r"\t\.loc\t(\d+) (\d+)")
_AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_SPECIAL_NAMES = {"exp": "ex2", "log": "lg2"}
_AMD_GLOBAL = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_WIDTHS = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_AMD_KINDS = (
    (r"s_barrier", "barrier"),
    (r"scratch_load", "local_load"),
    (r"scratch_store", "local_store"),
    (r"\w+_dpp$|v_permlane|ds_b?permute|ds_swizzle", "shuffle"),
    (r"ds_(read|load)", "shared_load"),
    (r"ds_(write|store)", "shared_store"),
    (r"(global|buffer|flat)_atomic|ds_", "atomic"),
)


def _classify_amd(opcode: str) -> tuple[str, str | int] | None:
    if special := _AMD_SPECIAL.match(opcode):
        return "special", _AMD_SPECIAL_NAMES.get(special.group(1), special.group(1))
    if access := _AMD_GLOBAL.match(opcode):
        width = next(w for name, w in reversed(_AMD_WIDTHS.items()) if name in access.group(2))
        return f"global_{access.group(1)}", width
    return next(((kind, 0) for pattern, kind in _AMD_KINDS if re.match(pattern, opcode)), None)


def _follow_amd(i: _Instruction) -> _Flow | None:
    if i.opcode in ("s_endpgm", "s_setpc_b64"):
        return _Flow(None, False)
    if i.opcode == "s_branch" or i.opcode.startswith("s_cbranch"):
        return _Flow(i.operands, i.opcode != "s_branch")
    if i.opcode.startswith("s_swappc"):
        return _Flow(None, True)
    return None


def _read_amd(text: str, kernel: str) -> _Listing:
    listing = _Listing()
    files = {
        number: str(Path(folder or "", name))
        for line in text.splitlines()
        if (found := _AMD_FILE.match(line))
        for number, folder, name in [found.groups()]
    }
    start = text.index(f"\n{kernel}:")
    source = None
    for line in text[start : text.index(".Lfunc_end", start)].splitlines():
        if found := _AMD_SOURCE.match(line):
            source = (files.get(found.group(1), ""), int(found.group(2)))
        elif found := _AMD_LABEL.match(line):
            listing.labels[found.group(1)] = len(listing.instructions)
        elif (found := _AMD_LINE.match(line)) and found.group(1) != "s_nop":
            opcode, operands = found.groups()
            listing.instructions.append(_Instruction(opcode, operands.strip(), "", source))
        elif line.startswith("\t.section"):
            break
    return listing


def _analyse_amd(kernel: CompiledKernel) -> KernelCode:
    metadata = kernel.metadata
    text = kernel.asm["amdgcn"]
    graph = _Graph(_read_amd(text, metadata.name), _follow_amd)

    def noted(key: str) -> int:
        return int(_one(rf"\.{key}:\s+(\d+)", text)[0])

    registers = noted("vgpr_count")
    return KernelCode(
        name=metadata.name,
        target=metadata.target.arch,
        num_warps=metadata.num_warps,
        warp_size=metadata.target.warp_size,
        registers=registers,
        scalar_registers=noted("sgpr_count"),
        spilled_registers=noted("vgpr_spill_count") + noted("sgpr_spill_count"),
        stack_bytes=noted("private_segment_fixed_size"),
        shared_bytes=metadata.shared,
        resident_blocks=_resident_blocks_amd(
            metadata.target.arch, registers, metadata.shared, metadata.num_warps
        ),
        whole=_mix(graph.instructions(graph.reachable), _classify_amd),
        loops=_loops(graph, _classify_amd),
        functions=read_functions(kernel.asm["source"]),
    )
