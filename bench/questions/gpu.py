"""`python -m bench gpu`: times of our losses and of the peers'; a claim about time has to come from
here.

    bench/gpu.sh                              the tests, this, ncu and compute-sanitizer
    python -m bench gpu --output DIR          this alone, in less than --seconds
    python -m bench gpu --output DIR --tiny   all of its code on a CPU: no figure of a GPU

A time is the median over several calls, taken as bench/lab/clock.py says; what the host does before
the launch is a column of its own. GB/s are those of the compulsory bytes, each input read once and
each output written once, whatever a loss really moves, and are compared with a copy in the same
run. From hidden states, where products take the time, memory is compared with the model of the
design instead.

The cases are run in the order of their importance until the time is up: first the launches between
which a GPU has to decide, then our losses and the peers, then the losses of hidden states. Every
result is written as it comes (CSV, JSON), and so is the list of the cases that have been left out,
with the reasons.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import itertools
import json
import multiprocessing
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from matplotlib.figure import Figure
from torch import Tensor

import akl_triton
from akl_triton.backend import triton_obstacle
from akl_triton.kernels.launch_table import Launch, candidates, launch_for
from akl_triton.linear_ops import chunk_rows, default_chunk_bytes
from bench.inputs.linear_peers import PEER_CHUNK, adaptive_kl_of_all_logits, linear_peers
from bench.inputs.losses import FAMILY_LOSSES, LOSSES
from bench.inputs.peers import OURS, PEERS
from bench.inputs.synthetic import DECAY, HiddenStates, make_hidden_states, make_pair
from bench.lab.clock import copies_for, synchronize, time_calls
from bench.lab.compile import counted_compilations
from bench.lab.memory import peak_beyond_inputs
from bench.questions import Unanswerable

ROOT = Path(__file__).resolve().parents[2]


class Sizes(NamedTuple):
    """The sizes of the cases, the most telling first."""

    vocabularies: tuple[int, ...]
    rows: tuple[int, ...]
    linear_vocabularies: tuple[int, ...]
    linear_rows: tuple[int, ...]
    hidden: int

    @property
    def telling(self) -> tuple[int, ...]:
        """The vocabularies at which launches are chosen."""
        return self.vocabularies[:2]


SIZES = Sizes(
    vocabularies=(128_256, 151_936, 32_000, 50_257),
    rows=(4096, 512, 16_384),
    linear_vocabularies=(128_256, 151_936),
    linear_rows=(4096, 16_384),
    hidden=2048,
)
TINY_SIZES = Sizes((1000, 1003), (16, 4), (1000,), (16, 4), hidden=8)
DTYPE = torch.bfloat16
COPY_BYTES = 2**30
TINY_COPY_BYTES = 2**24

# ---------------------------------------------------------------- what is timed

Loss = Callable[..., Tensor]


class Phase(NamedTuple):
    """A kind of call: what must be prepared before it, and the part of it that is timed."""

    prepare: Callable[..., Any]  # of the loss and its inputs
    run: Callable[[Loss, Any], Any]
    # Those of the logits' size, each read or written once; None from hidden states.
    tensors: int | None


def _gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


ON_LOGITS = {
    "forward": Phase(lambda loss, s, t: (s, t), lambda loss, x: loss(*x), 2),
    "backward": Phase(lambda loss, s, t: (loss(s, t), s), lambda loss, x: _gradient(*x), 3),
    "both": Phase(lambda loss, s, t: (s, t), lambda loss, x: _gradient(loss(*x), x[0]), 3),
    # The logits are consumed: every call needs new ones.
    "inplace": Phase(
        lambda loss, s, t: (s * 1, t), lambda loss, x: _gradient(loss(*x, inplace=True), x[0]), 3
    ),
}
PHASES = ON_LOGITS | {
    # Forward and backward from hidden states; the student's lm_head is trained.
    "linear": Phase(
        lambda loss, *states: HiddenStates(*states),
        lambda loss, states: torch.autograd.grad(loss(*states), states[:2]),
        None,
    ),
}


# The kernel of adaptive_kl, by its name in the launch table, whose candidates a phase times.
DECIDES = {
    "inplace": "head or statistics",
    "forward": "head or statistics",
    "backward": "gradient",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the results."""

    name: str
    package: str
    computes: str
    loss: Loss
    phase: str
    rows: int
    vocabulary: int
    temperature: float = 1.0
    launch: Launch | None = None  # None: that of the table
    hidden: int | None = None  # None: starts from logits
    fused: bool = False

    @property
    def label(self) -> str:
        label = f"{self.package} {self.name}, {self.phase}, T = {self.temperature:g}"
        if self.launch:
            label += f", {self.launch}"
        label += f", N = {self.rows:,}, V = {self.vocabulary:,}"
        return label if self.hidden is None else f"{label}, H = {self.hidden:,}"

    def make_inputs(self, rows: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """The inputs of so many rows: logits, or hidden states."""
        if self.hidden is None:
            return make_pair(rows, self.vocabulary, device, DTYPE, seed)
        return make_hidden_states(rows, self.vocabulary, self.hidden, device, DTYPE, seed)

    def input_bytes(self) -> int:
        if self.hidden is None:
            return 2 * self.rows * self.vocabulary * DTYPE.itemsize
        return 2 * (self.rows + self.vocabulary) * self.hidden * DTYPE.itemsize

    def compulsory_bytes(self) -> int | None:
        tensors = PHASES[self.phase].tensors
        return tensors and tensors * self.rows * self.vocabulary * DTYPE.itemsize

    def model_bytes(self, device: torch.device) -> int | None:
        """The peak of a fused loss beyond inputs and gradients by its model, 2 C V bytes + 4 V
        H."""
        if self.hidden is None or not self.fused:
            return None
        row_bytes = 2 * self.vocabulary * DTYPE.itemsize
        tokens = min(chunk_rows(default_chunk_bytes(device), row_bytes), self.rows)
        return tokens * row_bytes + 4 * self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True)
