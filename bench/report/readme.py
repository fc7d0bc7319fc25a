"""The figures in README.md: each is in a block that is written from the stored answers. A block is
the text between two comments, which readers of the page do not see:

    <!-- python -m bench report: NAME -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.inputs.peers import PEERS
from bench.inputs.shapes import MAIN_VOCABULARY
from bench.inputs.stages import SEPARATE
from bench.questions import demo as demo_question
from bench.questions.floor import work
from bench.questions.instructions import MAIN_TARGET
from bench.report.tables import table
from bench.store import load

README = Path(__file__).resolve().parents[2] / "README.md"
WIDTH = 100
BLOCK = re.compile(r"(<!-- python -m bench report: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MIB = 2**20


def costs() -> str:
    """The table of the costs of a forward and backward, ours and the peers'."""
    instructions, operators, floors = (
        load(name)["data"] for name in ("instructions", "operators", "floor")
    )
    kernels = {
        case.get("peer") or case["loss"]: [
            kernel for name, kernel in case["kernels"].items() if "peer" in case or name in SEPARATE
        ]
        for case in (*instructions["ours"], *instructions["peers"])
        if case["target"] == MAIN_TARGET
        and case.get("dtype", "bf16") == "bf16"
        and MAIN_VOCABULARY in case["vocabularies"]
    }
    measured = {peer.name for peer in PEERS}
    rows = []
    for subject in sorted(operators["subjects"], key=lambda s: (s["computes"], s["bytes"])):
        name, computes = subject["name"], subject["computes"]
        if name not in measured or computes not in ("adaptive_kl", "forward_kl"):
            continue
        is_ours = name == computes
        executed = work(kernels.get(name, ()), floors["scans"]["1"]).instructions
        only_kernels = subject["bytes_in_kernels"] > 0.99 * subject["bytes"]
        rows.append(
            (
                f"**akl_triton {name}**" if is_ours else name,
                computes,
                f"{subject['bytes']:.1f}",
                f"{executed:.1f}" if only_kernels else "",
                f"{subject['temporaries']:.1f}",
            )
        )
    whole = [
        case["both"]["instructions"]
        for case in load("traffic")["data"]["cases"]
        if case["dtype"] == "bfloat16" and case["temperature"] == 1.0
    ]
    return "\n\n".join(
        [
            table(
                ("loss", "computes", "bytes moved", "instructions", "bytes of temporaries"),
                rows,
                texts=2,
            ),
            _paragraph(
                "The table shows one forward and backward in bf16 per vocabulary position (one "
                "pair of logits), on real logits at T = 1. No GPU was timed: bytes are counted "
                "without a cache, and instructions are those of the loops in the machine code for "
                f"sm_90. Whole rows execute {min(whole):.0f} to {max(whole):.0f} PTX instructions "
                "per position, because a row also has a start and an end."
            ),
        ]
    )


def logits() -> str:
    """The reason for the losses of hidden states."""
    tokens, vocabulary, sides, element = 16_384, MAIN_VOCABULARY, 2, 2
    gigabytes = sides * tokens * vocabulary * element / 1e9
    return _paragraph(
        f"At {tokens:,} tokens and V = {vocabulary:,} the logits of both sides are "
        f"{gigabytes:.0f} GB in bf16. Every loss can also be computed from the hidden states and "
        "the weights of both lm_heads; it then holds no more than a chunk of the logits at a time "
        "(`python -m bench linear` measures its peak and that of others). Before:"
    )


def on_a_cpu() -> str:
    """Time and memory of the PyTorch backend, and memory of the losses of hidden states."""
    real, linear, compiled = (
        load(name)["data"] for name in ("on_real_logits", "linear", "compiled")
    )
    case = real["cases"][0]
    ours, authors = case["costs"]["PyTorch backend"], case["costs"]["authors"]
    share = ours["temporaries_mib"] / authors["temporaries_mib"]
    peaks = {row["name"]: row["peak_bytes"] for row in linear["methods"] if "peak_bytes" in row}
    *_, of_authors = peaks.values()
    (plain,) = (
        case
        for case in compiled["cases"]
        if (case["loss"], case["dtype"]) == ("forward_kl", "bfloat16")
    )
    return _paragraph(
        f"For {real['rows']} real rows of V = {real['vocabulary']:,} in {_short(case['dtype'])} "
        f"the PyTorch backend takes {ours['milliseconds']:,.0f} ms ({real['threads']} threads) "
        f"where the authors' code takes {authors['milliseconds']:,.0f} ms, and a thread "
        f"of it holds {share:.2f} of their temporaries: `python -m bench on_real_logits`. "
        "`forward_kl`, which holds nothing of the logits' size, takes "
        f"{plain['ours'] / plain['compiled']:.1f} times as long as its plain formula under "
        "`torch.compile`, each in one thread: `python -m bench compiled`. "
        "From hidden states, "
        f"the loss of {linear['tokens']:,} tokens of that vocabulary and all its gradients peak "
        f"at {peaks['linear_adaptive_kl'] / MIB:,.0f} MiB where the authors' code on all "
        f"logits needs {of_authors / MIB:,.0f} MiB: `python -m bench linear`."
    )


def _short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def demo() -> str:
    """The description of the demo, its picture and its figures."""
    data = load("demo")["data"]
    _, shares = demo_question.first_and_last(data, "head_share")
    if not shares["FKL"] < shares["AKL"] < shares["RKL"]:
        raise ValueError(f"README.md: the shares in the head are no longer in order: {shares}")
    peaks = data["peak_mib"]
    return "\n\n".join(
        [
            _paragraph(
                f"`akl-triton demo` (here with its defaults, on a {data['device'].upper()}) takes "
                "SmolLM2-135M-Instruct as the teacher, the same model with "
                f"{data['student_layers']} of its {data['teacher_layers']} layers as the student, "
                f"and trains it for {data['steps']} steps of {data['tokens']} tokens of the "
                "documentation of Python, once with each loss, from the same start on the same "
                "batches:"
            ),
            "![Held-out curves of the demo](bench/results/demo.png)",
            demo_question.measures(data),
            _paragraph(
                "The student trained with forward KL has the smallest share of its gap left in the "
                "head, the one trained with reverse KL the smallest share left in the tail, as the "
                "paper says of the first steps of training; AKL is between the two. It is one "
                "short run with one seed, and no claim about which loss makes the better model. "
                f"The loss works from hidden states: {peaks['hidden states']} MiB at its peak, "
                f"where all logits would take {peaks['all logits']} MiB (`akl-triton demo` prints "
                "both)."
            ),
        ]
    )


def _paragraph(text: str) -> str:
    """The text wrapped into lines, none of which ends inside of a command."""
    whole = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.fill(whole, WIDTH, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


BLOCKS: dict[str, Callable[[], str]] = {
    "costs": costs,
    "logits": logits,
    "on_a_cpu": on_a_cpu,
    "demo": demo,
}


def render(readme: str) -> str:
    """The README with every block written anew."""

    def block(found: re.Match[str]) -> Any:
        start, name, end = found.groups()
        if name not in BLOCKS:
            raise ValueError(f"README.md: there is no block {name!r}, but {', '.join(BLOCKS)}")
        return f"{start}\n{BLOCKS[name]()}\n\n{end}"

    return BLOCK.sub(block, readme)


def write() -> None:
    """Write the blocks of README.md."""
    README.write_text(render(README.read_text("utf-8")), encoding="utf-8")
