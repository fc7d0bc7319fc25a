"""Teachers on disk: their pairs are written while a teacher runs, and read while a student trains.

They are in Parquet files, which `datasets.load_dataset("parquet", ...)`, pyarrow, pandas and DuckDB
open as they are. A row is a sequence of tokens:

    document              string                             the text it is from
    position              int64                              of its first token in the document
    input_ids             list<int32>                        [L]
    teacher_ids           list<fixed_size_list<int32>[k]>    [L, k], ascending; -1 is no pair
    teacher_log_probs     list<fixed_size_list<halffloat>[k]>    [L, k], natural logarithms
    teacher_log_tail      list<float>                        [L]
    teacher_temperature   float                              the same in all rows

The pairs of position i are of the distribution of token i + 1. The metadata of each file has, under
"akl_triton", JSON with the version of this schema, k, temperature, the checksums of tokenizer and
teacher, and the version of this library.

This module needs the extra "offline": pyarrow, and datasets for `open_pairs`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from . import checks
from .integrations.heads import without_cache
from .kernels.layout import ABSENT
from .sparse import MOST_PAIRS, SparseTeacher, teacher_pairs

if TYPE_CHECKING:
    import datasets

SCHEMA_VERSION = 1
TOKENS_PER_FILE = 2**17
_METADATA = b"akl_triton"
_PATTERN = "pairs-*.parquet"
_ROW_GROUP_TOKENS = 2**14  # of which a reader that streams holds some at a time
_WEIGHTS_HASHED = 16  # of each parameter


class Stored(NamedTuple):
    """What the metadata of a store says of its pairs."""

    schema: int
    k: int
    temperature: float
    tokenizer: str | None  # `tokenizer_checksum`
    teacher: str | None  # `teacher_checksum`
    version: str  # of akl_triton

    def differences(self, expected: Mapping[str, Any]) -> list[str]:
        """A line for each of the fields that is another than expected."""
        return [
            f"{name} {getattr(self, name)!r} in place of {value!r}"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]


class PairWriter:
    """Writes a teacher's pairs into a folder of Parquet files; a context manager.

    A file is written under a name that readers do not see, and renamed when it is complete, so that
    a process that is killed leaves complete files alone. A writer that is opened again goes on
    after the tokens in these: `done` says what they are.

    Args:
        folder: made if it is not there; it holds the pairs of one teacher.
        k: of the pairs.
        temperature: of the pairs.
        tokenizer: that of the tokens, whose checksum is stored.
        teacher: the model, whose checksum is stored.
        tokens_per_file: a file is complete as soon as it has so many; what a process that is killed
            loses is less than one file. The rest is written where the context ends, also by an
            exception.

    Raises:
        TypeError, ValueError: an argument is not as above; the folder has pairs of another k,
            temperature, tokenizer or teacher.

    Example:
        >>> import tempfile, torch
        >>> from akl_triton import teacher_pairs
        >>> from akl_triton.offline import PairWriter, open_pairs
        >>> folder = tempfile.mkdtemp()
        >>> tokens, logits = torch.randint(32, (2, 6)), torch.randn(2, 6, 32)
        >>> with PairWriter(folder, k=4) as writer:
        ...     writer.append(["first", "second"], tokens, teacher_pairs(logits, 4))
        >>> PairWriter(folder, k=4).done
        {'first': 6, 'second': 6}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        k: int,
        temperature: float = 1.0,
        tokenizer: Any = None,
        teacher: nn.Module | None = None,
        tokens_per_file: int = TOKENS_PER_FILE,
    ) -> None:
        from . import __version__

        k = checks.check_integer("k", k)
        if not 1 <= k <= MOST_PAIRS:
            raise ValueError(f"k: expected an integer from 1 to {MOST_PAIRS}, got {k}")
        self.tokens_per_file = checks.check_integer("tokens_per_file", tokens_per_file)
        if self.tokens_per_file < 1:
            raise ValueError(f"tokens_per_file: expected an integer > 0, got {tokens_per_file}")
        self.folder = Path(folder)
        self.stored = Stored(
            schema=SCHEMA_VERSION,
            k=k,
            temperature=checks.check_number("temperature", temperature, above=0.0),
            tokenizer=None if tokenizer is None else tokenizer_checksum(tokenizer),
            teacher=None if teacher is None else teacher_checksum(teacher),
            version=__version__,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self.folder.glob(_PATTERN))
        if files:
            expected = self.stored._asdict()
            del expected["version"]
            _require(_stored_in(files), expected, self.folder)
        self._schema = _schema(self.stored)
        self._tokens = _tokens_of(files)
        self._next_file = 1 + max((int(path.stem.rpartition("-")[2]) for path in files), default=-1)
        self._writer: pq.ParquetWriter | None = None
        self._tokens_in_file = 0
        self._rows: list[dict[str, Any]] = []
        self._tokens_in_rows = 0

    @property
    def done(self) -> dict[str, int]:
        """The number of tokens of each document that were written or appended, all from its start:
        a document is complete where that is its length."""
        return dict(self._tokens)

    def append(
        self,
        documents: Sequence[str],
        input_ids: Tensor,
        teacher: SparseTeacher,
        positions: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Append a batch of sequences.

        Args:
            documents: ``B`` names, of the document of each sequence.
            input_ids: ``[B, L]``.
            teacher: ``[B, L, k]``, with outside="bucket", at the temperature of the writer.
            positions: ``B``, of the first token of each sequence in its document, which follows the
                last one that was appended; by default 0.
            lengths: ``B``, the tokens of each sequence, which padding follows; by default L.

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has been appended.
        """
        lengths, positions = self._check(documents, input_ids, teacher, positions, lengths)
        ids = teacher.ids.where(teacher.ids != ABSENT, -1).cpu().numpy()
        log_probs = teacher.log_probs.half().cpu().numpy()
        log_tail = teacher.entries()[..., -1].cpu().numpy()
        tokens = input_ids.to("cpu", torch.int32).numpy()
        for i, (document, position, length) in enumerate(
            zip(documents, positions, lengths, strict=True)
        ):
            # Copies: a row must not keep the whole of a padded batch.
            self._rows.append(
                {
                    "document": document,
                    "position": position,
                    "input_ids": tokens[i, :length].copy(),
                    "teacher_ids": ids[i, :length].copy(),
                    "teacher_log_probs": log_probs[i, :length].copy(),
                    "teacher_log_tail": log_tail[i, :length].copy(),
                }
            )
            self._tokens[document] = position + length
            self._tokens_in_rows += length
            if self._tokens_in_file + self._tokens_in_rows >= self.tokens_per_file:
                self._complete_file()
            elif self._tokens_in_rows >= _ROW_GROUP_TOKENS:
                self._write_rows()

    def close(self) -> None:
        """Write what was appended, and complete the file."""
        self._complete_file()

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check(
        self,
        documents: Sequence[str],
        input_ids: Tensor,
        teacher: SparseTeacher,
        positions: Sequence[int] | None,
        lengths: Sequence[int] | None,
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Lengths and positions of a batch that may be appended."""
        checks.check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [B, L], got {list(input_ids.shape)}")
        if not isinstance(teacher, SparseTeacher):
            raise TypeError(f"teacher: expected a SparseTeacher, got {checks.type_of(teacher)}")
        expected = torch.Size([*input_ids.shape, self.stored.k])
        if teacher.ids.shape != expected:
            raise ValueError(
                f"teacher: expected pairs {list(expected)}, got {list(teacher.ids.shape)}"
            )
        if teacher.outside != "bucket":
            raise ValueError(
                f"teacher: expected pairs with outside='bucket', got {teacher.outside!r}"
            )
        if teacher.temperature != self.stored.temperature:
            raise ValueError(
                f"teacher: expected pairs of the temperature {self.stored.temperature:g}, that of "
                f"the writer, got {teacher.temperature:g}"
            )
        count, longest = input_ids.shape
        lengths = [longest] * count if lengths is None else lengths
        positions = [0] * count if positions is None else positions
        for name, values in {
            "documents": documents,
            "positions": positions,
            "lengths": lengths,
        }.items():
            if len(values) != count:
                raise ValueError(
                    f"{name}: expected {count} values, one a sequence, got {len(values)}"
                )
        after = dict(self._tokens)
        for document, position, length in zip(documents, positions, lengths, strict=True):
            if not 1 <= length <= longest:
                raise ValueError(f"lengths: expected 1 to {longest} tokens, got {length}")
            if position != after.get(document, 0):
                raise ValueError(
                    f"positions: expected {after.get(document, 0)} for document {document!r}, "
                    f"behind what it has, got {position}; leave out what writer.done says is there"
                )
            after[document] = position + length
        return lengths, positions

    def _path(self) -> tuple[Path, Path]:
        """The file in progress, and its name once it is complete."""
        name = f"pairs-{self._next_file:06d}.parquet"
        return self.folder / f".{name}.part", self.folder / name

    def _write_rows(self) -> None:
        """The rows, as a row group of the file in progress."""
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path()[0],
                self._schema,
                compression="zstd",
                use_dictionary=["document", "teacher_temperature"],
                # The bytes of a column's numbers apart: the high ones of ascending ids compress.
                column_encoding={
                    f"{name}{'.list.element' * depth}": "BYTE_STREAM_SPLIT"
                    for name, depth in {
                        "input_ids": 1,
                        "teacher_ids": 2,
                        "teacher_log_probs": 2,
                        "teacher_log_tail": 1,
                    }.items()
                },
            )
        self._writer.write_table(_table(self._rows, self._schema, self.stored))
        self._tokens_in_file += self._tokens_in_rows
        self._rows, self._tokens_in_rows = [], 0

    def _complete_file(self) -> None:
        self._write_rows()
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        part, path = self._path()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if path.exists():
            raise FileExistsError(
                f"{path}: expected no such file, which another PairWriter has written; a folder "
                "has one at a time"
            )
        part.rename(path)
        self._next_file += 1
        self._tokens_in_file = 0