class Result:
    """A case and its outcome; times are in milliseconds."""

    device: str
    package: str
    name: str
    computes: str
    phase: str
    temperature: float
    rows: int
    vocabulary: int
    hidden: int | None
    BLOCK: int | None
    threads: int | None
    registers: int | None
    status: str  # "ok", or what went wrong
    median: float | None = None
    percentile_20: float | None = None
    percentile_80: float | None = None
    repeats: int | None = None
    host: float | None = None  # until the call is enqueued
    gb_per_s: float | None = None  # of the compulsory bytes
    of_copy: float | None = None  # the same as a share of what a copy reaches
    peak_mib: float | None = None  # held at a time beyond the inputs; None where not counted
    model_mib: float | None = None  # of fused losses: 2 C V bytes + 4 V H, without gradients
    compilations: int | None = None  # of Triton kernels, those of an autotuner included
    pairs: int | None = None  # inputs through which the calls rotate


RESULT_FIELDS = [field.name for field in fields(Result)]


@contextlib.contextmanager
def launched_with(launch: Launch | None, phase: str) -> Iterator[None]:
    """Have the kernel that decides a phase take this launch instead of the table's."""
    if launch is None:
        yield
        return
    from akl_triton.kernels import launch as launchers

    def chosen(kernel: str, vocabulary: int) -> Launch:
        if kernel == DECIDES[phase]:
            return launch
        # The same shape, as a gradient's block should be no narrower than its forward's.
        of_table = launch_for(kernel, vocabulary)
        return of_table._replace(BLOCK=launch.BLOCK, threads=launch.threads)

    with mock.patch.object(launchers, "launch_for", chosen):
        yield


