"""The text of a token report as a picture and as a page, each token in the colour of its loss.

The hue says where student and teacher differ: in the tail of the teacher's distribution, in its
head, or in both. The shade says by how much: the loss of the token. A token for which both sides
have the same top token is underlined.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from akl_triton.cli.inspect_tables import PURPOSES, memory_rows, model_rows
from akl_triton.cli.token_report import COLUMNS, Token, TokenReport, visible

# Nats from which a token is coloured, and has the next shade.
SHADES = (0.25, 1.0, 2.5, 5.0, 8.0)
# w from which a token has the next hue. What the student lacks in the head it has elsewhere, mostly
# in the tail, so that w is seldom above 1/2.
BANDS = (0.25, 0.4)
HUES = ("tail", "both", "head")
# Five shades of each hue, at the hues 245, 330 and 58 of OKLCH; text on each has the contrast of
# WCAG AA. Blue and orange stay apart for the colour-blind.
PALETTES: dict[str, dict[str, tuple[str, ...]]] = {
    "light": {
        "tail": ("#e4f2fe", "#c6e4fe", "#9fd2ff", "#73bdfa", "#48a6ee"),
        "both": ("#f6edf5", "#ecd9ea", "#e1c0dd", "#d1a6cc", "#bd8bb8"),
        "head": ("#fdede1", "#fbd8be", "#f9be92", "#efa264", "#e08533"),
    },
    "dark": {
        "tail": ("#1b2731", "#1d374c", "#19496d", "#135b8d", "#096ead"),
        "both": ("#2a2329", "#3d2e3c", "#543b52", "#6b4968", "#83587f"),
        "head": ("#2f2218", "#482d17", "#66380e", "#834400", "#9c5405"),
    },
}
INK = {"light": "#17181c", "dark": "#eef0f4"}
MUTED = {"light": "#5b6070", "dark": "#a3a9b8"}

COLUMNS_OF_PICTURE, LINES_OF_PICTURE = 80, 48
DPI = 150
# Inches. A character is a whole number of pixels wide, as the renderer would make it one.
ADVANCE, LINE_HEIGHT, MARGIN = 12 / DPI, 34 / DPI, 0.35
FONT_SIZE = 72 * ADVANCE / 0.60205  # points; DejaVu Sans Mono has that advance for each of its em


def shade_of(loss: float) -> int:
    """0 for a token that is not coloured, 1 to 5 for the shades."""
    return bisect_right(SHADES, loss)


def hue_of(forward_weight: float) -> str:
    return HUES[bisect_right(BANDS, forward_weight)]


def labels_of_shades() -> list[str]:
    between = [f"{low:g} \u2013 {high:g}" for low, high in pairwise(SHADES)]
    return [*between, f"\u2265 {SHADES[-1]:g}"]


def labels_of_hues() -> dict[str, str]:
    low, high = BANDS
    bands = (f"w < {low:g}", f"w {low:g} \u2013 {high:g}", f"w \u2265 {high:g}")
    return dict(zip(HUES, bands, strict=True))


def shown(text: str) -> str:
    """The text of a token where it stands in the text: a line break has a sign to be coloured."""
    return text.replace("\n", "\u21b5\n")


# ---- the picture


def draw(report: TokenReport, names: tuple[str, str], path: PathLike[str]) -> None:
    """The first lines of the text, under a legend."""
    lines = list(_lines(report.tokens))
    cut = lines[:LINES_OF_PICTURE]
    text_top, width = 1.85, COLUMNS_OF_PICTURE * ADVANCE
    height = text_top + (len(cut) + (len(cut) < len(lines))) * LINE_HEIGHT
    figure = Figure(figsize=(width + 2 * MARGIN, height + 2 * MARGIN), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-MARGIN, width + MARGIN)
    axes.set_ylim(height + MARGIN, -MARGIN)  # downwards, in inches

    student, teacher = names
    small: dict[str, Any] = {"fontsize": 9, "color": MUTED["light"], "va": "center"}
    axes.text(
        0, 0.1, f"{student}, taught by {teacher}", fontsize=14, weight="bold", va="center"
    ).set_color(INK["light"])
    numbers = (
        f"{len(report.tokens):,} tokens",
        f"adaptive KL {report.summary['loss']['mean']:.2f} nats",
        f"share of the gap in the head {report.head_share:.2f}",
        f"same top token {report.agreement:.0%}",
    )
    axes.text(0, 0.4, "    ".join(numbers), **small)
    _draw_legend(axes, 0.62, small)
    for row, line in enumerate(cut):
        y = text_top + row * LINE_HEIGHT
        for column, token, text in line:
            _draw_token(axes, column * ADVANCE, y, token, text)
        axes.text(
            0,
            y + 0.72 * LINE_HEIGHT,
            "".join(text for *_, text in line),
            family="DejaVu Sans Mono",
            fontsize=FONT_SIZE,
            color=INK["light"],
            parse_math=False,
        )
    if rest := len(lines) - len(cut):
        axes.text(0, height - 0.5 * LINE_HEIGHT, f"{rest} more lines are on the page", **small)
    figure.savefig(path, dpi=DPI)


def _lines(tokens: list[Token]) -> Iterator[list[tuple[int, Token, str]]]:
    """The text by the line, each a list of (column, token, its characters there)."""
    line: list[tuple[int, Token, str]] = []
    column = 0
    for token in tokens:
        for part in shown(token.text).expandtabs(4).splitlines(keepends=True):
            characters = part.rstrip("\r\n")
            while characters:
                if column == COLUMNS_OF_PICTURE:
                    yield line
                    line, column = [], 0
                taken = characters[: COLUMNS_OF_PICTURE - column]
                line.append((column, token, taken))
                column += len(taken)
                characters = characters[len(taken) :]
            if part.endswith("\n"):
                yield line
                line, column = [], 0
    if line:
        yield line


def _draw_token(axes: Any, x: float, y: float, token: Token, text: str) -> None:
    figures = token.figures
    if figures is None:
        return
    between = 2 / DPI
    width = len(text) * ADVANCE - between
    if shade := shade_of(figures.loss):
        colour = PALETTES["light"][hue_of(figures.forward_weight)][shade - 1]
        _draw_box(axes, x, y + between, width, LINE_HEIGHT - 2 * between, colour)
    if figures.agreement:
        line = 3 / DPI
        _draw_box(axes, x, y + LINE_HEIGHT - between - line, width, line, INK["light"])


def _draw_box(axes: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0))


def _draw_legend(axes: Any, top: float, small: dict[str, Any]) -> None:
    left, cell, height, between = 1.6, 0.92, 0.19, 0.03
    middle = top + height / 2
    axes.text(0, middle, "adaptive KL, nats", **small)
    for i, label in enumerate(labels_of_shades()):
        axes.text(left + i * cell + (cell - between) / 2, middle, label, ha="center", **small)
    for row, (hue, band) in enumerate(reversed(labels_of_hues().items()), start=1):
        y = top + row * (height + between)
        axes.text(0, y + height / 2, f"{hue}, {band}", **small)
        for i, colour in enumerate(PALETTES["light"][hue]):
            _draw_box(axes, left + i * cell, y, cell - between, height, colour)
    axes.text(
        0,
        middle + 4 * (height + between),
        "w: share of the gap in the head of the teacher's distribution    "
        "underlined: the same top token",
        **small,
    )


# ---- the page


def write_page(
    report: TokenReport, names: tuple[str, str], facts: dict[str, Any], path: Path
) -> None:
    """A page that needs no other file. `facts` are those of `inspect`, as its JSON has them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("token_page.html.jinja")
    path.write_text(
        template.render(
            facts=facts,
            names=names,
            models=model_rows(facts),
            memory=None if facts["memory"] is None else memory_rows(facts["memory"]),
            lines=[(PURPOSES[name], code.rstrip()) for name, code in facts["lines"].items()],
            report=report,
            spans=[(_class(token), token.index, shown(token.text)) for token in report.tokens],
            figures=[_row(token) for token in report.tokens],
            worst=report.worst[:20],
            columns=COLUMNS,
            palettes=PALETTES,
            ink=INK,
            muted=MUTED,
            shades=labels_of_shades(),
            hues=dict(reversed(labels_of_hues().items())),
            first_shade=SHADES[0],
            visible=visible,
            colour_class=_class,
        ),
        "utf-8",
    )


def _class(token: Token) -> str:
    """The classes of a token's colour, and of its underline."""
    if token.figures is None:
        return "first"
    shade = shade_of(token.figures.loss)
    colour = f"{hue_of(token.figures.forward_weight)}-{shade}" if shade else "near"
    return f"{colour} same" if token.figures.agreement else colour


def _row(token: Token) -> dict[str, Any]:
    """What the page's script shows of a token."""
    row: dict[str, Any] = {"token": visible(token.text), "class": _class(token)}
    if token.figures is not None:
        figures = asdict(token.figures)
        row["candidates"] = [
            [visible(c["token"]), round(c["teacher"], 5), round(c["student"], 5)]
            for c in figures.pop("candidates")
        ]
        row["figures"] = {
            name: round(x, 5) if isinstance(x, float) else x for name, x in figures.items()
        }
    return row
