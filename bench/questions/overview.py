"""`python -m bench overview`: the picture at the top of the README, of one token and of memory.

Left: the probabilities of one real token in the order of the teacher, the gap between teacher and
student in the head and in the tail, and the weight w that adaptive KL derives from the two. Right:
the peaks of memory that `python -m bench linear` stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from akl_triton.reference import reference_adaptive_kl
from bench.inputs.real_logits import TEXTS, real_logits
from bench.report.tables import table
from bench.store import load

ROWS, ROW = 256, 124  # a row whose head has several tokens, and a tail that still counts
SHOWN = 20  # tokens, of those that the teacher finds most probable
MIB = 2**20
HEAD, TAIL, INK = "#d1495b", "#edae49", "#30343f"
# The methods of the linear question that are drawn, by the start of their names.
METHODS = (
    "linear_adaptive_kl",
    "authors' code under checkpointing",
    "Liger LigerFusedLinearJSDLoss(beta=0)",
    "TRL ChunkedDivergenceFunction(beta=0)",
    "authors' code on all logits",
)


def collect() -> dict[str, Any]:
    """A token as the float64 oracle sees it, and the stored peaks."""
    students, teachers = real_logits(ROWS)
    student, teacher = students[ROW : ROW + 1], teachers[ROW : ROW + 1]
    exact = reference_adaptive_kl(student, teacher)
    p, q = (logits[0].double().softmax(-1) for logits in (teacher, student))
    order = teacher[0].sort(descending=True, stable=True).indices[:SHOWN]
    linear = load("linear")["data"]
    return {
        "token": {
            "text": TEXTS[ROW * len(TEXTS) // ROWS],
            "vocabulary": teacher.shape[1],
            "teacher": p[order].tolist(),
            "student": q[order].tolist(),
            "head_size": int(exact.head_size),
            "g_head": float(exact.g_head),
            "g_tail": float(exact.g_tail),
            "forward_weight": float(exact.forward_weight),
        },
        "memory": {
            "tokens": linear["tokens"],
            "vocabulary": linear["vocabulary"],
            "dtype": linear["dtype"],
            "methods": [
                {
                    "name": method["name"].partition(",")[0],
                    "computes": method["computes"],
                    "mib": method["peak_bytes"] / MIB,
                    "measured": method["remark"] != "in proportion to the tokens",
                }
                for start in METHODS
                for method in linear["methods"]
                if method["name"].startswith(start)
            ],
        },
    }


def markdown(data: dict[str, Any]) -> str:
    token, memory = data["token"], data["memory"]
    return "\n\n".join(
        [
            f"A token of {token['text']!r}, V = {token['vocabulary']:,}: {token['head_size']} "
            f"tokens in the head, gap {token['g_head']:.3f} in the head and {token['g_tail']:.3f} "
            f"in the tail, w = {token['forward_weight']:.3f}.",
            f"{memory['tokens']:,} tokens, V = {memory['vocabulary']:,}, {memory['dtype']}:",
            table(
                ("loss", "computes", "peak MiB", "figure"),
                [
                    (m["name"], m["computes"], f"{m['mib']:,.0f}", _kind(m))
                    for m in memory["methods"]
                ],
                texts=2,
            ),
        ]
    )


def _kind(method: dict[str, Any]) -> str:
    return "measured" if method["measured"] else "extrapolated"


def plot(data: dict[str, Any], path: Path) -> None:
    """Draw the token on the left, the memory on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    _draw_token(left, data["token"])
    _draw_memory(right, data["memory"])
    figure.savefig(path, dpi=150)


def _draw_token(axes: Any, token: dict[str, Any]) -> None:
    p, q, head = token["teacher"], token["student"], token["head_size"]
    w = token["forward_weight"]
    for ranks, color, name, gap in (
        (range(head), HEAD, "head", token["g_head"]),
        (range(head, len(p)), TAIL, "tail", token["g_tail"]),
    ):
        axes.bar(
            [rank + 1 for rank in ranks],
            [abs(p[rank] - q[rank]) for rank in ranks],
            bottom=[min(p[rank], q[rank]) for rank in ranks],
            width=1.0,
            color=color,
            alpha=0.55,
            linewidth=0,
            label=f"gap in the {name}: {gap:.2f}",
        )
    edges = [rank + 0.5 for rank in range(len(p) + 1)]
    axes.stairs(p, edges, color=INK, linewidth=1.8, label="teacher p")
    axes.stairs(q, edges, color=INK, linewidth=1.4, linestyle=":", label="student q")
    axes.axvline(head + 0.5, color=INK, linewidth=0.8)
    axes.set_xlim(0.5, len(p) + 0.5)
    axes.set_xticks([1, *range(5, len(p) + 1, 5)])
    axes.set_xlabel("tokens in the order of the teacher's probability")
    axes.set_ylabel("probability")
    axes.set_title(
        f"One real token: w = {w:.2f} of its gap is in the head\n"
        f"loss = {w:.2f} forward KL + {1 - w:.2f} reverse KL",
        fontsize=10,
    )
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_memory(axes: Any, memory: dict[str, Any]) -> None:
    methods = memory["methods"][::-1]
    bars = axes.barh(
        [f"{m['name']}\n({m['computes']})" for m in methods],
        [m["mib"] for m in methods],
        color=[HEAD if m["name"].startswith("linear_") else "#9aa1b0" for m in methods],
    )
    axes.bar_label(
        bars,
        [f" {m['mib']:,.0f} MiB, {_kind(m)}" for m in methods],
        fontsize=9,
    )
    axes.set_xlim(0, 1.6 * max(m["mib"] for m in methods))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_title(
        f"Peak memory, hidden states to gradients:\n{memory['tokens']:,} tokens, "
        f"V = {memory['vocabulary']:,}, fp32, on a CPU",
        fontsize=10,
    )
    axes.spines[["top", "right", "bottom"]].set_visible(False)
