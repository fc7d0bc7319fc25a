"""The question about times on a GPU, on a CPU: what a result says, and that results survive
whatever stops a run."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import akl_triton.rows
from akl_triton import adaptive_kl, distillation_loss, eager, forward_kl, linear_ops
from akl_triton.cli.bench import peak_memory
from akl_triton.kernels.launch_table import Launch, candidates
from bench.__main__ import main
from bench.inputs import linear_peers, peers
from bench.inputs.peers import OURS
from bench.inputs.synthetic import make_hidden_states, make_pair
from bench.lab import clock, ptxcpu
from bench.questions import gpu

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
ours = functools.partial(adaptive_kl, backend="torch")
# What the losses of hidden states say that they compute.
COMPUTED: dict[str, Callable[..., Tensor]] = {
    "AKL": adaptive_kl,
    "forward KL": forward_kl,
    "Jensen-Shannon": functools.partial(distillation_loss, divergence="jensen_shannon"),
}


def case(name: str = "a loss", loss: Any = ours, phase: str = "both", **options: Any) -> gpu.Case:
    fixed: dict[str, Any] = {
        "package": OURS,
        "computes": "adaptive_kl",
        "rows": 2,
        "vocabulary": 30,
    }
    return gpu.Case(name=name, loss=loss, phase=phase, **fixed | options)


def run(folder: Path, *cases: gpu.Case, seconds: float = 60.0) -> dict[str, Any]:
    """The answer, which is the JSON file that the run leaves."""
    data = gpu.measure_all(cases, {"a peer": "why"}, CPU, folder, seconds=seconds, copy_bytes=4096)
    assert data == json.loads((folder / "cpu.json").read_text())
    return data


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SECONDS_PER_CASE", 0.0)


def fail(error: BaseException) -> Callable[..., Tensor]:
    def loss(*_: Tensor) -> Tensor:
        raise error

    return loss


# ---- figures


def test_state_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.gpu_state() is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho '580.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 80 W, 700 W, 30'\n"
    )
    smi.chmod(0o755)
    state = gpu.gpu_state()
    assert state is not None
    assert (state["driver_version"], state["clocks.max.sm"]) == ("580.1", "1980 MHz")
    assert state["temperature.gpu"] == "30"


@pytest.mark.parametrize("phase, tensors", [("forward", 2), ("backward", 3), ("inplace", 3)])
def test_figures(phase: str, tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a call of one millisecond: bytes / 1e6 are GB/s."""
    times = clock.Times(1.0, 0.5, 2.0, 7, 0.1)
    monkeypatch.setattr(gpu, "time_calls", lambda *_: times)
    bench = gpu.Bench(CPU, copy_bytes=1_000_000)
    assert bench.copy_gb_per_s == 2.0  # read and written
    result = bench.measure(case(phase=phase, rows=1000, vocabulary=500))
    assert result.status == "ok"
    assert result.gb_per_s == pytest.approx(tensors * 1000 * 500 * 2 / 1e6)
    assert result.of_copy == pytest.approx(tensors / 2)
    assert (result.median, result.percentile_80, result.repeats) == (1.0, 2.0, 7)


@pytest.mark.parametrize("phase", gpu.ON_LOGITS)
def test_phases_do_what_they_say(phase: str) -> None:
    student, teacher = make_pair(3, 50, CPU, torch.float32, seed=0)
    before = student.detach().clone()
    output = gpu.PHASES[phase].run(ours, gpu.PHASES[phase].prepare(ours, student, teacher))
    loss = adaptive_kl(student, teacher, backend="torch")
    expected = loss if phase == "forward" else torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(output, expected)
    assert torch.equal(student, before)  # in place or not: the next call has the same logits
    assert student.grad is None


@pytest.fixture
def from_hidden_states() -> dict[str, gpu.Case]:
    """The cases that start from hidden states: 192 tokens, V = 4096, H = 64."""
    sizes = gpu.Sizes((50,), (2,), (4096,), (192,), hidden=64)
    return {c.name: c for c in gpu.plan(CPU, "torch", sizes)[0] if c.hidden}


