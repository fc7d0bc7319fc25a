"""Ask a question about the cost of the losses, or write the report of the stored answers.

python -m bench                     lists the questions
python -m bench QUESTION            asks, and prints the answer
python -m bench QUESTION --save     also stores it, and its picture, in bench/results
python -m bench QUESTION --stored   prints the stored answer, and asks nothing
python -m bench all --save          asks whatever is in the report, and stores it
python -m bench report              writes RESULTS.md and the figures in README.md from what is
                                    stored
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from bench.questions import QUESTIONS, Unanswerable, question
from bench.store import RESULTS, load, store

COMMANDS = {
    "all": "Every question of the report, one after the other.",
    "report": "RESULTS.md and the figures in README.md, from what is stored.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", metavar="QUESTION")
    for name, text in (QUESTIONS | COMMANDS).items():
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.name is None:
        parser.print_help()
        return 0
    if chosen.name == "report":
        _parser("report", COMMANDS["report"]).parse_args(rest)
        return _write_report()
    if chosen.name == "all":
        return _ask_all(rest)
    return _ask(chosen.name, rest)


def _parser(name: str, text: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _write_report() -> int:
    from bench.report import document, readme

    document.write()
    readme.write()
    print(f"{document.DOCUMENT} and {readme.README} written")
    return 0


def _ask_all(rest: Sequence[str]) -> int:
    from bench.report import document

    parser = _parser("all", COMMANDS["all"])
    parser.add_argument("--save", action="store_true", help="store the answers in bench/results")
    options = parser.parse_args(rest)
    codes = [_ask(name, ["--save"] if options.save else []) for name in document.SECTIONS]
    return max(codes)


def _ask(name: str, rest: Sequence[str]) -> int:
    module = question(name)
    parser = _parser(name, module.__doc__)
    parser.add_argument("--save", action="store_true", help="store the answer in bench/results")
    parser.add_argument("--stored", action="store_true", help="show what is stored, ask nothing")
    parser.add_argument("--json", action="store_true", help="print all figures, not the tables")
    if hasattr(module, "plot"):
        parser.add_argument("--plot", type=Path, help="draw the answer into this file")
    defaults = _add_options(parser, module.collect)
    options = vars(parser.parse_args(rest))
    of_question = {option: options[option] for option in defaults}
    is_default = of_question == defaults
    if options["stored"] and (options["save"] or not is_default):
        parser.error("--stored shows what was asked without options: it takes none but --json")
    if options["save"] and not is_default:
        parser.error("--save stores what the defaults give, so that the command says it all")
    try:
        data = load(name)["data"] if options["stored"] else module.collect(**of_question)
    except Unanswerable as obstacle:
        parser.error(str(obstacle))
    data = json.loads(json.dumps(data))  # as it is stored
    if options["save"]:
        store(name, data)
        if hasattr(module, "plot"):
            module.plot(data, RESULTS / f"{name}.png")
    if options.get("plot"):
        module.plot(data, options["plot"])
    print(json.dumps(data, indent=1) if options["json"] else module.markdown(data))
    failures: list[str] = module.failures(data) if hasattr(module, "failures") else []
    print("".join(f"\nnot as it must be: {failure}" for failure in failures), end="")
    return int(bool(failures))


def _add_options(
    parser: argparse.ArgumentParser, collect: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Add an option for every parameter, and return their defaults."""
    parameters = inspect.signature(collect, eval_str=True).parameters.values()
    for parameter in parameters:
        flag = f"--{parameter.name.replace('_', '-')}"
        kind, default = parameter.annotation, parameter.default
        text = f"default: {' '.join(map(str, default)) if _is_list(kind) else default}"
        if kind is bool:
            parser.add_argument(flag, action="store_true")
        elif _is_list(kind):
            (element,) = get_args(kind)
            parser.add_argument(flag, nargs="+", type=element, default=default, help=text)
        else:
            parser.add_argument(flag, type=kind, default=default, help=text)
    return {parameter.name: parameter.default for parameter in parameters}


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is Sequence


if __name__ == "__main__":
    raise SystemExit(main())
