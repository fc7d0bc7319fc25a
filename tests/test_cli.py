"""The command line: exit codes, the output, and that `check` notices errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import akl_triton
from akl_triton import forward_kl

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from akl_triton.cli import bench, check, main

PNG = b"\x89PNG\r\n\x1a\n"


def akl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    command = Path(sys.executable).with_name("akl-triton")
    if not command.exists():
        pytest.skip("akl-triton is not installed")
    return subprocess.run(
        [str(command), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_env_prints_json() -> None:
    result = akl("env", "--json")
    facts = json.loads(result.stdout)
    assert result.returncode == 0
    assert facts["akl_triton"] == akl_triton.__version__
    assert facts["torch"] == torch.__version__
    cpu = facts["devices"][0]
    assert cpu["type"] == "cpu" and cpu["backend"] == "torch" and cpu["why"]


def test_env_sees_the_interpreter() -> None:
    facts = json.loads(akl("env", "--json", TRITON_INTERPRET="1").stdout)
    assert facts["devices"][0]["backend"] == "triton"


def test_env_prints_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == [
        "akl_triton",
        "torch",
        "triton",
        "python",
        "platform",
    ]


def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    assert f"{len(check.CASES)} of {len(check.CASES)} cases agree" in capsys.readouterr().out


def test_check_passes_in_the_interpreter() -> None:
    result = akl("check", "--device", "cpu", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "triton backend on cpu" in result.stdout


Corrupt = Callable[[Any, Tensor, dict[str, Any]], Any]


def _wrong_loss(output: Any, student: Tensor, options: dict[str, Any]) -> Any:
    return (output[0] + 1e-3, output[1]) if isinstance(output, tuple) else output


def _wrong_gradient(output: Any, student: Tensor, options: dict[str, Any]) -> Any:
    if not isinstance(output, tuple):
        return output
    return output[0] + 1e-3 * (student - student.detach()).sum(-1).float(), output[1]


def _wrong_gradient_in_place(output: Any, student: Tensor, options: dict[str, Any]) -> Any:
    return 1.01 * output if options.get("inplace") else output


def _wrong_head(output: Any, student: Tensor, options: dict[str, Any]) -> Any:
    if not isinstance(output, tuple):
        return output
    return output[0], output[1]._replace(head_size=output[1].head_size + 1)


def _nan(output: Any, student: Tensor, options: dict[str, Any]) -> Any:
    return (output[0] * torch.nan, output[1]) if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    "corrupt", [_wrong_loss, _wrong_gradient, _wrong_gradient_in_place, _wrong_head, _nan]
)
def test_check_fails_on_a_wrong_result(
    corrupt: Corrupt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Any = akl_triton.distillation_loss

    def wrong(student: Tensor, *inputs: Tensor, **options: Any) -> Any:
        output = right(student, *inputs, **options)
        if isinstance(options["divergence"], akl_triton.AdaptiveKL):
            return corrupt(output, student, options)
        return output

    monkeypatch.setattr(akl_triton, "distillation_loss", wrong)
    monkeypatch.setattr(check, "CASES", [check.Case("small", 1024), check.CASES[-1]])
    assert main(["check", "--device", "cpu"]) == 1
    assert "1 of 2 cases agree" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 70])
def test_check_shows_every_verdict_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is printed in a narrow terminal as well, whatever the names of the cases are."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(akl_triton, "distillation_loss", _always_nan)
    longest = max(check.CASES, key=lambda case: len(case.name))
    monkeypatch.setattr(check, "CASES", [check.Case(f"{longest.name}, longer", 1024), longest])
    assert main(["check", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("FAILED") == 2
    assert "…" not in shown


def _always_nan(student: Tensor, *inputs: Tensor, **options: Any) -> Any:
    loss, stats = forward_kl(student, inputs[0], reduction="none", return_stats=True)
    loss = loss * torch.nan
    return (loss, stats) if options.get("return_stats") else loss


def _gradient_of_a_sum(hidden: Tensor, weight: Tensor, reduction: str) -> Any:
    return 3e-2 * weight[0, 0] if reduction == "sum" else 0.0


def _gradient_per_token(hidden: Tensor, weight: Tensor, reduction: str) -> Any:
    return 1e-3 * weight[0, 0] if reduction == "none" else 0.0


def _hidden_gradient(hidden: Tensor, weight: Tensor, reduction: str) -> Any:
    return 2e-1 * (hidden.diagonal() - 1) if reduction == "none" else 0.0


@pytest.mark.parametrize("wrong_term", [_gradient_of_a_sum, _gradient_per_token, _hidden_gradient])
def test_check_fails_on_a_wrong_fused_gradient(
    wrong_term: Callable[[Tensor, Tensor, str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`check` notices an error in either pass, of either tensor, in either dtype."""
    right: Any = akl_triton.linear_distillation_loss

    def wrong(hidden: Tensor, weight: Tensor, *inputs: Tensor, **options: Any) -> Any:
        output = right(hidden, weight, *inputs, **options)
        term = wrong_term(hidden, weight, options["reduction"])
        if isinstance(term, Tensor):
            term = term - term.detach()
        return (output[0] + term, output[1]) if isinstance(output, tuple) else output + term

    monkeypatch.setattr(akl_triton, "linear_distillation_loss", wrong)
    cases = [case for case in check.CASES if case.linear]
    monkeypatch.setattr(check, "CASES", [*cases, check.CASES[-1]])
    assert main(["check", "--device", "cpu"]) == 1
    assert f"1 of {len(cases) + 1} cases agree" in capsys.readouterr().out


