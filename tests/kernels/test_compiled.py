"""The code that the compiler made of the kernels, which no interpreter shows.

A loop variable that was read after its loop once let LLVM delete all the code that followed, and
the kernel still compiled. So kernels are compiled for every target, and their loops, loads,
stores and exps must be there; and random orders of the warps must not change a bit, which a missing
barrier would.
"""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from akl_triton import forward_kl
from akl_triton.kernels import launch
from akl_triton.kernels.layout import STATE_WIDTH, STATISTICS
from bench.lab import ptxcpu
from bench.lab.compile import TARGETS, RecordedLaunch, record_launches
from bench.lab.sass import analyse
from tests.kernels.conftest import INTERPRETER
from tests.kernels.rows import KINDS, make_rows, run

pytestmark = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="ptxcpu needs the C++ compiler g++"
)
STAGES = ("row_statistics", "head_boundary", "row_divergence", "row_gradient")
# The code for sm_86 and sm_89 is that for sm_80 in another order, and gfx950 has little that gfx942
# has not: they are compiled once.
DIFFERENT = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
OFF_THE_BOUNDARIES = [(target, 50_257) for target in ("sm_80", "sm_90", "sm_100", "gfx942")]
RULE: dict[str, Any] = {"mu": 0.5, "temperature": 1.0, "inclusive": False, "stable": True}


def in_one(target: str, v: int = 151_936, weight: float | None = None) -> RecordedLaunch:
    """The kernel that a forward with gradient launches."""
    student = torch.zeros(1, 2, v, dtype=torch.bfloat16)
    with record_launches(target) as recorded:
        launch.forward(
            student,
            student.clone(),
            None,
            None,
            torch.zeros(2),
            None,
            None,
            **RULE,
            weight=weight,
            gradient=torch.zeros_like(student),
            upstream=torch.ones(2),
        )
    return recorded[0]


def separate(target: str, weight: float | None) -> list[RecordedLaunch]:
    """The kernels that a forward and a backward launch."""
    student = torch.zeros(1, 2, 151_936, dtype=torch.bfloat16)
    loss, state, ones = torch.zeros(2), torch.zeros(2, STATE_WIDTH), torch.ones(2)
    with record_launches(target) as recorded:
        launch.forward(
            student, student.clone(), None, None, loss, state, None, **RULE, weight=weight
        )
        launch.backward(
            torch.zeros_like(student),
            student,
            student.clone(),
            None,
            None,
            state,
            ones,
            temperature=1.0,
            weight=weight,
        )
    return recorded


@pytest.mark.parametrize("weight", [None, 1.0])
@pytest.mark.parametrize("target", DIFFERENT)
def test_loops_loads_stores_and_exps_are_there(target: str, weight: float | None) -> None:
    forward, backward = separate(target, weight)
    kernels = {
        "forward with gradient": (in_one(target, weight=weight), STAGES),
        "forward": (forward, STAGES[:3]),
        "backward": (backward, STAGES[3:]),
    }
    for name, (recorded, stages) in kernels.items():
        code = analyse(recorded.compiled)
        by_stage = code.loops_by_function(STAGES)
        for stage in stages:
            if stage in ("head_boundary", "row_divergence") and weight is not None:
                assert not by_stage.get(stage), "a fixed weight needs neither head nor gap"
                continue
            loops = by_stage[stage]
            assert loops, f"{name}: no loop of {stage}"
            assert any(sum(loop.body.global_loads.values()) for loop in loops), (name, stage)
            assert any(loop.body.special.get("ex2", 0) for loop in loops), (name, stage)
        if "row_gradient" in stages:
            for loop in by_stage["row_gradient"]:  # the one without exps searches for a maximum
                if loop.body.special.get("ex2", 0):
                    assert sum(loop.body.global_stores.values()), name
        assert sum(code.whole.global_stores.values()) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_all_loops_move_16_bytes(target: str) -> None:
    """Where V is a multiple of 16, also those over edge blocks, and over the full blocks that
    fill no turn, which a wrong guess of Triton's once moved through shared memory."""
    code = analyse(in_one(target).compiled)
    for stage, loops in code.loops_by_function(STAGES).items():
        for loop in loops:
            assert set(loop.body.global_loads) <= {16}, (stage, loop.body.global_loads)
            assert set(loop.body.global_stores) <= {16}, (stage, loop.body.global_stores)
            if stage != "head_boundary":
                assert loop.body.barriers == loop.body.shuffles == 0, stage
            assert loop.body.local_accesses == 0, stage


