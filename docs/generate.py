"""Write docs/options.md and docs/command_line.md from where options and commands are defined.

python docs/generate.py
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import akl_triton
from akl_triton.cli import REQUIRES, build_parser
from akl_triton.divergences import FAMILY, Divergence
from akl_triton.options import LINEAR_LOSS_OPTIONS, LOSS_OPTIONS, RETURN_STATS

OPTIONS = Path(__file__).with_name("options.md")
COMMAND_LINE = Path(__file__).with_name("command_line.md")
HEAD = """<!-- Written by `python docs/generate.py`. -->

# Options and divergences

`distillation_loss` takes logits, `linear_distillation_loss` hidden states and the weights of both
lm_heads. Both have these options; the modules `DistillationLoss` and `LinearDistillationLoss` take
them when they are made, except those marked *call*, which belong to a call.
"""
COMMANDS = """<!-- Written by `python docs/generate.py`. -->

# Command line

`--help` after any command lists its options. The exit code is 0, or 1 if a check has failed, or 2
if the command could not be run, with a message that says why."""
# What a command is for, beyond its help.
PURPOSES = {
    "env": "Paste its output into the report of a bug. Next to each device stands the reason "
    "for the choice of its backend.",
    "check": "Run it after an installation. It covers every divergence, many vocabulary sizes, "
    "dtypes and temperatures, and special values; the rule is that of [Numerics](numerics.md).",
    "bench": "It runs adaptive KL forward and backward on random logits, whose probabilities "
    "fall with the rank as those of text do. [Measuring](measuring.md) says what a time is worth.",
    "inspect": "Run it on your own two models: [A student and its teacher](inspect.md) says what "
    "comes out.",
    "teach": "A student then trains from the folder without the teacher: "
    "[Teachers on disk](offline.md). A command that was interrupted goes on where it was when it "
    "is given again. It prints the bytes of a token.",
    "demo": "The teacher is SmolLM2-135M, the student 12 of its 30 layers. It is trained with "
    "three losses, from the same start on the same batches. [Start](start.md) shows the curves.",
}


def main() -> None:
    OPTIONS.write_text(options_document())
    COMMAND_LINE.write_text(command_line_document())


def command_line_document() -> str:
    (commands,) = (x for x in build_parser()._actions if isinstance(x, argparse._SubParsersAction))
    summaries = {x.dest: x.help for x in commands._choices_actions}
    sections = []
    for name, command in commands.choices.items():
        rows = [
            (f"`{_usage(action)}`", action.help or f"default: {action.default}")
            for action in command._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        extra, _ = REQUIRES[name]
        needs = f" The command needs the extra `{extra}`." if extra else ""
        sections.append(
            f"\n## akl-triton {name}\n\n{_sentence(summaries[name])}. {PURPOSES[name]}{needs}\n\n"
            + _table(("option", "meaning"), rows)
        )
    return "\n".join((COMMANDS, *sections, ""))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _usage(action: argparse.Action) -> str:
    """An option as it is written, with its value; or an argument."""
    if not action.option_strings:
        return f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar)
    value = "" if action.nargs == 0 else f" {action.metavar or (action.dest.upper())}"
    if action.choices is not None:
        value = " " + " \\| ".join(action.choices)
    return f"{action.option_strings[-1]}{value}{' ...' if action.nargs == '+' else ''}"


def options_document() -> str:
    options = {"return_stats": RETURN_STATS, **LOSS_OPTIONS, **LINEAR_LOSS_OPTIONS}
    rows = []
    for name, option in options.items():
        only = ""
        if name != "return_stats" and not (name in LOSS_OPTIONS and name in LINEAR_LOSS_OPTIONS):
            only = f" (only `{'' if name in LOSS_OPTIONS else 'linear_'}distillation_loss`)"
        when = " *call*" if option.check is None else ""
        rows.append((f"`{name}`", f"`{_shown(option.default)}`", f"{option.text}{only}{when}"))
    family = [
        (f"`{_with_fields(kind)}`", _short_names(kind), f"`{_formula(kind)}`")
        for kind in FAMILY.values()
    ]
    return "\n".join(
        (
            HEAD,
            _table(("option", "default", "meaning"), rows),
            "\n## Divergences\n",
            "`divergence=` is one of these, or its name in small letters, such as "
            f'`"{next(iter(FAMILY))}"`.\nA short name takes the fields of its divergence as '
            "options.\n",
            _table(("divergence", "short names", "loss of a token"), family),
            "",
        )
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _with_fields(kind: type[Divergence]) -> str:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return f"{kind.__name__}({', '.join(f'{f.name}={_shown(f.default)}' for f in fields)})"


def _short_names(kind: type[Divergence]) -> str:
    names = (kind.name, f"linear_{kind.name}")
    return ", ".join(f"`{name}`" for name in names if hasattr(akl_triton, name))


def _formula(kind: type[Divergence]) -> str:
    """The line of the docstring's Math that says what the loss is."""
    found = re.search(r"(loss = [^`\n]*)", inspect.getdoc(kind) or "")
    assert found, f"{kind.__name__}: its docstring says no `loss = ...`"
    return found[1].rstrip().replace("|", "\\|")


if __name__ == "__main__":
    main()