class Bench:
    """A device on which cases are measured; it keeps the inputs of the shape that was measured
    last."""

    def __init__(self, device: torch.device, copy_bytes: int):
        self.device = device
        # Without a GPU no cache is known: two pairs, so that the rotation is exercised.
        self._cache_bytes = (
            torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        )
        self._shape: tuple[int, int, int | None] | None = None
        self._inputs: list[tuple[Tensor, ...]] = []
        self.copy_gb_per_s = self._copy_bandwidth(copy_bytes)

    def _copy_bandwidth(self, size: int) -> float:
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        copy = torch.empty_like(source)
        times = time_calls(lambda _: None, lambda _: copy.copy_(source), 1, self.device)
        return 2 * size / times.median / 1e6

    def _inputs_of(self, case: Case) -> list[tuple[Tensor, ...]]:
        shape = case.rows, case.vocabulary, case.hidden
        if self._shape != shape:
            self._inputs, self._shape = [], None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # else blocks of other sizes stay in pieces
            copies = copies_for(case.input_bytes(), self._cache_bytes)
            if self.device.type == "cpu":
                copies = 2
            for seed in range(copies):
                self._inputs.append(case.make_inputs(case.rows, self.device, seed))
            self._shape = shape
        return self._inputs

    def measure(self, case: Case) -> Result:
        """The result of a case; running out of memory, or failing, is a result as well."""
        described: dict[str, Any] = {
            "device": self.device.type,
            "package": case.package,
            "name": case.name,
            "computes": case.computes,
            "phase": case.phase,
            "temperature": case.temperature,
            "rows": case.rows,
            "vocabulary": case.vocabulary,
            "hidden": case.hidden,
            "BLOCK": case.launch and case.launch.BLOCK,
            "threads": case.launch and case.launch.threads,
            "registers": case.launch and case.launch.registers,
        }
        try:
            return Result(**described, status="ok", **self._measured(case))
        except torch.OutOfMemoryError:
            status = "out of memory"
        except Exception as error:  # whatever a peer raises, the others are measured
            status = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        gc.collect()  # the traceback held what the call had allocated
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Result(**described, status=status)

    def _measured(self, case: Case) -> dict[str, Any]:
        inputs = self._inputs_of(case)
        phase = PHASES[case.phase]

        def prepare(i: int) -> Any:
            return phase.prepare(case.loss, *inputs[i])

        def run(state: Any) -> Any:
            return phase.run(case.loss, state)

        with launched_with(case.launch, case.phase), counted_compilations() as compiled:
            times = time_calls(prepare, run, len(inputs), self.device)
            peak = None
            # For a backward alone, the memory of its forward might or might not be counted.
            if case.phase != "backward":
                peak = peak_beyond_inputs(prepare, run, self.device)
        compulsory, model = case.compulsory_bytes(), case.model_bytes(self.device)
        gb_per_s = compulsory and compulsory / times.median / 1e6
        return {
            **times._asdict(),
            "gb_per_s": gb_per_s,
            "of_copy": gb_per_s and gb_per_s / self.copy_gb_per_s,
            "peak_mib": None if peak is None else peak / 2**20,
            "model_mib": model and model / 2**20,
            "compilations": len(compiled),
            "pairs": len(inputs),
        }


# ---------------------------------------------------------------- which cases


