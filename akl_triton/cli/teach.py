"""A teacher's pairs of a text, on disk: what a student trains from without the teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from akl_triton.cli import UsageError
from akl_triton.cli.options import output_folder, resolve_device
from akl_triton.cli.pair import load_model
from akl_triton.offline import PairWriter, write_pairs

PYTHON_DOCS = "python-docs"


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    device = resolve_device(arguments.device)
    texts = read_documents(arguments.text)
    folder = output_folder(arguments.output)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    with console.status("Loading the teacher"):
        teacher, tokenizer = load_model("teacher", arguments.teacher)
        teacher = teacher.eval().requires_grad_(False).to(device=device, dtype=dtype)
        limit = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and arguments.context > limit:
        raise UsageError(
            f"--context: expected at most {limit} tokens, which the teacher sees, got "
            f"{arguments.context}"
        )
    documents = [(name, tokenizer(text, verbose=False)["input_ids"]) for name, text in texts]
    total = sum(len(tokens) for _, tokens in documents)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    try:
        with (
            Progress(*columns, console=console) as progress,
            PairWriter(
                folder,
                k=arguments.top_k,
                temperature=arguments.temperature,
                tokenizer=tokenizer,
                teacher=teacher,
                tokens_per_file=arguments.tokens_per_file,
            ) as writer,
        ):
            bar = progress.add_task("Teaching", total=total)
            write_pairs(
                writer,
                teacher,
                documents,
                context=arguments.context,
                batch=arguments.batch,
                progress=lambda tokens: progress.advance(bar, tokens),
            )
    except ValueError as error:  # what the folder has is of another k, temperature or teacher
        raise UsageError(str(error)) from error
    size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    tokens = sum(writer.done.values())
    console.print(
        f"{folder}: {tokens:,} tokens, {arguments.top_k} pairs each, {size:,} bytes, "
        f"{size / max(tokens, 1):.1f} bytes a token"
    )
    return 0


def read_documents(source: str) -> list[tuple[str, str]]:
    """(name, text) of the file, or of the chapters of Python's documentation."""
    if source == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return sorted(topics.items())
    path = Path(source).expanduser()
    try:
        return [(path.name, path.read_text("utf-8"))]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"TEXT: expected a text file in UTF-8, or {PYTHON_DOCS}, got {source}: {error}"
        ) from error
