"""Instructions that look at other lanes, at memory, or at nothing, in 64 threads of a CTA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.lab import ptxcpu

THREADS = 64


def run(body: str, *, sched: int = 0) -> torch.Tensor:
    """The value that each thread leaves in %r9; %r1 is the thread, %r2 its lane, %rd1 a word for
    each."""
    ptx = f"""
.visible .entry k(.param .u64 k_param_0) .reqntid {THREADS}
{{
    .reg .pred %p<10>;
    .reg .b32 %r<12>;
    .reg .f32 %f<20>;
    .reg .b64 %rd<10>;
    .shared .align 16 .b8 shared[1024];
    ld.param.u64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %laneid;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    {body}
    st.global.b32 [%rd2], %r9;
    ret;
}}
"""
    out = torch.zeros(THREADS + 64, dtype=torch.int32)  # the words after them are for the body
    address = out.data_ptr()
    ptxcpu.load(ptx).run(
        (1,),
        [address.to_bytes(8, "little")],
        ranges=[ptxcpu.Range(address, out.nbytes)],
        sched=sched,
    )
    return out


def of_threads(function: Callable[[int], int]) -> list[int]:
    """The function of every thread t, as a signed word."""
    values = [function(t) & (2**32 - 1) for t in range(THREADS)]
    return [value - 2**32 if value >> 31 else value for value in values]


LANES: dict[str, tuple[str, Callable[[int], int]]] = {
    "shfl.bfly": ("shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1;", lambda t: t ^ 3),
    "shfl.up": (
        "shfl.sync.up.b32 %r9|%p1, %r1, 5, 0, -1; @!%p1 mov.u32 %r9, 99;",
        lambda t: t - 5 if t % 32 >= 5 else 99,
    ),
    "shfl.down": (
        "shfl.sync.down.b32 %r9, %r1, 5, 31, -1;",
        lambda t: t + 5 if t % 32 < 27 else t,
    ),
    "shfl.idx": ("shfl.sync.idx.b32 %r9, %r1, 7, 31, -1;", lambda t: t // 32 * 32 + 7),
    "redux.add": ("redux.sync.add.s32 %r9, %r1, -1;", lambda t: sum(range(32)) + t // 32 * 1024),
    "redux.min": ("redux.sync.min.u32 %r9, %r1, -1;", lambda t: t // 32 * 32),
    "redux.xor": ("redux.sync.xor.b32 %r9, %r1, -1;", lambda t: 0),
    "vote.ballot": (
        "setp.lt.u32 %p1, %r2, 5; vote.sync.ballot.b32 %r9, %p1, -1;",
        lambda t: 31,
    ),
    "vote.any": (
        "setp.eq.u32 %p1, %r1, 40; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;",
        lambda t: t // 32,
    ),
    "vote.all": (
        "setp.ne.u32 %p1, %r1, 40; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;",
        lambda t: 1 - t // 32,
    ),
    "activemask": ("activemask.b32 %r9;", lambda t: -1),
    "elect": (
        "elect.sync %r3|%p1, -1; selp.b32 %r9, 7, %r3, %p1;",
        lambda t: 7 if t % 32 == 0 else 0,
    ),
}


@pytest.mark.parametrize("name", LANES)
def test_lanes_of_a_warp(name: str) -> None:
    body, expected = LANES[name]
    assert run(body)[:THREADS].tolist() == of_threads(expected)


def test_a_branch_around_the_rest() -> None:
    """Threads leave by exit, by ret and at the end; each writes its own value."""
    out = run("""
        mov.u32 %r9, 1;
        setp.lt.u32 %p1, %r1, 20;
        @%p1 bra $stay;
        st.global.b32 [%rd2], 2;
        setp.lt.u32 %p2, %r1, 40;
        @%p2 exit;
        ret;
    $stay:
    """)
    assert out[:THREADS].tolist() == of_threads(lambda t: 1 if t < 20 else 2)


def test_a_trap_is_a_fault() -> None:
    run("mov.u32 %r9, 0; setp.gt.u32 %p1, %r1, 63; @%p1 trap;")
    with pytest.raises(ptxcpu.PtxError, match="trap"):
        run("mov.u32 %r9, 0; setp.gt.u32 %p1, %r1, 62; @%p1 trap;")


ATOMICS: dict[str, tuple[str, int, Callable[[int, int], int]]] = {
    "add": ("red.global.add.u32 [%rd1+256], %r1;", 0, lambda old, t: old + t),
    "max": ("red.global.max.s32 [%rd1+256], %r1;", 50, max),
    "min": ("atom.global.min.u32 %r3, [%rd1+256], %r1;", 50, min),
    "xor": ("atom.global.xor.b32 %r3, [%rd1+256], %r1;", 9, lambda old, t: old ^ t),
    "inc": (
        "atom.global.inc.u32 %r3, [%rd1+256], 6;",
        0,
        lambda old, t: 0 if old >= 6 else old + 1,
    ),
    "exch": ("atom.global.exch.b32 %r3, [%rd1+256], 3;", 0, lambda old, t: 3),
    "cas": ("atom.global.cas.b32 %r3, [%rd1+256], 0, 8;", 0, lambda old, t: 8 if old == 0 else old),
}


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics_of_all_threads_arrive(name: str) -> None:
    text, start, updated = ATOMICS[name]
    out = run(f"""
        mov.u32 %r9, 0;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 st.global.b32 [%rd1+256], {start};
        bar.sync 0;
        {text}
    """)
    value = start
    for thread in range(THREADS):
        value = updated(value, thread)
    assert out[THREADS].item() == value


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_threads_meet_at_a_barrier(sched: int) -> None:
    """A thread reads a word that a thread of the other warp has stored to shared memory."""
    out = run(
        """
        mov.u32 %r3, shared;
        mad.lo.u32 %r4, %r1, 4, %r3;
        st.shared.b32 [%r4], %r1;
        barrier.sync 0;
        xor.b32 %r5, %r1, 33;
        mad.lo.u32 %r5, %r5, 4, %r3;
        ld.shared.b32 %r9, [%r5];
        """,
        sched=sched,
    )
    assert out[:THREADS].tolist() == of_threads(lambda t: t ^ 33)


def test_copies_arrive_in_shared_memory() -> None:
    """16 bytes per thread, of which 12 are read; the last lanes read none, from an illegal
    address."""
    out = run("""
        st.global.b32 [%rd2], %r1;
        bar.sync 0;
        mov.u32 %r3, shared;
        mad.lo.u32 %r4, %r2, 16, %r3;
        and.b32 %r5, %r2, 15;
        mad.wide.u32 %rd3, %r5, 16, %rd1;
        setp.lt.u32 %p1, %r2, 28;
        selp.b32 %r6, 12, 0, %p1;
        @!%p1 mov.b64 %rd3, 64;
        cp.async.cg.shared.global [%r4], [%rd3], 16, %r6;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        mad.lo.u32 %r4, %r1, 8, %r3;
        ld.shared.b32 %r9, [%r4];
        bar.sync 0;
    """)
    words = [word % 64 if word % 4 < 3 and word < 28 * 4 else 0 for word in range(128)]
    assert out[:THREADS].tolist() == of_threads(lambda t: words[2 * t])


@pytest.mark.parametrize("trans", [False, True])
def test_loaded_matrices(trans: bool) -> None:
    """Thread l holds row l / 4, columns 2 (l % 4) and the next, of a matrix that counts up."""
    modifier = ".trans" if trans else ""
    out = run(f"""
        mov.u32 %r3, shared;
        mad.lo.u32 %r4, %r1, 4, %r3;
        shl.b32 %r5, %r1, 17;
        shl.b32 %r6, %r1, 1;
        or.b32 %r5, %r5, %r6;
        or.b32 %r5, %r5, 0x00010000;
        setp.lt.u32 %p1, %r1, 32;
        @%p1 st.shared.b32 [%r4], %r5;
        bar.sync 0;
        mad.lo.u32 %r4, %r2, 16, %r3;
        ldmatrix.sync.aligned.m8n8.x1{modifier}.shared.b16 {{%r9}}, [%r4];
    """)
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    found = out[:32].view(torch.int16).view(8, 8)
    assert torch.equal(found, matrix.T if trans else matrix)


NEUTRAL = {
    "membar": "membar.gl;",
    "fence": "fence.acq_rel.gpu;",
    "bar": "bar.warp.sync -1;",
    "prefetch": "prefetch.global.L2 [%rd1];",
    "applypriority": "applypriority.global.L2::evict_normal [%rd1], 128;",
    "discard": "discard.global.L2 [%rd1], 128;",
    "griddepcontrol": "griddepcontrol.wait;",
    "nanosleep": "nanosleep.u32 20;",
    "setmaxnreg": "setmaxnreg.inc.sync.aligned.u32 64;",
    "createpolicy": "createpolicy.fractional.L2::evict_last.b64 %rd3, 1.0;",
}


def test_hints_and_fences_change_nothing() -> None:
    out = run("mov.u32 %r9, %r1;" + " ".join(NEUTRAL.values()))
    assert out[:THREADS].tolist() == list(range(THREADS))


def test_memory_of_a_thread_is_its_own() -> None:
    body: Any = """
        {
        .local .align 8 .b8 mine[16];
        .reg .b64 %address;
        mov.u64 %address, mine;
        cvta.local.u64 %rd4, %address;
        st.local.b32 [mine+4], %r1;
        st.local.v2.b32 [mine+8], {%r1, %r2};
        bar.sync 0;
        ld.local.b32 %r3, [mine+4];
        ld.local.v2.b32 {%r4, %r5}, [mine+8];
        add.u32 %r9, %r3, %r4;
        add.u32 %r9, %r9, %r5;
        }
    """
    assert run(body)[:THREADS].tolist() == of_threads(lambda t: 2 * t + t % 32)