def plan(device: torch.device, backend: str, sizes: Sizes) -> tuple[list[Case], dict[str, str]]:
    """(the cases, most important first; peers that cannot be measured here, and why)."""
    theirs = [peer for peer in PEERS if not peer.is_ours]
    absent = {
        f"{peer.package} {peer.name}": why for peer in theirs if (why := peer.obstacle(device))
    }
    if device.type == "cpu":
        absent |= {
            f"{peer.package} {peer.name}": "compiled for a GPU only"
            for peer in theirs
            if peer.kind == "compiled"
        }
    theirs = [peer for peer in theirs if f"{peer.package} {peer.name}" not in absent]
    linear = linear_peers(PEER_CHUNK)
    absent |= {f"{peer.package} {peer.name}": why for peer in linear if (why := peer.obstacle())}

    def ours(
        name: str, phases: Sequence[str], temperature: float = 1.0, launch: Launch | None = None
    ) -> list[Callable[[int, int], Case]]:
        loss = functools.partial(
            (LOSSES | FAMILY_LOSSES)[name], backend=backend, temperature=temperature
        )
        return [
            functools.partial(
                _case, name, OURS, name, loss, phase, temperature=temperature, launch=launch
            )
            for phase in phases
        ]

    def peers(*phases: str, compiled: bool = False) -> list[Callable[[int, int], Case]]:
        return [
            functools.partial(_case, peer.name, peer.package, peer.computes, peer.loss, phase)
            for peer in theirs
            for phase in phases
            if (peer.kind == "compiled") == compiled
        ]

    adaptive = ours("adaptive_kl", tuple(ON_LOGITS))
    like_peers = list(
        itertools.chain.from_iterable(
            ours(name, ("both",)) for name in ("forward_kl", "reverse_kl", "jensen_shannon")
        )
    )
    compared = adaptive + like_peers + peers("both")
    compiled = peers("both", compiled=True)
    launches = list(
        itertools.chain.from_iterable(
            ours("adaptive_kl", (phase,), launch=launch)
            for phase, kernel in DECIDES.items()
            for launch in candidates(kernel)
            if backend == "triton"
        )
    )
    from_hidden_states = [
        functools.partial(
            _case,
            peer.name,
            peer.package,
            peer.computes,
            peer.loss,
            "linear",
            hidden=sizes.hidden,
            fused=peer.package == OURS and peer.loss is not adaptive_kl_of_all_logits,
        )
        for peer in linear
        if not peer.obstacle()
    ]
    first, others = sizes.rows[:1], sizes.rows[1:]
    every, telling = sizes.vocabularies, sizes.telling
    rest = every[len(telling) :]
    parts = (
        (first, telling, launches),
        (first, telling, compared),
        (first, every[:1], compiled),  # torch.compile takes long for every new V
        (sizes.linear_rows, sizes.linear_vocabularies, from_hidden_states),
        (first, rest, compared + launches),
        (first, every, ours("adaptive_kl", ("forward", "both"), temperature=2.0)),
        (first, every, peers("forward", "backward")),
        (others, every, compared),
        (first, every[1:], compiled),
    )
    return [
        case(n, vocabulary)
        for rows, vocabularies, cases in parts
        for n in rows
        for vocabulary in vocabularies
        for case in cases
    ], absent


def _case(
    name: str,
    package: str,
    computes: str,
    loss: Loss,
    phase: str,
    rows: int,
    vocabulary: int,
    **options: Any,
) -> Case:
    return Case(name, package, computes, loss, phase, rows, vocabulary, **options)


# ---------------------------------------------------------------- results


class Report:
    """DIR/{gpu,cpu}.{csv,json}, complete after every result; the picture at the end."""

    def __init__(
        self, folder: Path, facts: dict[str, Any], planned: Sequence[Case], absent: dict[str, str]
    ):
        self.results: list[Result] = []
        self._facts = facts
        self._waiting = [case.label for case in planned]
        self._absent = [{"case": case, "reason": reason} for case, reason in absent.items()]
        # A run on a CPU must not be taken for one on a GPU.
        stem = "gpu" if facts["device"]["type"] == "cuda" else facts["device"]["type"]
        self.json, self.csv, self.png = (folder / f"{stem}.{end}" for end in ("json", "csv", "png"))
        with self.csv.open("w", newline="") as file:
            csv.DictWriter(file, RESULT_FIELDS).writeheader()
        self._write_json()

    def add(self, case: Case, result: Result) -> None:
        self.results.append(result)
        self._waiting.remove(case.label)
        with self.csv.open("a", newline="") as file:
            csv.DictWriter(file, RESULT_FIELDS).writerow(asdict(result))
        self._write_json()

    @property
    def left_out(self) -> list[dict[str, str]]:
        return self._absent + [
            {"case": case, "reason": "the time was up"} for case in self._waiting
        ]

    @property
    def data(self) -> dict[str, Any]:
        return {
            **self._facts,
            "results": [asdict(result) for result in self.results],
            "left_out": self.left_out,
        }

    def _write_json(self) -> None:
        unfinished = self.json.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.json)

    def finish(self) -> None:
        self._write_json()
        self._draw()

    def _draw(self) -> None:
        """Draw time over V, the share of a copy's bandwidth over V, and memory over N."""
        measured = [
            r for r in self.results if r.status == "ok" and r.BLOCK is None and r.hidden is None
        ]
        both = [r for r in measured if r.phase == "both" and r.temperature == 1.0]
        if not both:
            return
        first = both[0]
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        times, shares, memory = figure.subplots(1, 3)
        curves(
            times,
            [(f"{r.name} ({r.package})", r.vocabulary, r.median) for r in both if _n(r, first)],
            f"forward + backward, N = {first.rows:,}, ms",
            "vocabulary",
        )
        curves(
            shares,
            [
                (f"{r.name}, {r.phase}", r.vocabulary, r.of_copy)
                for r in measured
                if r.package == OURS and _n(r, first) and r.temperature == 1.0
            ],
            "compulsory bytes/s, share of a copy's",
            "vocabulary",
        )
        curves(
            memory,
            [
                (f"{r.name} ({r.package}), {r.phase}", r.rows, r.peak_mib)
                for r in measured
                if r.vocabulary == first.vocabulary
                and r.phase in ("both", "inplace")
                and r.temperature == 1.0
            ],
            f"peak memory beyond inputs, V = {first.vocabulary:,}, MiB",
            "rows",
        )
        times.set_yscale("log")
        facts = self._facts
        figure.suptitle(
            f"device: {facts['device']['name']} ({facts['clock']}), torch "
            f"{facts['versions']['torch']}, triton {facts['versions']['triton']}, {facts['date']}",
            fontsize=10,
        )
        figure.savefig(self.png, dpi=150)


