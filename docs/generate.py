"""Write docs/options.md, the tables of options and divergences, from where they are defined.

python docs/generate.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import akl_triton
from akl_triton.divergences import FAMILY, Divergence
from akl_triton.options import LINEAR_LOSS_OPTIONS, LOSS_OPTIONS, RETURN_STATS

OPTIONS = Path(__file__).with_name("options.md")
HEAD = """<!-- Written by `python docs/generate.py`. -->

# Options and divergences

`distillation_loss` takes logits, `linear_distillation_loss` hidden states and the weights of both
lm_heads. Both have these options; the modules `DistillationLoss` and `LinearDistillationLoss` take
them when they are made, except those marked *call*, which belong to a call.
"""


def main() -> None:
    OPTIONS.write_text(document())


def document() -> str:
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
