"""Draw the pictures of docs/loss.md: the head and the tail of one token, and the weights of many.

python docs/pictures.py     (needs the extra "demo")

The token is that of `python -m bench overview`. The weights are those of SmolLM2-135M and the
student that `akl-triton demo` starts from, on texts that come with Python.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from akl_triton import adaptive_kl
from akl_triton.cli.smollm2 import load_teacher, shallow_copy
from bench.inputs.real_logits import real_logits
from bench.questions.overview import HEAD, INK, TAIL
from bench.store import load

IMAGES = Path(__file__).with_name("images")
TEXT = (
    "Exceptions are a means of breaking out of the normal flow of control of a code block in "
    "order to handle errors or other exceptional conditions."
)
MU = 0.5
matplotlib.rcParams.update({"axes.titlesize": 11, "axes.titlelocation": "left"})


def main() -> None:
    head_and_tail(load("overview")["data"]["token"])
    weights()


def head_and_tail(token: dict[str, Any]) -> None:
    """The teacher's sorted mass, which mu cuts, and the gap on either side of the cut."""
    p, q, head = token["teacher"], token["student"], token["head_size"]
    w, n = token["forward_weight"], len(token["teacher"])
    edges = [rank + 0.5 for rank in range(n + 1)]
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    mass, gap, share = figure.subplots(3, 1, height_ratios=(3, 4, 1))

    reached = torch.tensor(p).cumsum(0).tolist()
    for begin, end, color in ((0, head, HEAD), (head, n, TAIL)):
        mass.bar(range(begin + 1, end + 1), reached[begin:end], width=1.0, color=color, alpha=0.35)
    mass.stairs(reached, edges, color=INK, linewidth=1.4)
    mass.axhline(MU, color=INK, linewidth=0.9, linestyle="--")
    mass.annotate(f"mu = {MU}", (n + 0.4, MU), (0, 3), textcoords="offset points", ha="right")
    mass.set_ylabel("mass so far")
    mass.set_title(
        "1. In the order of its probabilities, the teacher's mass passes mu behind the head"
    )

    for begin, end, color, name, size in (
        (0, head, HEAD, "head", token["g_head"]),
        (head, n, TAIL, "tail", token["g_tail"]),
    ):
        gap.bar(
            range(begin + 1, end + 1),
            [abs(p[i] - q[i]) for i in range(begin, end)],
            bottom=[min(p[i], q[i]) for i in range(begin, end)],
            width=1.0,
            color=color,
            alpha=0.55,
            label=f"gap in the {name}, {size:.2f}",
        )
    gap.stairs(p, edges, color=INK, linewidth=1.8, label="teacher p")
    gap.stairs(q, edges, color=INK, linewidth=1.4, linestyle=":", label="student q")
    gap.set_ylabel("probability")
    gap.set_xlabel(f"the {n} most probable of {token['vocabulary']:,} tokens")
    gap.set_title("2. The gap |p - q| is summed over the head and over the tail")
    gap.legend(frameon=False)
    for axes in (mass, gap):
        axes.axvline(head + 0.5, color=INK, linewidth=0.9)
        axes.set_xlim(0.5, n + 0.5)
        axes.set_xticks([1, *range(5, n + 1, 5)])

    share.barh(0, w, color=HEAD, alpha=0.55)
    share.barh(0, 1 - w, left=w, color=TAIL, alpha=0.55)
    share.text(w / 2, 0, f"w = {w:.2f} of forward KL", ha="center", va="center")
    share.text((1 + w) / 2, 0, f"1 - w = {1 - w:.2f} of reverse KL", ha="center", va="center")
    share.set_xlim(0, 1)
    share.set_axis_off()
    share.set_title("3. The share of the head is the weight of the forward KL")
    _save(figure, "head_and_tail")


def weights() -> None:
    """w of each token of a sentence, and how it is spread over several texts."""
    teacher, tokenizer = load_teacher()
    student = shallow_copy(teacher).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits, teacher_logits = (model(ids).logits[0, :-1] for model in (student, teacher))
    _, of_text = adaptive_kl(logits, teacher_logits, return_stats=True)
    _, of_rows = adaptive_kl(*real_logits(), return_stats=True)
    words = [tokenizer.decode(token).strip() for token in ids[0, 1:]]

    figure = Figure(figsize=(8, 6.4), layout="constrained")
    tokens, spread = figure.subplots(2, 1, height_ratios=(3, 2))
    w = of_text.forward_weight.tolist()
    places = range(len(w))
    rest = [1 - x for x in w]
    tokens.bar(places, w, 0.9, color=HEAD, alpha=0.55, label="w, of forward KL")
    tokens.bar(places, rest, 0.9, w, color=TAIL, alpha=0.55, label="1 - w, of reverse KL")
    tokens.set_xticks(places, words, rotation=90)
    tokens.set_xlim(-0.5, len(w) - 0.5)
    tokens.set_ylim(0, 1)
    tokens.set_ylabel("weight")
    tokens.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    tokens.set_title("Each token of a sentence")
    rows = of_rows.forward_weight.tolist()
    share = [100 / len(rows)] * len(rows)
    spread.hist(rows, 20, range=(0, 1), weights=share, color=INK, alpha=0.6)
    spread.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    spread.set_xlim(0, 1)
    spread.set_xlabel("w")
    spread.set_ylabel("tokens")
    spread.set_title(f"How w is spread over {len(rows)} tokens of five texts")
    _save(figure, "weights")


def _save(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / f"{name}.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