@pytest.mark.parametrize(
    ("target", "v"), [*((target, 151_936) for target in TARGETS), *OFF_THE_BOUNDARIES]
)
def test_full_blocks_move_16_bytes_without_barriers(target: str, v: int) -> None:
    """The loop of full blocks has the fewest instructions per exp, and 2 exps a logit pair."""
    recorded = in_one(target, v)
    code = analyse(recorded.compiled)
    per_thread = code.elements_per_thread(recorded.constexprs["BLOCK"])
    for stage in ("row_statistics", "row_divergence", "row_gradient"):
        with_exps = [
            loop
            for loop in code.loops_by_function(STAGES)[stage]
            if loop.body.special.get("ex2", 0)
        ]
        full = min(
            with_exps, key=lambda loop: loop.body.instructions / loop.body.special["ex2"]
        ).body
        assert set(full.global_loads) == {16}, (stage, full.global_loads)
        assert full.special["ex2"] == 2 * per_thread * full.global_loads[16] // 2
        assert full.barriers == full.shuffles == full.local_accesses == 0, stage
        if stage == "row_gradient":
            assert set(full.global_stores) == {16}


def test_multiply_adds_are_fused_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    for recorded in (in_one("sm_90"), *separate("sm_90", None)):
        assert recorded.compiled.metadata.enable_fp_fusion, recorded.name


@pytest.mark.parametrize("sizes", [(32_000, 65_536, 49_152), (128_256, 262_144, 151_936)])
def test_one_compilation_serves_all_sizes(sizes: tuple[int, ...]) -> None:
    """N, V, mu and T are run-time values: only the alignment class of the rows, and a launch that
    the table has for other V, cause a compilation."""
    with record_launches("sm_90") as recorded:
        for n, v, mu, temperature in zip(
            (1, 7, 64), sizes, (0.5, 0.9, 0.1), (1, 2, 1), strict=True
        ):
            student = torch.zeros(1, n, v, dtype=torch.bfloat16)
            launch.forward(
                student,
                student.clone(),
                None,
                None,
                torch.zeros(n),
                torch.zeros(n, STATE_WIDTH),
                None,
                mu=mu,
                temperature=temperature,
                inclusive=False,
                stable=True,
                weight=None,
            )
    seen = {launch.compiled.hash for launch in recorded}
    assert len(recorded) == 3
    assert len(seen) == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_race_between_warps(dtype: torch.dtype) -> None:
    student, teacher = make_rows(5003, 5003, dtype, dtype)
    with ptxcpu.active(arch=90):
        lockstep = run(student, teacher, temperature=2.0)
    for schedule in (1, 2, 3, 4):
        with ptxcpu.active(arch=90, sched=schedule):
            output = run(student, teacher, temperature=2.0)
        for ours, expected in zip(output, lockstep, strict=True):
            assert torch.equal(ours, expected), f"schedule {schedule}"