def test_what_starts_from_hidden_states_gives_both_gradients(
    from_hidden_states: dict[str, gpu.Case],
) -> None:
    """Those of AKL are the same with all logits and without."""
    phase = gpu.PHASES["linear"]
    student_hidden, student_weight, teacher_hidden, teacher_weight = states = make_hidden_states(
        24, 500, 16, CPU, torch.float32, seed=0
    )
    logits = student_hidden @ student_weight.T
    assert 2.8 < logits.std() < 3.2
    for c in from_hidden_states.values():
        gradients = phase.run(c.loss, phase.prepare(c.loss, *states))
        loss = COMPUTED[c.computes](logits, teacher_hidden @ teacher_weight.T)
        expected = torch.autograd.grad(loss, (student_hidden, student_weight), retain_graph=True)
        for ours, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, exact)
            assert exact.abs().max() > 1e-4
    assert {c.computes for c in from_hidden_states.values()} >= {"AKL", "forward KL"}


def test_the_model_of_memory(
    from_hidden_states: dict[str, gpu.Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured peak is 2 C V bytes + 4 V H and the gradients; with all logits it is higher."""
    rows, vocabulary, hidden, chunk = 192, 4096, 64, 64
    model = 2 * chunk * vocabulary * 2 + 4 * vocabulary * hidden
    gradients = 2 * (rows + vocabulary) * hidden
    monkeypatch.setitem(linear_ops.CHUNK_BYTES, "cpu", 2 * chunk * vocabulary * 2)
    monkeypatch.setattr(eager, "TEMPORARY_BYTES", 2**19)
    monkeypatch.setattr(akl_triton.rows, "BLOCK_BYTES", 2**16)
    inputs = make_hidden_states(rows, vocabulary, hidden, CPU, gpu.DTYPE, seed=0)
    phase = gpu.PHASES["linear"]
    peaks = {}
    for name, c in from_hidden_states.items():
        prepared = phase.prepare(c.loss, *inputs)
        peaks[name] = peak_memory(functools.partial(phase.run, c.loss, prepared), CPU)
    for name in ("linear_adaptive_kl", "linear_forward_kl"):
        assert from_hidden_states[name].model_bytes(CPU) == model
        assert model <= peaks[name] <= 1.1 * (model + gradients)
    unfused = "adaptive_kl of all logits, in place"
    assert from_hidden_states[unfused].model_bytes(CPU) is None
    assert peaks[unfused] >= 2 * rows * vocabulary * 2
    few = replace(from_hidden_states["linear_adaptive_kl"], rows=5)  # less than a chunk
    assert few.model_bytes(CPU) == 2 * 5 * vocabulary * 2 + 4 * vocabulary * hidden


def test_a_result_from_hidden_states(
    from_hidden_states: dict[str, gpu.Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result gives the model with the time; bytes per second would say nothing about products."""
    c = from_hidden_states["linear_adaptive_kl"]
    report = run(tmp_path, c)
    (result,) = report["results"]
    assert not gpu.failures(report) and result["median"] > 0 and result["pairs"] == 2
    assert (result["hidden"], result["gb_per_s"], result["of_copy"]) == (64, None, None)
    assert result["model_mib"] == (2 * 192 * 4096 * 2 + 4 * 4096 * 64) / 2**20
    assert "ms, the model without gradients 4.0 MiB" in capsys.readouterr().out


# ---- which cases


SIZES = gpu.Sizes((1000, 1016, 1003), (16, 4), (1000,), (4,), 8)


def test_every_size_has_all_phases_and_launches() -> None:
    cases, absent = gpu.plan(CPU, "triton", SIZES)
    assert "torch authors, compiled" in absent
    for vocabulary in SIZES.vocabularies:
        of_size = [c for c in cases if c.vocabulary == vocabulary]
        for rows in (16, 4):
            phases = {c.phase for c in of_size if c.rows == rows and c.name == "adaptive_kl"}
            assert phases == set(gpu.ON_LOGITS)
        launches = {c.launch for c in of_size} - {None}
        assert launches == {*candidates("head or statistics"), *candidates("gradient")}
        names = {c.name for c in of_size if c.package == OURS}
        assert names >= {"adaptive_kl", "forward_kl", "reverse_kl", "jensen_shannon"}
        assert any(c.package != OURS for c in of_size)
    assert len({c.label for c in cases}) == len(cases)
    timed = {c.name for c in cases if c.phase == "linear" and c.package == OURS}
    assert timed == {
        *("linear_adaptive_kl", "linear_forward_kl"),
        "adaptive_kl of all logits, in place",
    }


def test_what_decides_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every peer: the launches, then the losses of logits, then those of hidden states."""
    monkeypatch.setattr(peers.Peer, "obstacle", lambda *_: None)
    monkeypatch.setattr(linear_peers.LinearPeer, "obstacle", lambda *_: None)
    cases, absent = gpu.plan(torch.device("cuda"), "triton", SIZES)
    assert not absent

    def first(length: int) -> list[gpu.Case]:
        taken, cases[:] = cases[:length], cases[length:]
        return taken

    telling = (1000, 1016)
    expected = {
        (phase, launch, v)
        for phase, kernel in gpu.DECIDES.items()
        for launch in candidates(kernel)
        for v in telling
    }
    launches = first(len(expected))
    assert {(c.phase, c.launch, c.vocabulary) for c in launches} == expected
    losses = list(itertools.takewhile(lambda c: c.hidden is None, cases))
    first(len(losses))
    assert {(c.rows, c.launch, c.temperature) for c in losses} == {(16, None, 1.0)}
    names = {p.name for p in peers.PEERS} | {"jensen_shannon"}
    assert {c.name for c in losses if c.vocabulary == 1000 and c.phase == "both"} == names
    compiled = {p.name for p in peers.PEERS if p.kind == "compiled"}
    assert {c.name for c in losses if c.vocabulary == 1016} == names - compiled
    packages = {c.package for c in itertools.takewhile(lambda c: c.hidden, cases)}
    assert packages == {OURS, "torch", "liger-kernel", "trl"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="ptxcpu needs the C++ compiler g++")
def test_a_launch_reaches_the_kernels() -> None:
    """Neither N nor V, within an alignment class, causes another compilation."""
    launches: list[ptxcpu.Launch] = []
    loss = functools.partial(adaptive_kl, backend="triton")
    with ptxcpu.active(arch=90, observer=launches.append):
        bench = gpu.Bench(CPU, copy_bytes=4096)
        cases = [
            case(loss=loss, phase="forward", rows=rows, vocabulary=v, launch=Launch(128, 32, 128))
            for rows, v in ((2, 208), (5, 336))
        ]
        first, second = (bench.measure(c) for c in cases)
    assert (first.status, first.compilations) == ("ok", 1)
    assert (second.status, second.compilations) == ("ok", 0)
    assert {launch.metadata.num_warps for launch in launches} == {1}
    blocks = {
        value
        for launch in launches
        for path, value in launch.source.constants.items()
        if launch.source.fn.arg_names[path[0]] == "BLOCK"
    }
    assert blocks == {128}


# ---- results


def test_a_run_on_a_cpu_does_not_look_like_one_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tmp_path, case())
    assert not gpu.failures(report)
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.csv", "cpu.json", "cpu.png"}
    assert report["device"]["type"] == "cpu" and report["device"]["name"].startswith("cpu")
    assert report["clock"].startswith("wall clock")
    assert report["results"][0]["device"] == "cpu"
    assert report["results"][0]["peak_mib"] is None  # nothing was counted
    assert "cpu: akl-triton a loss, both" in capsys.readouterr().out
    assert report["versions"]["torch"] == torch.__version__
    (row,) = csv.DictReader((tmp_path / "cpu.csv").open())
    assert float(row["median"]) == report["results"][0]["median"] > 0


def test_failures_are_results(tmp_path: Path) -> None:
    """An error of a peer is no failure of the run."""
    peer: dict[str, Any] = {"package": "peer"}
    report = run(
        tmp_path,
        case("needs much", fail(torch.OutOfMemoryError("much")), **peer),
        case("is wrong", fail(ValueError("why\nmore")), **peer),
        case("is right"),
    )
    assert not gpu.failures(report)
    statuses = [result["status"] for result in report["results"]]
    assert statuses == ["out of memory", "ValueError: why", "ok"]
    assert report["results"][0]["median"] is None
    report = run(tmp_path, case("is right"), case("is wrong", fail(ValueError("why"))))
    assert gpu.failures(report) == ["is wrong, both, V = 30: ValueError: why"]


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    report = run(tmp_path, case("never"), seconds=-1.0)
    assert gpu.failures(report) == ["nothing of ours was measured"]
    assert report["results"] == []
    absent, never = report["left_out"]
    assert absent == {"case": "a peer", "reason": "why"}
    assert "never" in never["case"] and never["reason"] == "the time was up"


def test_results_outlive_what_stops_the_run(tmp_path: Path) -> None:
    """The signal is the one with which `timeout` ends a call that hangs."""
    with pytest.raises(SystemExit):
        run(tmp_path, case("done"), case("hangs", fail(SystemExit(1))), case("never"))
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert [result["name"] for result in report["results"]] == ["done"]
    assert len(report["left_out"]) == 3
    assert len(list(csv.DictReader((tmp_path / "cpu.csv").open()))) == 1
    assert (tmp_path / "cpu.png").stat().st_size > 0


def test_the_fastest_launch_is_named(tmp_path: Path) -> None:
    launches = Launch(1024, 128, 128), Launch(2048, 128, 128)
    cases = [case(phase="inplace", launch=launch) for launch in launches]
    report = gpu.Report(tmp_path, {"device": {"type": "cpu"}}, cases, {})
    result = gpu.Bench(CPU, copy_bytes=4096).measure(cases[0])
    for c, block, milliseconds in zip(cases, (1024, 2048), (3.0, 2.0), strict=True):
        report.add(c, replace(result, BLOCK=block, threads=128, registers=128, median=milliseconds))
    (text,) = gpu.best_launches(report.data)
    assert "BLOCK = 2048, 128 threads, 128 registers (2.000 ms)" in text


# ---- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_measures_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["gpu", "--output", str(tmp_path)])
    assert stop.value.code == 2
    script = gpu_sh(tmp_path, PYTHON=sys.executable)
    assert script.returncode == 2
    assert "PyTorch sees no GPU here" in script.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    script = gpu_sh("--tiny", OUT=str(tmp_path), PYTHON="/bin/false")
    assert script.returncode == 1
    codes = {row["step"]: row["exit_code"] for row in steps_of(tmp_path)}
    assert codes == dict.fromkeys(("tests", "compile", "times", "dram", *SANITIZERS), "1")


def test_the_steps_on_a_gpu(tmp_path: Path) -> None:
    """A run with a Python that succeeds at everything, and a sanitizer that fails."""
    results, tools = tmp_path / "results", tmp_path / "bin"
    with_tools = {"PYTHON": "/bin/true", "PATH": f"{tools}:{os.environ['PATH']}"}
    write_tool(tools / "ncu", "")
    sanitizer = write_tool(tools / "compute-sanitizer", "exit 86")
    assert gpu_sh(results, **with_tools).returncode == 1
    codes = {row["step"]: row["exit_code"] for row in steps_of(results)}
    assert [codes.pop(tool) for tool in SANITIZERS] == ["86"] * 3
    assert set(codes.values()) == {"0"}
    assert {"compile", "times", "dram", "tests-oracle", "tests-api", "tests-linear"} < set(codes)
    write_tool(sanitizer, "")
    assert gpu_sh(results, **with_tools).returncode == 0


def test_all_steps_together_take_less_than_nine_minutes(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    write_tool(tools / "ncu", "")
    write_tool(tools / "compute-sanitizer", "")
    gpu_sh(tmp_path, PYTHON="/bin/true", PATH=f"{tools}:{os.environ['PATH']}")
    limits: dict[str, int] = {}  # of the steps, and of those that run at the same time
    for row in steps_of(tmp_path):
        of_tests = row["step"] == "compile" or row["step"].startswith("tests-")
        step = "tests" if of_tests else "sanitizer" if row["step"] in SANITIZERS else row["step"]
        limits[step] = max(limits.get(step, 0), int(row["limit"]))
    assert set(limits) == {"tests", "times", "dram", "sanitizer"}
    killed_after = re.search(r"--kill-after=(\d+)", (ROOT / "bench" / "gpu.sh").read_text())
    assert killed_after is not None
    assert sum(limits.values()) + len(limits) * int(killed_after[1]) < 540


def test_a_tool_that_is_missing_or_not_permitted_is_skipped(tmp_path: Path) -> None:
    """No failure, but a line with the reason."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "mkdir", "rm", "timeout", "grep", "tail", "cat"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    assert gpu_sh(tmp_path, PYTHON="/bin/true", PATH=str(tools)).returncode == 0
    codes = {row["step"]: row["exit_code"] for row in steps_of(tmp_path)}
    assert codes["dram"] == "skipped: ncu is not on PATH"
    for tool in SANITIZERS:
        assert codes[tool] == "skipped: compute-sanitizer is not on PATH"
    write_tool(tools / "ncu", "")
    refused = write_tool(
        tmp_path / "python", 'case "$*" in *dram*) echo ERR_NVGPUCTRPERM; exit 2;; esac'
    )
    assert gpu_sh(tmp_path, PYTHON=str(refused), PATH=str(tools)).returncode == 0
    codes = {row["step"]: row["exit_code"] for row in steps_of(tmp_path)}
    assert codes["dram"].startswith("skipped: the counters of this GPU may not be read")


NOTHING_ELSE = """
import importlib.machinery, importlib.metadata, re, sys

def with_requirements(name, found):
    try:
        requirements = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:  # of another platform
        return found
    found.add(re.sub("[-_.]+", "-", name).lower())
    for requirement in requirements:
        wanted = re.match(r"[\\w.-]+", requirement)[0]
        if "extra ==" not in requirement and re.sub("[-_.]+", "-", wanted).lower() not in found:
            with_requirements(wanted, found)
    return found

needed = set()
for name in ("torch", "triton", "pytest", "numpy", "matplotlib"):
    with_requirements(name, needed)
others = {
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if module not in ("akl_triton", "bench", "tests")
    and not {re.sub("[-_.]+", "-", owner).lower() for owner in owners} & needed
}

class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in others else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
"""


def test_nothing_is_needed_that_gpu_sh_does_not_name(tmp_path: Path) -> None:
    """The questions run, and the tests are collected, where nothing else can be imported."""
    script = (ROOT / "bench" / "gpu.sh").read_text()
    patterns = " ".join(re.findall(r"tests/\S+\.py", script))
    expanded = subprocess.check_output(["bash", "-c", f"echo {patterns}"], cwd=ROOT, text=True)
    files = sorted(set(expanded.split()))
    assert {"tests/kernels/test_oracle.py", "tests/test_linear.py"} < set(files)
    (tmp_path / "sitecustomize.py").write_text(NOTHING_ELSE)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "PATH": f"{ROOT / 'bench' / 'stand_ins'}:{os.environ['PATH']}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    other = subprocess.run(
        [sys.executable, "-c", "import rich"], env=environment, capture_output=True, text=True
    )
    assert "No module named 'rich'" in other.stderr
    for arguments in (
        ("bench", "gpu", "--tiny", "--seconds", "1", "--output", str(tmp_path)),
        ("bench", "dram", "--tiny", "--output", str(tmp_path)),
        ("pytest", "--collect-only", "-q", *files),
    ):
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=True)


SANITIZERS = ("memcheck", "racecheck", "synccheck")


def write_tool(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def steps_of(results: Path) -> list[dict[str, str]]:
    with (results / "steps.csv").open() as file:
        return list(csv.DictReader(file))


def gpu_sh(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "bench" / "gpu.sh", *arguments],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
    )
