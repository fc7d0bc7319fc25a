"""The facts of `inspect` as tables: rows for the page, and the tables of the terminal."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from akl_triton.cli import loss_memory
from akl_triton.cli.bench import MIB
from akl_triton.cli.token_report import COLUMNS, Candidate, TokenReport, visible
from akl_triton.integrations import HeadInfo

WORST = 12  # tokens in the table
# The figures in it, under names that fit 80 columns.
WORST_COLUMNS = {
    "loss": "AKL",
    "forward_kl": "FKL",
    "reverse_kl": "RKL",
    "forward_weight": "w",
    "head_size": "head",
    "head_mass": "mass",
    "gap": "gap",
}
WAYS = {
    "logits": "of logits",
    "in place": "of logits, in place",
    "fused": "of hidden states, in place of the lm_head",
}
PURPOSES = {
    "trainer": "With the Trainer of transformers",
    "loop": "In a loop of your own",
    "linear": "From hidden states, in one process and with no adapter on the lm_head",
    "logits": "From logits, as no loss can take the place of a refused lm_head",
}


def show(facts: dict[str, Any], report: TokenReport | None, out: Console) -> None:
    out.print(models_table(facts))
    for line in remarks(facts):
        out.print(line, highlight=False)
    if facts["memory"] is not None:
        out.print(memory_table(facts["memory"]))
    for purpose, code in facts["lines"].items():
        out.print(f"\n[bold]{PURPOSES[purpose]}[/]:")
        out.print(Syntax(code.rstrip(), "python", background_color="default", word_wrap=True))
    if report is not None:
        out.print(summary_table(facts["text"]))
        out.print(worst_table(report))
        out.print(f"{' and '.join(facts['files'])} written", highlight=False, soft_wrap=True)


def model_rows(facts: dict[str, Any]) -> list[list[str]]:
    """(what, the student's, the teacher's)."""
    sides = [facts[role] for role in ("student", "teacher")]
    names = ["source", "model", "parameters", "layers", "context"]
    if any(side["head"] is None for side in sides):
        names.append("refused")
    rows = [[name, *(_cell(side[name]) for side in sides)] for name in names]
    for field in fields(HeadInfo):
        values = [side["head"] and side["head"][field.name] for side in sides]
        label = "lm_head" if field.name == "name" else field.name.replace("_", " ")
        rows.append([label, *map(_cell, values)])
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.7g}"
    return "\u2013" if value is None else str(value)


def memory_rows(memory: dict[str, Any]) -> list[list[str]]:
    """(the way, MiB by formula, and MiB measured where they were)."""
    columns = [x for x in (memory["formula"], memory["measured"]) if x is not None]
    return [
        [WAYS[way], *(f"{peaks[way] / MIB:,.0f}" for peaks in columns)] for way in loss_memory.WAYS
    ]


def models_table(facts: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for role in ("student", "teacher"):
        table.add_column(role, overflow="fold")
    for row in model_rows(facts):
        table.add_row(*map(escape, row))
    return table


def remarks(facts: dict[str, Any]) -> list[str]:
    """A line each on tokens, backend and versions."""
    vocabularies, backend = facts["vocabularies"], facts["backend"]
    if vocabularies["message"] is None:
        tokens = "[green]the same token for every id[/]"
    else:
        colour = "yellow" if vocabularies["agree"] else "red"
        tokens = f"[{colour}]{escape(vocabularies['message'])}[/]"
    known = {True: "tested", False: "[yellow]not tested[/]", None: "-"}
    libraries = [
        f"{x['name']} {x['installed'] or 'not installed'} ({known[x['known']]})"
        for x in facts["versions"]
    ]
    return [
        f"[bold]tokens[/]    {tokens}",
        f"[bold]backend[/]   {backend['backend']} on {backend['type']}: {backend['why']}",
        f"[bold]versions[/]  {', '.join(libraries)}",
    ]


def memory_table(memory: dict[str, Any]) -> Table:
    head = "trained" if memory["trains_head"] else "frozen"
    table = Table(
        box=SIMPLE_HEAD,
        title=f"Peak memory of the loss and its gradients, {memory['tokens']:,} tokens, "
        f"lm_head {head}",
    )
    table.add_column("the loss")
    table.add_column("by formula, MiB", justify="right")
    if memory["measured"] is not None:
        table.add_column("measured, MiB", justify="right")
    for row in memory_rows(memory):
        table.add_row(*row)
    return table


def summary_table(text: dict[str, Any]) -> Table:
    cut = f" of {text['total']:,}" if text["total"] > text["tokens"] else ""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{text['tokens']:,}{cut} tokens of {escape(text['source'])}",
        caption=f"share of the gap in the head {text['head_share']:.3f}, "
        f"same top token {text['agreement']:.1%}; nats",
    )
    table.add_column("")
    for name in next(iter(text["summary"].values())):
        table.add_column(name, justify="right")
    for name, values in text["summary"].items():
        table.add_row(COLUMNS[name], *(f"{x:,.3f}" for x in values.values()))
    return table


def worst_table(report: TokenReport) -> Table:
    table = Table(box=SIMPLE_HEAD, title="The tokens that differ most", padding=(0, 1, 0, 0))
    for column in ("token", "teacher's", "student's"):
        table.add_column(column, overflow="fold", min_width=10)
    for name in WORST_COLUMNS.values():
        table.add_column(name, justify="right")
    for token in report.worst[:WORST]:
        figures = token.figures
        assert figures is not None
        values = [getattr(figures, name) for name in WORST_COLUMNS]
        table.add_row(
            Text(visible(token.text)),
            *(Text(_top(figures.candidates, side)) for side in ("teacher", "student")),
            *(f"{x:,}" if isinstance(x, int) else f"{x:.2f}" for x in values),
        )
    return table


def _top(candidates: list[Candidate], side: str) -> str:
    """The most probable token of a side, and its probability there."""
    of_side = attrgetter(side)
    top = max(candidates, key=of_side)
    return f"{visible(top.token)} {of_side(top):.0%}"