@needs_compiler
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_entry_of_a_label_is_read_before_and_written_after_the_others(
    temperature: float,
) -> None:
    """In place, another warp may be ahead; the label is in a full block, or in the first."""
    student, teacher = make_rows(5003, 5003, torch.bfloat16, torch.bfloat16)
    labels = torch.linspace(0, 5002, len(student)).long()
    results = []
    for schedule in (0, 1, 2, 3, 4):
        leaf = student.clone().requires_grad_()
        with ptxcpu.active(arch=90, sched=schedule):
            loss = forward_kl(
                1.0 * leaf,
                teacher,
                labels,
                kd_ratio=0.5,
                temperature=temperature,
                inplace=True,
                backend="triton",
            )
            (gradient,) = torch.autograd.grad(loss, leaf)
        results.append(gradient)
        assert torch.equal(gradient, results[0]), f"schedule {schedule}"
    leaf = student.clone().requires_grad_()
    loss = forward_kl(leaf, teacher, labels, kd_ratio=0.5, temperature=temperature, backend="torch")
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(results[0], expected, rtol=1e-2, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures_compute_the_same(arch: int) -> None:
    student, teacher = make_rows(3000, 3000, torch.bfloat16, torch.bfloat16)
    with ptxcpu.active(arch=90):
        expected = run(student, teacher)
    with ptxcpu.active(arch=arch):
        output = run(student, teacher)
    for ours, theirs in zip(output[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(output.gradient, expected.gradient, rtol=1e-2, atol=1e-6)


def sweeps_for_the_head(
    counters: Any, student: Tensor, teacher: Tensor, *, mu: float, temperature: float
) -> float:
    """The number of times that the search for the head of a row reads its teacher logits [V]."""

    def bytes_read(weight: float | None) -> int:
        counters.reset()
        launch.forward(
            student[None, None],
            teacher[None, None],
            None,
            None,
            torch.empty(1),
            torch.empty(1, STATE_WIDTH),
            torch.empty(1, len(STATISTICS)),  # for which a fixed weight sweeps the row as well
            mu=mu,
            temperature=temperature,
            inclusive=False,
            stable=False,
            weight=weight,
        )
        return int(counters["forward_kernel"]["gld_bytes"])

    return (bytes_read(None) - bytes_read(0.5)) / (len(teacher) * teacher.element_size())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sweeps_for_the_head_are_few(dtype: torch.dtype) -> None:
    """No kind of row makes the search crawl; its sweeps are counted by the bytes that a head
    adds."""
    v, bound = 8000, 16
    student, teacher = make_rows(v, v, dtype, dtype, seed=1)

    with ptxcpu.active(arch=90) as counters:
        for row, kind in enumerate(KINDS):
            for temperature, mu in ((1.0, 0.5), (4.0, 0.999), (1.0, 0.9), (0.5, 0.01)):
                of_row = student[row], teacher[row]
                sweeps = sweeps_for_the_head(counters, *of_row, mu=mu, temperature=temperature)
                assert sweeps <= bound, f"{kind}, mu {mu}, T {temperature}: {sweeps:.0f} sweeps"


@needs_compiler
def test_the_search_bisects_where_interpolation_does_not_help() -> None:
    """Nearly all of the mass is at the lower end of every bracket, while a straight line points
    to the upper end, from which light tokens lead down in ever smaller steps."""
    v, light = 8000, 150
    cluster = math.log(0.7 / (0.3 * (v - 1 - light)))  # 0.7 of the mass, in equal tokens
    teacher = torch.full((v,), cluster)
    teacher[0] = 0.0
    teacher[1 : 1 + light] += 1.2 * 0.93 ** torch.arange(light)
    with ptxcpu.active(arch=90) as counters:
        sweeps = sweeps_for_the_head(counters, torch.zeros(v), teacher, mu=0.34, temperature=1.0)
    assert sweeps <= 16, f"{sweeps:.0f} sweeps"


@needs_compiler
def test_logits_in_which_a_step_is_lost_do_not_stall() -> None:
    """The first estimate of the head ends where logits are so large that its steps round away."""
    student, teacher = torch.randn(1, 1, 8000).bfloat16(), torch.full((1, 1, 8000), 1e5).bfloat16()
    executed = []
    with ptxcpu.active(arch=90) as counters:
        for weight in (0.5, None):
            counters.reset()
            rule = RULE | {"temperature": 1e-3, "stable": False, "weight": weight}
            launch.forward(
                student,
                teacher,
                None,
                None,
                torch.empty(1),
                torch.empty(1, STATE_WIDTH),
                torch.empty(1, len(STATISTICS)),
                **rule,
            )
            executed.append(counters["forward_kernel"]["warp_instr"])
    assert executed[1] < 3 * executed[0]
