"""`python -m bench offline`: bytes a token that a teacher's pairs take on disk, and their reading.

SmolLM2-135M writes its pairs of the documentation of Python with `akl_triton.offline.PairWriter`,
for several k; the files are read as a student reads them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from akl_triton import SparseTeacher, teacher_pairs
from akl_triton.offline import PairWriter, open_pairs
from bench.inputs.machine import cpu
from bench.report.tables import table

K = (8, 16, 32, 64, 128)
COLUMNS = {
    "teacher_ids": "ids",
    "teacher_log_probs": "log-probabilities",
    "teacher_log_tail": "tail",
    "input_ids": "tokens",
}
BATCH = 4


@torch.no_grad()
def collect(sequences: int = 128) -> dict[str, Any]:
    """The pairs of so many sequences of 128 tokens: two minutes."""
    from akl_triton.cli.smollm2 import load_teacher, read_text

    teacher, tokenizer = load_teacher()
    train, _ = read_text(tokenizer)
    input_ids = train[:: len(train) // sequences][:sequences]
    batches = [teacher_pairs(teacher(ids).logits, max(K)) for ids in torch.split(input_ids, BATCH)]
    return {
        "cpu": cpu(),
        "vocabulary": teacher.config.vocab_size,
        "tokens": input_ids.numel(),
        "stores": [_stored(input_ids, batches, k) for k in K],
    }


def first(pairs: SparseTeacher, k: int) -> SparseTeacher:
    """The k most probable of the pairs; the mass of the others is the rest's."""
    assert pairs.log_tail is not None
    log_probs, order = pairs.log_probs.sort(dim=-1, descending=True, stable=True)
    rest = torch.cat([log_probs[..., k:], pairs.log_tail[..., None]], dim=-1)
    return SparseTeacher(
        pairs.ids.gather(-1, order)[..., :k], log_probs[..., :k], rest.logsumexp(-1)
    )


def _stored(input_ids: torch.Tensor, batches: list[SparseTeacher], k: int) -> dict[str, Any]:
    tokens = input_ids.numel()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "pairs")
        with PairWriter(folder, k=k) as writer:
            for i, (ids, pairs) in enumerate(
                zip(torch.split(input_ids, BATCH), batches, strict=True)
            ):
                writer.append([f"{i} {j}" for j in range(len(ids))], ids, first(pairs, k))
        files = list(folder.glob("*.parquet"))
        of_columns = dict.fromkeys(COLUMNS, 0)
        for path in files:
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    column = metadata.row_group(group).column(index)
                    name = column.path_in_schema.split(".")[0]
                    if name in of_columns:
                        of_columns[name] += column.total_compressed_size
        seconds = {}
        for streaming in (False, True):
            dataset = open_pairs(folder, streaming=streaming, cache_dir=scratch)
            started = time.process_time()
            for _ in dataset:
                pass
            seconds["streaming" if streaming else "random access"] = time.process_time() - started
        return {
            "k": k,
            "bytes": sum(path.stat().st_size for path in files) / tokens,
            "columns": {name: size / tokens for name, size in of_columns.items()},
            "microseconds": {name: 1e6 * x / tokens for name, x in seconds.items()},
        }


def markdown(data: dict[str, Any]) -> str:
    rows = [
        (
            f"{store['k']}",
            f"{store['bytes']:.0f}",
            *(f"{store['columns'][name]:.1f}" for name in COLUMNS),
            f"{2 * data['vocabulary'] / store['bytes']:,.0f}",
            *(f"{x:.0f}" for x in store["microseconds"].values()),
        )
        for store in data["stores"]
    ]
    return "\n\n".join(
        [
            f"{data['tokens']:,} tokens of Python's documentation, in sequences of 128, with the "
            f"pairs of SmolLM2-135M (V = {data['vocabulary']:,}): bytes a token of the Parquet "
            "files that `akl_triton.offline.PairWriter` writes, and of their columns; how many "
            "times more the logits in bf16 would be; and the CPU time to read a token into "
            f"tensors, in one process ({data['cpu']}).",
            table(
                (
                    "k",
                    "bytes",
                    *COLUMNS.values(),
                    "logits, times",
                    "random access, µs",
                    "streaming, µs",
                ),
                rows,
            ),
        ]
    )
