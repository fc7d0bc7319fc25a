# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The analyser of machine code, on toy kernels whose properties are known."""

import functools

import pytest
import triton
import triton.language as tl

from bench.lab import sass
from bench.lab.compile import NVIDIA, TARGETS, compile_for

BLOCK = 2048
WARPS = 4


@functools.cache
def analysed(kernel, target: str, block: int = BLOCK, warps: int = WARPS) -> sass.KernelCode:
    """The analysis of a kernel over bf16 rows of V entries, at 16-byte boundaries."""
    types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "V": "i32", "N": "i32"}
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    return sass.analyse(
        compile_for(
            kernel,
            signature,
            {"BLOCK": block},
            divisible=set(signature),
            num_warps=warps,
            target=target,
        )
    )


@triton.jit
def copy_loop(x_ptr, y_ptr, V, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        x = tl.load(x_ptr + start + offs, mask=start + offs < V)
        tl.store(y_ptr + start + offs, x, mask=start + offs < V)


@pytest.mark.parametrize("target", NVIDIA)
def test_copy_loop(target: str) -> None:
    code = analysed(copy_loop, target)
    elements = code.elements_per_thread(BLOCK)
    assert elements == BLOCK / (32 * WARPS)
    (loop,) = code.loops
    assert (loop.depth, loop.is_innermost) == (1, True)
    # Two accesses of 16 bytes are the 16 values of a thread; ptxas has unrolled the loop by 4.
    assert loop.steps(2 * elements) == 4
    assert loop.body.global_loads == loop.body.global_stores == {16: 2 * 4}
    assert loop.body.bytes_loaded == loop.body.bytes_stored == 2 * elements * 4
    assert loop.body.opcodes["LDG.E.128"] == 2 * 4
    with pytest.raises(ValueError, match="128 bytes a trip, no multiple of the 48 "):
        loop.steps(48)
    assert loop.body.barriers == loop.body.shuffles == loop.body.atomics == 0
    assert code.whole.local_accesses == code.stack_bytes == code.shared_bytes == 0
    assert not code.whole.special
    assert loop.straight == loop.body
    assert 0 < loop.body.instructions < code.whole.instructions
    assert (code.name, code.target, code.num_warps) == ("copy_loop", target, WARPS)
    assert code.loops_by_function(["another", "copy_loop"]) == {"another": (), "copy_loop": (loop,)}


def test_every_instruction_is_counted_once_and_padding_never() -> None:
    kernel = compile_for(
        copy_loop,
        {"x_ptr": "*bf16", "y_ptr": "*bf16", "V": "i32"},
        {"BLOCK": BLOCK},
        target="sm_90",
    )
    text, _ = sass.disassemble(kernel.asm["cubin"])
    lines = [line for line in text.splitlines() if line.lstrip().startswith("/*")]
    padding = [line for line in lines if "NOP" in line]
    code = sass.analyse(kernel)
    # The branch to itself behind the last EXIT is never reached either.
    assert code.whole.instructions == len(lines) - len(padding) - 1
    assert padding
    assert "NOP" not in code.whole.opcodes
    assert sum(code.whole.opcodes.values()) == code.whole.instructions


@triton.jit
def exp_loop(x_ptr, out_ptr, V, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(x_ptr + start + offs, mask=start + offs < V, other=float("-inf"))
        total += tl.exp2(x.to(tl.float32))
    tl.store(out_ptr, tl.rsqrt(tl.sum(total, axis=0)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("warps", [2, 4])
def test_exponentials_are_one_per_element(target: str, warps: int) -> None:
    code = analysed(exp_loop, target, warps=warps)
    (loop,) = code.loops
    assert loop.body.special == {"ex2": code.elements_per_thread(BLOCK)}
    assert loop.steps(2 * code.elements_per_thread(BLOCK)) == 1
    assert set(loop.body.global_loads) <= {8, 16}
    assert loop.body.barriers == loop.body.shuffles == 0
    # The sum behind the loop goes through lanes and warps.
    assert code.whole.barriers > 0
    assert code.whole.shuffles > 0
    assert code.whole.special["rsq"] >= 1
    assert code.shared_bytes > 0


@triton.jit
def max_loop(x_ptr, out_ptr, V, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(x_ptr + start + offs, mask=start + offs < V, other=float("-inf"))
        total += tl.max(x.to(tl.float32), axis=0)
    tl.store(out_ptr, total)


@pytest.mark.parametrize("target", TARGETS)
def test_reduction_in_a_loop(target: str) -> None:
    (loop,) = analysed(max_loop, target).loops
    assert loop.body.barriers >= 2
    # Five halvings of a warp and two of the four warps; sm_100 reduces a warp at once.
    assert loop.body.shuffles >= (3 if target == "sm_100" else 7)
    assert loop.body.shared_loads > 0
    assert loop.body.shared_stores > 0
    (alone,) = analysed(max_loop, target, block=64, warps=1).loops
    assert alone.body.barriers == 0  # one warp has nobody to wait for
    assert alone.body.shuffles >= (1 if target == "sm_100" else 5)


@triton.jit
def hoard(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Every value is needed again behind a reduction of all of them."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    y = tl.load(x_ptr + BLOCK + offs).to(tl.float32)
    x -= tl.max(x + y, axis=0)
    tl.store(out_ptr + offs, x * tl.exp2(y) / tl.sum(x * y, axis=0))


@pytest.mark.parametrize("target", NVIDIA)
def test_a_block_too_big_spills(target: str) -> None:
    fits = analysed(hoard, target, block=1024, warps=1)
    spills = analysed(hoard, target, block=8192, warps=1)
    assert fits.stack_bytes == fits.whole.local_accesses == 0
    assert spills.stack_bytes > 0
    assert spills.whole.local_loads > 0
    assert spills.whole.local_stores > 0


def test_a_block_too_big_spills_on_amd() -> None:
    fits = analysed(hoard, "gfx942", block=1024, warps=2)
    spills = analysed(hoard, "gfx942", block=32768, warps=2)
    assert fits.spilled_registers == fits.stack_bytes == fits.whole.local_accesses == 0
    assert spills.spilled_registers is not None
    assert spills.spilled_registers > 0
    assert spills.stack_bytes > 0
    assert spills.whole.local_accesses > 0
    assert spills.resident_blocks < fits.resident_blocks


@triton.jit
def nested_loop(x_ptr, out_ptr, V, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for row in range(N):
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(x_ptr + row * V + start + offs, mask=start + offs < V, other=0.0)
            total += tl.exp2(x.to(tl.float32))
        tl.store(out_ptr + row * BLOCK + offs, total)


@pytest.mark.parametrize("target", TARGETS)
def test_nested_loops(target: str) -> None:
    code = analysed(nested_loop, target)
    outer, inner = code.loops
    assert (outer.depth, outer.is_innermost) == (1, False)
    assert (inner.depth, inner.is_innermost) == (2, True)
    assert code.innermost_loops == (inner,)
    assert inner.body.instructions < outer.body.instructions < code.whole.instructions
    assert inner.body.bytes_stored == 0
    assert outer.body.bytes_stored == 4 * code.elements_per_thread(BLOCK)


@triton.jit
def branching_loop(x_ptr, out_ptr, V, BLOCK: tl.constexpr):
    """Seldom, a block is stored: long enough for a real branch, not predicates."""
    offs = tl.arange(0, BLOCK)
    most = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(x_ptr + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
        top = tl.max(x, axis=0)
        if top > most:
            most = top
            for _ in tl.static_range(4):
                x = tl.exp2(x)
            tl.store(out_ptr + start + offs, x, mask=start + offs < V)


@pytest.mark.parametrize("target", NVIDIA)
def test_a_branch_in_a_loop(target: str) -> None:
    code = analysed(branching_loop, target)
    (loop,) = code.loops
    assert loop.body.special["ex2"] == 4 * code.elements_per_thread(BLOCK)
    assert loop.straight is not None
    assert loop.straight.instructions <= loop.body.instructions
    assert loop.straight.bytes_loaded == loop.body.bytes_loaded


@triton.jit
def division_loop(x_ptr, y_ptr, out_ptr, V, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(x_ptr + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + start + offs, mask=start + offs < V, other=1.0).to(tl.float32)
        total += tl.div_rn(x, y)
    tl.store(out_ptr + offs, total)


def test_a_subroutine_is_no_part_of_the_loop_that_calls_it() -> None:
    code = analysed(division_loop, "sm_90", block=512)
    (loop,) = code.loops
    elements = code.elements_per_thread(512)
    calls = sum(n for opcode, n in loop.body.opcodes.items() if opcode.startswith("CALL"))
    assert calls == loop.body.special["rcp"] == elements
    assert not any(opcode.startswith("RET") for opcode in loop.body.opcodes)
    assert any(opcode.startswith("RET") for opcode in code.whole.opcodes)


@triton.jit
def atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offs % 8, tl.load(x_ptr + offs).to(tl.float32))


@pytest.mark.parametrize("target", TARGETS)
def test_atomics(target: str) -> None:
    code = analysed(atomic_kernel, target, block=WARPS * TARGETS[target].warp_size)
    assert code.whole.atomics == 1
    assert code.loops == ()


def test_branches_out_of_line() -> None:
    """Branches with a condition among the operands, and a slow path behind the end."""
    text = """
//--------------------- .text.k                   --------------------------
.text.k:
        /*0000*/                   MOV R1, R2 ;
.L_head:
	//## File "/somewhere/stage.py", line 7
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   BRA.DIV UR4, `(.L_slow) ;
        /*0030*/                   SHFL.BFLY PT, R0, R13, 0x10, 0x1f ;
.L_back:
        /*0040*/               @P0 EXIT ;
        /*0050*/                   BRA.U UP0, `(.L_head) ;
        /*0060*/                   EXIT ;
.L_slow:
        /*0070*/                   WARPSYNC.COLLECTIVE R15, `(.L_meet) ;
.L_meet:
        /*0080*/                   SHFL.BFLY PT, R0, R13, 0x10, 0x1f ;
        /*0090*/                   BRA `(.L_back) ;
.L_end:
        /*00a0*/                   BRA `(.L_end);
        /*00b0*/                   NOP;
"""
    graph = sass._Graph(sass._read_sass(text, "k"), sass._follow_sass)
    (loop,) = sass._loops(graph, sass._classify_sass)
    assert loop.body.instructions == 8
    assert loop.body.shuffles == 2
    assert loop.straight is not None
    assert loop.straight.instructions == 5
    assert loop.straight.shuffles == 1
    assert loop.sources == {("/somewhere/stage.py", 7): 8}
    assert len(graph.instructions(graph.reachable)) == 10


def test_indirect_branches_are_refused() -> None:
    text = "//--- .text.k ---\n        /*0000*/                   BRX R2 -0x10 ;\n"
    with pytest.raises(ValueError, match="indirect"):
        sass._Graph(sass._read_sass(text, "k"), sass._follow_sass)


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "warps", "blocks"),
    [
        (90, 32, 0, 8, 8),  # 64 warps
        (90, 16, 0, 1, 32),  # 32 blocks
        (90, 64, 0, 8, 4),  # registers: 2,048 per warp, 8 warps per quarter
        (90, 65, 0, 8, 3),  # 72 registers are 2,304 per warp, 7 warps per quarter
        (90, 128, 0, 8, 2),
        (90, 255, 0, 8, 1),
        (90, 128, 0, 32, 0),  # 32 warps of 128 registers do not fit
        (90, 32, 64 * 1024, 4, 3),  # shared memory, of which 1 KiB per block is the system's
        (80, 32, 64 * 1024, 4, 2),
        (86, 32, 0, 8, 6),  # 48 warps
        (86, 16, 0, 1, 16),  # 16 blocks
        (89, 16, 0, 1, 24),  # 24 blocks
        (89, 32, 99 * 1024, 4, 1),
        (100, 32, 227 * 1024, 4, 1),
        (120, 32, 0, 8, 6),  # 48 warps
        (120, 16, 0, 1, 24),  # 24 blocks
        (120, 32, 48 * 1024, 4, 2),
    ],
)
def test_occupancy(arch: int, registers: int, shared_bytes: int, warps: int, blocks: int) -> None:
    assert sass.resident_blocks(arch, registers, shared_bytes, warps) == blocks