def test_check_fails_on_a_loss_for_ignored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = akl_triton.distillation_loss

    def wrong(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Any:
        output = right(student, teacher, labels, **options)
        if isinstance(output, tuple):
            return output[0] + 1e-30 * (labels == check.IGNORED), output[1]
        return output

    monkeypatch.setattr(akl_triton, "distillation_loss", wrong)
    cases = [case for case in check.CASES if case.name == "all rows ignored"]
    monkeypatch.setattr(check, "CASES", cases)
    assert main(["check", "--device", "cpu"]) == 1


def test_bench_writes_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    arguments = ["--device", "cpu", "--rows", "4", "--vocab", "1500", "70", "--repeats", "1"]
    assert main(["bench", *arguments, "--output", str(folder)]) == 0
    assert (folder / "akl_bench.png").read_bytes().startswith(PNG)
    out = capsys.readouterr().out
    assert out.index(" 70 ") < out.index(" 1,500 ")


def test_peak_memory_counts_what_is_held_at_a_time() -> None:
    size = 2**20

    def step() -> None:
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(2 * size, dtype=torch.uint8)
        del first, second
        torch.empty(size, dtype=torch.uint8)

    assert bench.peak_memory(step, torch.device("cpu")) == 3 * size


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["env", "--yaml"],
        ["check", "--backend", "cuda"],
        ["bench", "--vocab", "0"],
        ["bench", "--rows", "many"],
        ["bench", "--dtype", "float64"],
        ["inspect", "--max-tokens", "1"],
        ["inspect", "--tokens", "0"],
        ["inspect", "student", "teacher", "another"],
        ["demo", "--steps", "0"],
        ["demo", "--seed", "-1"],
        ["demo", "--dtype", "float16"],
    ],
)
def test_unknown_options_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: akl-triton" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing to refuse")
@pytest.mark.parametrize("command", ["check", "bench", "inspect", "demo"])
def test_a_missing_device_exits_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        f"akl-triton {command}: --device cuda: PyTorch sees no such device here\n"
    )


def test_a_backend_that_cannot_run_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cpu", "--backend", "triton"]) == 2
    assert "backend: expected one that can run here" in capsys.readouterr().err


def test_an_output_that_is_a_file_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["bench", "--device", "cpu", "--output", str(file)]) == 2
    assert f"--output {file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "absent", "extra"),
    [
        ("check", "rich", "cli"),
        ("bench", "matplotlib", "cli"),
        ("inspect", "transformers", "demo"),
        ("demo", "gguf", "demo"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(
    command: str,
    absent: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == absent else find_spec(name, *rest),
    )
    assert main([command]) == 2
    assert capsys.readouterr().err == (
        f'akl-triton {command} needs {absent}: pip install "akl-triton[{extra}]"\n'
    )