@torch.no_grad()
def write_pairs(
    writer: PairWriter,
    teacher: nn.Module,
    documents: Iterable[tuple[str, Sequence[int]]],
    *,
    context: int = 512,
    batch: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Run a teacher over documents, and write its pairs; what the writer has done is left out.

    A document is cut into sequences of ``context`` tokens, each of which the teacher sees alone.

    Args:
        writer: whose k and temperature the pairs have.
        teacher: a causal language model of transformers, in eval mode.
        documents: (name, tokens) of each, the names different and the same at every start.
        context: tokens of a sequence, the same at every start.
        batch: sequences that the teacher sees at a time.
        progress: called with the number of tokens that have been done, those of an earlier start
            included.

    Raises:
        ValueError: the writer has other tokens of a document than a whole number of sequences.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from akl_triton.offline import PairWriter, write_pairs
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()
        >>> with PairWriter(tempfile.mkdtemp(), k=8, teacher=teacher) as writer:
        ...     write_pairs(writer, teacher, [("a text", range(20))], context=8)
        >>> writer.done
        {'a text': 20}
    """
    device = next(teacher.parameters()).device
    options = without_cache(teacher)
    for some in _batched(_sequences(writer, documents, context, progress), batch):
        lengths = [len(tokens) for _, _, tokens in some]
        # Padded at the end, which no earlier position of a causal model sees.
        input_ids = torch.zeros(len(some), max(lengths), dtype=torch.long)
        for row, (_, _, tokens) in zip(input_ids, some, strict=True):
            row[: len(tokens)] = torch.as_tensor(tokens)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        logits = teacher(
            input_ids=input_ids.to(device), attention_mask=mask.long().to(device), **options
        ).logits
        pairs = teacher_pairs(logits, writer.stored.k, writer.stored.temperature)
        names, positions = [name for name, _, _ in some], [start for _, start, _ in some]
        writer.append(names, input_ids, pairs, positions, lengths)
        progress(sum(lengths))


def open_pairs(
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    teacher: nn.Module | None = None,
    streaming: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """The pairs of a folder as a dataset of tensors.

    Args:
        folder: that a `PairWriter` wrote, which may still write.
        tokenizer: the student's, which has to be that of the pairs.
        teacher: a model, which has to be the one that wrote them.
        streaming: read the files while the dataset is iterated, in place of an Arrow copy of them,
            which has random access.
        cache_dir: the folder of that copy, by default the cache of datasets.

    Shape:
        of a row, with L tokens: input_ids ``[L]``, teacher_ids and teacher_log_probs ``[L, k]``,
        teacher_log_tail ``[L]``, teacher_temperature ``[]``, position ``[]``, and document, a
        string. `akl_triton.integrations.PairCollator` makes batches of them.

    Raises:
        FileNotFoundError: the folder has no pairs.
        ValueError: they are of another tokenizer or teacher, or not all of the same k and
            temperature; the message says what differs.

    Example:
        >>> import tempfile, torch
        >>> from akl_triton import teacher_pairs
        >>> from akl_triton.offline import PairWriter, open_pairs
        >>> folder = tempfile.mkdtemp()
        >>> with PairWriter(folder, k=4) as writer:
        ...     pairs = teacher_pairs(torch.randn(1, 6, 32), 4)
        ...     writer.append(["a text"], torch.randint(32, (1, 6)), pairs)
        >>> open_pairs(folder, streaming=True).shuffle(seed=0)  # doctest: +ELLIPSIS
        IterableDataset({...
    """
    from datasets import Array2D, Features, List, Value, load_dataset

    stored, files = _opened(folder)
    expected: dict[str, Any] = {"schema": SCHEMA_VERSION}
    if tokenizer is not None:
        expected["tokenizer"] = tokenizer_checksum(tokenizer)
    if teacher is not None:
        expected["teacher"] = teacher_checksum(teacher)
    _require(stored, expected, Path(folder))
    # As arrays of two dimensions they are read several times faster than as lists of lists.
    features = Features(
        {
            "document": Value("string"),
            "position": Value("int64"),
            "input_ids": List(Value("int32")),
            "teacher_ids": Array2D((None, stored.k), "int32"),
            "teacher_log_probs": Array2D((None, stored.k), "float16"),
            "teacher_log_tail": List(Value("float32")),
            "teacher_temperature": Value("float32"),
        }
    )
    dataset = load_dataset(
        "parquet",
        data_files=[str(path) for path in files],
        split="train",
        features=features,
        streaming=streaming,
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    return dataset.with_format("torch")


def stored_in(folder: str | os.PathLike[str]) -> Stored:
    """What the files of a folder say of its pairs."""
    return _opened(folder)[0]


def tokenizer_checksum(tokenizer: Any) -> str:
    """Of the tokens and their ids, in hexadecimal digits."""
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def teacher_checksum(teacher: nn.Module) -> str:
    """Of the configuration of a model of transformers, and of some weights of each parameter, which
    are rounded to bf16: the dtype that it was loaded in does not matter. In hexadecimal digits."""
    others = ("transformers_version", "dtype", "torch_dtype", "use_cache")
    config: Any = teacher.config
    known = {
        name: value
        for name, value in config.to_dict().items()
        if name not in others and not name.startswith("_")
    }
    parts = [json.dumps(known, sort_keys=True, default=str).encode()]
    for name, p in teacher.named_parameters():
        some = p.detach().reshape(-1)[:_WEIGHTS_HASHED].cpu().bfloat16().float()
        parts += [f"{name} {tuple(p.shape)}".encode(), some.numpy().tobytes()]
    return _digest(b"\n".join(parts))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _schema(stored: Stored) -> pa.Schema:
    def of_positions(element: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("element", element))

    def of_pairs(element: pa.DataType) -> pa.DataType:
        return of_positions(pa.list_(pa.field("element", element), stored.k))

    fields = {
        "document": pa.string(),
        "position": pa.int64(),
        "input_ids": of_positions(pa.int32()),
        "teacher_ids": of_pairs(pa.int32()),
        "teacher_log_probs": of_pairs(pa.float16()),
        "teacher_log_tail": of_positions(pa.float32()),
        "teacher_temperature": pa.float32(),
    }
    return pa.schema(
        list(fields.items()), metadata={_METADATA: json.dumps(stored._asdict()).encode()}
    )


def _table(rows: list[dict[str, Any]], schema: pa.Schema, stored: Stored) -> pa.Table:
    lengths = [len(row["input_ids"]) for row in rows]
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())

    def column(name: str) -> pa.Array:
        kind = schema.field(name).type
        if name == "teacher_temperature":
            return pa.array([stored.temperature] * len(rows), kind)
        values = [row[name] for row in rows]
        if not pa.types.is_list(kind):
            return pa.array(values, kind)
        flat = np.concatenate(values)
        if flat.ndim == 1:
            elements = pa.array(flat, kind.value_type)
        else:
            numbers = pa.array(flat.reshape(-1), kind.value_type.value_type)
            elements = pa.FixedSizeListArray.from_arrays(numbers, type=kind.value_type)
        return pa.ListArray.from_arrays(offsets, elements, type=kind)

    return pa.Table.from_arrays([column(name) for name in schema.names], schema=schema)


def _opened(folder: str | os.PathLike[str]) -> tuple[Stored, list[Path]]:
    files = sorted(Path(folder).glob(_PATTERN))
    if not files:
        raise FileNotFoundError(
            f"folder: expected one with files {_PATTERN}, which akl_triton.offline.PairWriter or "
            f"`akl-triton teach` writes, got {folder}"
        )
    return _stored_in(files), files


def _stored_in(files: Sequence[Path]) -> Stored:
    """What the files say of their pairs, all of them the same."""
    first: Stored | None = None
    for path in files:
        written = (pq.read_schema(path).metadata or {}).get(_METADATA)
        if written is None:
            raise ValueError(
                f"{path}: expected a file that akl_triton.offline.PairWriter wrote, got one "
                "without its metadata"
            )
        fields = json.loads(written)
        if fields["schema"] != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: expected schema {SCHEMA_VERSION}, got {fields['schema']}, of akl_triton "
                f"{fields['version']}; read it with that version"
            )
        stored = Stored(**fields)
        if first is None:
            first = stored
        expected = first._asdict()
        del expected["version"]
        _require(stored, expected, path)
    assert first is not None
    return first


def _require(stored: Stored, expected: Mapping[str, Any], where: Path) -> None:
    if different := stored.differences(expected):
        raise ValueError(
            f"{where}: expected pairs of the same {', '.join(expected)}, got {', '.join(different)}"
        )


def _tokens_of(files: Iterable[Path]) -> dict[str, int]:
    """The tokens of each document in the files."""
    found: dict[str, int] = {}
    for path in files:
        table = pq.read_table(path, columns=["document", "input_ids"])
        lengths = table["input_ids"].combine_chunks().value_lengths().to_pylist()
        for document, length in zip(table["document"].to_pylist(), lengths, strict=True):
            found[document] = found.get(document, 0) + length
    return found


def _sequences(
    writer: PairWriter,
    documents: Iterable[tuple[str, Sequence[int]]],
    context: int,
    progress: Callable[[int], None],
) -> Iterator[tuple[str, int, Sequence[int]]]:
    """(document, position, tokens) of the sequences that are still to be written."""
    done = writer.done
    for name, tokens in documents:
        start = done.get(name, 0)
        if start > len(tokens) or (start % context and start != len(tokens)):
            raise ValueError(
                f"context: expected that of the earlier start, {start} of the {len(tokens)} tokens "
                f"of document {name!r} being written, got {context}; take that, or another folder"
            )
        if start:
            progress(start)
        for position in range(start, len(tokens), context):
            yield name, position, tokens[position : position + context]


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    some: list[Any] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