def _n(result: Result, first: Result) -> bool:
    return result.rows == first.rows


def curves(axes: Any, points: list[tuple[str, int, float | None]], title: str, x: str) -> None:
    for name in dict.fromkeys(name for name, _, _ in points):
        curve = sorted((at, y) for label, at, y in points if label == name and y is not None)
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", ms=3, label=name)
    axes.set_xlabel(x)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=6)


def facts_of(device: torch.device) -> dict[str, Any]:
    """The facts without which a time means nothing."""
    described: dict[str, Any] = {"type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    else:
        described["name"] = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": described,
        "clock": "CUDA events" if device.type == "cuda" else "wall clock, says nothing of a GPU",
        "versions": {
            "akl_triton": akl_triton.__version__,
            "revision": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        },
        "dtype": str(DTYPE).removeprefix("torch."),
        "logits": f"teacher = {DECAY} * Exp(1), student = teacher + N(0, 1): {make_pair.__name__}",
        "hidden_states": f"hidden N(0, 1), weight N(0, 9 / H): {make_hidden_states.__name__}",
    }


SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power and temperature now; None where nvidia-smi does not report them."""
    answer = _output(
        "nvidia-smi", "--id=0", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"
    )
    if answer is None:
        return None
    return dict(zip(SMI_FIELDS, (value.strip() for value in answer.split(",")), strict=False))


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


# ---------------------------------------------------------------- the question


def collect(
    output: Path = ROOT / "bench" / "results" / "gpu", seconds: float = 210.0, tiny: bool = False
) -> dict[str, Any]:
    """All cases for which the time is enough; with `tiny`, cases of a few tokens, on the CPU. Every
    result is written to the folder `output` at once.
    """
    device, cases, absent = planned(tiny)
    # `timeout` ends a run that hangs: the results until then are drawn all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    output.mkdir(parents=True, exist_ok=True)
    copy_bytes = TINY_COPY_BYTES if tiny else COPY_BYTES
    return measure_all(cases, absent, device, output, seconds=seconds, copy_bytes=copy_bytes)


def planned(tiny: bool) -> tuple[torch.device, list[Case], dict[str, str]]:
    """(the device, its cases, the most important first; what cannot be measured, and why)."""
    if not tiny and not torch.cuda.is_available():
        raise Unanswerable("PyTorch sees no GPU here; --tiny runs on a CPU")
    device = torch.device("cpu" if tiny else "cuda")
    obstacle = triton_obstacle(device.type)
    if obstacle and not tiny:
        raise Unanswerable(f"our kernels cannot run: {obstacle}")
    cases, absent = plan(device, "torch" if obstacle else "triton", TINY_SIZES if tiny else SIZES)
    return device, cases, absent


def compile_all(tiny: bool = False) -> None:
    """Fill Triton's cache for a later run, by every case of ours on two rows: N is no part of what
    is compiled. A process compiles on one core, so there are as many as there are launches and
    cores.
    """
    launches = dict.fromkeys(case.launch for case in planned(tiny)[1] if case.package == OURS)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(functools.partial(_compile, tiny), launches))


def _compile(tiny: bool, launch: Launch | None) -> None:
    device, cases, _ = planned(tiny)
    for case in cases:
        if case.package == OURS and case.launch == launch and case.rows == cases[0].rows:
            phase = PHASES[case.phase]
            with launched_with(launch, case.phase):
                phase.run(case.loss, phase.prepare(case.loss, *case.make_inputs(2, device, 0)))
    synchronize(device)


def measure_all(
    cases: Sequence[Case],
    absent: dict[str, str],
    device: torch.device,
    folder: Path,
    *,
    seconds: float,
    copy_bytes: int,
) -> dict[str, Any]:
    """The data that is also left in the folder: facts, results, and the cases that were left
    out."""
    deadline = time.monotonic() + seconds
    facts = facts_of(device)
    bench = Bench(device, copy_bytes)
    facts |= {"copy_gb_per_s": bench.copy_gb_per_s, "gpu_before": gpu_state()}
    report = Report(folder, facts, cases, absent)
    print(f"{facts['device']['name']}: a copy moves {bench.copy_gb_per_s:,.0f} GB/s", flush=True)
    try:
        for case in cases:
            if time.monotonic() > deadline:
                break
            result = bench.measure(case)
            report.add(case, result)
            print(line(case, result), flush=True)
    except SystemExit:
        print(markdown(report.data), flush=True)
        raise
    finally:
        facts["gpu_after"] = gpu_state()
        report.finish()
    return report.data


def line(case: Case, result: Result) -> str:
    start = f"{result.device}: {case.label}"
    if result.median is None:
        return f"{start}: {result.status}"
    figures = [f"{result.median:.3f} ms"]
    if result.gb_per_s is not None and result.of_copy is not None:
        figures += [f"{result.gb_per_s:,.0f} GB/s", f"{result.of_copy:.2f} of a copy"]
    if result.peak_mib is not None:
        figures.append(f"{result.peak_mib:,.1f} MiB")
    if result.model_mib is not None:
        figures.append(f"the model without gradients {result.model_mib:,.1f} MiB")
    return f"{start}: {', '.join(figures)}"


def best_launches(data: dict[str, Any]) -> list[str]:
    """The fastest of the candidates for every V and phase, and the table's launch."""
    timed: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for result in data["results"]:
        if result["BLOCK"] is not None and result["median"] is not None:
            timed.setdefault((result["vocabulary"], result["phase"]), []).append(result)
    lines = []
    for (vocabulary, phase), results in timed.items():
        best = min(results, key=lambda result: float(result["median"]))
        fastest = Launch(best["BLOCK"], best["threads"], best["registers"])
        lines.append(
            f"V = {vocabulary:,}, {phase}: {fastest} ({best['median']:.3f} ms); "
            f"the table has {launch_for(DECIDES[phase], vocabulary)}"
        )
    return lines


def markdown(data: dict[str, Any]) -> str:
    """The fastest launches, and the cases that were left out; each result was printed as it
    came."""
    return "\n".join(
        [
            *best_launches(data),
            *(f"left out: {entry['case']}: {entry['reason']}" for entry in data["left_out"]),
            f"{len(data['results'])} results of {data['device']['name']}",
        ]
    )


def failures(data: dict[str, Any]) -> list[str]:
    """Cases of ours for which there was time and that have none; for a peer, that is a result."""
    ours = [result for result in data["results"] if result["package"] == OURS]
    if not ours:
        return ["nothing of ours was measured"]
    return [
        f"{result['name']}, {result['phase']}, V = {result['vocabulary']:,}: {result['status']}"
        for result in ours
        if result["status"] != "ok"
    ]
