"""What one should know of a student and a teacher before the one is distilled into the other.

`--json` prints an object with these members:

    akl_triton      the version
    student         {source, model, parameters, layers, context, head, refused}: `head` is what
                    `describe_model` found (name, kind, vocab_size, hidden_size, bias, tied, dtype,
                    scale, softcap, error), or null with the reason in `refused`
    teacher         the same
    vocabularies    {agree, same_vocabulary, message, different}: whether the ids that both sides
                    have are of the same tokens; whether no side has more; what `check_vocabularies`
                    says where one of them is false; [id, the student's token, the teacher's], the
                    first 20
    backend         {type, name, backend, why}: as `akl-triton env` has it, for the device
    memory          {tokens, trains_head, formula, measured}: bytes of the loss and its gradients
                    for "logits", "in place" and "fused", measured with --measure, else null; null
                    where a head was refused
    versions        [{name, installed, tested, known}]: `known` is whether the installed version is
                    one of those that are tested, null where it is not installed, or the package
                    is not and cannot say
    lines           {trainer, loop, linear}: Python to paste; "linear" where the model gives the
                    hidden states that its head reads; {logits} where a head was refused; {} where
                    the tokens differ
    text            {source, tokens, total, head_share, agreement, summary}: statistic -> {mean,
                    median, p90, max} over the tokens; null where the vocabularies do not agree, as
                    the next two
    tokens          [{index, id, text, figures}]: `figures` are those of
                    `akl_triton.cli.token_report.Figures`, null for the first
    files           the picture and the page

Nats and bytes are the units. The exit code is 1 where the tokens of the two differ, so that no loss
of the logits of both compares like with like.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console

import akl_triton
from akl_triton.cli import UsageError, env, loss_memory
from akl_triton.cli.inspect_tables import show
from akl_triton.cli.options import output_folder, resolve_device
from akl_triton.cli.pair import (
    Side,
    compare_vocabularies,
    lines_to_paste,
    load_pair,
)
from akl_triton.cli.token_page import draw, write_page
from akl_triton.cli.token_report import TokenReport, report_tokens, tokenize

DEFAULT_PAIR = "smollm2-12", "smollm2"
CHAPTER = "context-managers"  # of pydoc_data.topics
# The libraries of the integrations, and the extras that bring them.
LIBRARIES = {"transformers": "hf", "accelerate": "hf", "peft": "peft", "trl": "trl"}


def run(arguments: argparse.Namespace) -> int:
    out = Console(stderr=arguments.json)
    device = resolve_device(arguments.device)
    if arguments.measure and device.type == "mps":
        raise UsageError(
            "--measure: expected a CPU or a CUDA device, whose allocations are recorded"
        )
    folder = output_folder(arguments.output)
    text, source = read_text(arguments.text)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    with out.status("Loading the models"):
        student, teacher = load_pair(*pair(arguments), dtype, device)
    with out.status("Comparing them"):
        facts, report = collect(student, teacher, text, source, device, arguments)
    if report is not None:
        names = student.name, teacher.name
        draw(report, names, folder / "akl_inspect.png")
        facts["files"] = [str(folder / f"akl_inspect.{kind}") for kind in ("png", "html")]
        write_page(report, names, facts, folder / "akl_inspect.html")
    if arguments.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        show(facts, report, out)
    return 0 if facts["vocabularies"]["agree"] else 1


def pair(arguments: argparse.Namespace) -> tuple[str, str]:
    if arguments.student is None:
        return DEFAULT_PAIR
    if arguments.teacher is None:
        raise UsageError(f"TEACHER: expected one beside STUDENT {arguments.student}, got none")
    return arguments.student, arguments.teacher


def read_text(name: str | None) -> tuple[str, str]:
    """(the text, where it is from)."""
    if name is None:
        from pydoc_data.topics import topics

        return topics[CHAPTER], f"{CHAPTER}, a chapter of Python's documentation"
    try:
        text = Path(name).expanduser().read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {name}: expected UTF-8, got another byte at {error.start}"
        ) from error
    except OSError as error:
        raise UsageError(f"--text {name}: {error.strerror}") from error
    if not text.strip():
        raise UsageError(f"--text {name}: expected some text, got an empty file")
    return text, name


def collect(
    student: Side,
    teacher: Side,
    text: str,
    source: str,
    device: torch.device,
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], TokenReport | None]:
    """What is printed as JSON but for the files, and the report of the tokens."""
    vocabularies = compare_vocabularies(student, teacher)
    contexts = [side.context for side in (student, teacher) if side.context is not None]
    limit = min([arguments.max_tokens, *contexts])
    ids, *_ = tokenize(student.tokenizer, text, limit)
    report = None
    if vocabularies.agree:
        report = report_tokens(student.model, teacher.model, student.tokenizer, text, limit, device)
    first = torch.tensor([ids[:8]], device=device)
    facts = {
        "akl_triton": akl_triton.__version__,
        "student": describe(student),
        "teacher": describe(teacher),
        "vocabularies": {
            **asdict(vocabularies),
            "different": [list(x) for x in vocabularies.different[:20]],
        },
        "backend": next(x for x in env.describe()["devices"] if x["type"] == device.type),
        "memory": memory(student, teacher, device, arguments),
        "versions": versions(),
        "lines": lines_to_paste(student, teacher, vocabularies, first),
        "text": None,
        "tokens": None,
        "files": [],
    }
    if report is not None:
        facts["text"] = {
            "source": source,
            "tokens": len(report.tokens),
            "total": report.total,
            "head_share": report.head_share,
            "agreement": report.agreement,
            "summary": report.summary,
        }
        facts["tokens"] = [asdict(token) for token in report.tokens]
    return facts, report


def describe(side: Side) -> dict[str, Any]:
    head = None if side.head is None else asdict(side.head)
    if head is not None:
        head["dtype"] = str(head["dtype"]).removeprefix("torch.")
    return {
        "source": side.source,
        "model": type(side.model).__name__,
        "parameters": sum(p.numel() for p in side.model.parameters()),
        "layers": getattr(side.model.config.get_text_config(), "num_hidden_layers", None),
        "context": side.context,
        "head": head,
        "refused": side.refused,
    }


def memory(
    student: Side, teacher: Side, device: torch.device, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    if student.head is None or teacher.head is None:
        return None
    trains_head = student.model.get_output_embeddings().weight.requires_grad
    formula = loss_memory.predict(student.head, teacher.head, arguments.tokens, trains_head, device)
    measured = None
    if arguments.measure:
        try:
            measured = loss_memory.measure(student, teacher, arguments.tokens, device)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"--measure: the logits of {arguments.tokens:,} tokens do not fit on {device}; "
                "pass fewer --tokens"
            ) from error
    return asdict(loss_memory.LossMemory(arguments.tokens, trains_head, formula, measured))


def versions() -> list[dict[str, Any]]:
    """The libraries of the integrations; the versions that the extras ask for are tested."""
    try:
        requirements = [Requirement(line) for line in requires("akl-triton") or []]
    except PackageNotFoundError:  # a checkout that is not installed
        requirements = []
    found = []
    for name, extra in LIBRARIES.items():
        tested = next(
            (
                x.specifier
                for x in requirements
                if x.name == name and x.marker is not None and x.marker.evaluate({"extra": extra})
            ),
            None,
        )
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        found.append(
            {
                "name": name,
                "installed": installed,
                "tested": None if tested is None else str(tested),
                "known": None
                if installed is None or tested is None
                else tested.contains(installed),
            }
        )
    return found
