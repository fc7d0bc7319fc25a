"""Teachers on disk: what is read is what was written, whatever happened to the writer."""

from __future__ import annotations

import doctest
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import SparseTeacher, adaptive_kl, teacher_pairs
from akl_triton.integrations import PairCollator, teacher_of

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
import datasets
import pyarrow.parquet as pq

from akl_triton import offline
from akl_triton.offline import PairWriter, open_pairs, stored_in, write_pairs
from tests.support.tiny_models import tiny_model

V, K = 90, 7
# The documents that the subprocess below writes, in sequences of 16 tokens.
WRITING = f"""
import sys, time, torch
from akl_triton import offline, teacher_pairs
from akl_triton.offline import PairWriter

offline._ROW_GROUP_TOKENS = 16  # a file is in progress nearly all of the time
with PairWriter(sys.argv[1], k={K}, tokens_per_file=64) as writer:
    done = writer.done
    for document in range(40):
        name, tokens = str(document), 16 * (1 + document % 4)
        g = torch.Generator().manual_seed(document)
        ids = torch.randint({V}, (1, tokens), generator=g)
        logits = torch.randn(1, tokens, {V}, generator=g)
        for start in range(done.get(name, 0), tokens, 16):
            some = slice(start, start + 16)
            pairs = teacher_pairs(logits[:, some], {K})
            writer.append([name], ids[:, some], pairs, [start])
            print(name, flush=True)
            time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # datasets waits for its threads at the end of each epoch that is shuffled.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


class Tokenizer:
    """Of which a store needs the vocabulary alone."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def some_pairs(rows: int = 6, length: int = 5, k: int = K) -> tuple[Tensor, Tensor, SparseTeacher]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (rows, length), generator=g)
    logits = 3.0 * torch.randn(rows, length, V, generator=g)
    return ids, logits, teacher_pairs(logits, k)


def written(folder: Path, rows: int = 6, **options: Any) -> tuple[Tensor, Tensor, SparseTeacher]:
    ids, logits, pairs = some_pairs(rows)
    with PairWriter(folder, k=K, **options) as writer:
        writer.append([str(i) for i in range(rows)], ids, pairs)
    return ids, logits, pairs


def table_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of the files, in the order of their names."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.parquet")):
        found += pq.read_table(path).to_pylist()
    return found


# ---- what is written


def test_rows_are_what_was_appended(tmp_path):
    ids, logits, pairs = written(tmp_path, tokens_per_file=12)
    assert pairs.log_tail is not None
    for streaming in (False, True):
        rows = list(open_pairs(tmp_path, streaming=streaming))
        assert [row["document"] for row in rows] == list("012345")
        for i, row in enumerate(rows):
            assert torch.equal(row["input_ids"], ids[i])
            assert torch.equal(row["teacher_ids"].int(), pairs.ids[i])
            assert torch.equal(row["teacher_log_probs"], pairs.log_probs[i].half().float())
            assert torch.equal(row["teacher_log_tail"], pairs.log_tail[i])
            assert row["teacher_temperature"] == 1.0 and row["position"] == 0
    batch = PairCollator()(rows)
    assert batch["teacher_log_probs"].dtype == torch.float16
    student = torch.randn(6, 5, V)
    found, exact = (adaptive_kl(student, x) for x in (teacher_of(batch), pairs))
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0.0)
    assert adaptive_kl(student, logits) > exact


def test_files_are_plain_parquet(tmp_path):
    """Others read them without this library: the types of the columns, and how they are packed."""
    written(tmp_path, temperature=1.0, tokenizer=Tokenizer("a", "b"))
    (path,) = tmp_path.iterdir()
    schema = pq.read_schema(path)
    assert (
        str(schema.field("teacher_ids").type)
        == f"list<element: fixed_size_list<element: int32>[{K}]>"
    )
    assert "halffloat" in str(schema.field("teacher_log_probs").type)
    assert json.loads(schema.metadata[b"akl_triton"])["k"] == K
    of_columns = {
        x["path_in_schema"]: x for x in pq.read_metadata(path).row_group(0).to_dict()["columns"]
    }
    assert all(x["compression"] == "ZSTD" for x in of_columns.values())
    for name in ("teacher_ids.list.element.list.element", "teacher_log_tail.list.element"):
        assert "BYTE_STREAM_SPLIT" in of_columns[name]["encodings"]
    plain = datasets.load_dataset("parquet", data_dir=str(tmp_path), split="train")
    assert plain.num_rows == 6 and len(plain[0]["teacher_ids"][0]) == K


def test_fewer_pairs_and_flat_rows(tmp_path):
    """A token without pairs, and one whose p are all the same, which fp16 rounds alike."""
    ids = torch.arange(K).repeat(1, 2, 1)
    log_probs = torch.full((1, 2, K), -3.9004).float()
    ids[0, 1] = -1
    tail = torch.tensor([[1.0 - K * 0.02024, 1.0]]).log()
    with PairWriter(tmp_path, k=K) as writer:
        writer.append(["a"], torch.tensor([[1, 2]]), SparseTeacher(ids, log_probs, tail))
    (row,) = open_pairs(tmp_path, streaming=True)
    assert row["teacher_ids"].tolist() == [list(range(K)), [-1] * K]
    assert torch.equal(row["teacher_log_tail"], tail[0])
    teacher_of(PairCollator()([row]))


def test_padding_is_not_stored(tmp_path):
    ids, _, pairs = some_pairs(2)
    with PairWriter(tmp_path, k=K) as writer:
        writer.append(["a", "b"], ids, pairs, lengths=[3, 5])
        writer.append(["a", "c"], ids, pairs, positions=[3, 0], lengths=[1, 2])
        assert writer.done == {"a": 4, "b": 5, "c": 2}
    rows = table_of(tmp_path)
    assert [(row["document"], row["position"], len(row["teacher_ids"])) for row in rows] == [
        *(("a", 0, 3), ("b", 0, 5), ("a", 3, 1), ("c", 0, 2))
    ]


def test_files_are_bounded(tmp_path):
    ids, _, pairs = some_pairs(6)
    with PairWriter(tmp_path, k=K, tokens_per_file=10) as writer:
        writer.append(list("abcdef"), ids, pairs)
        assert len(list(tmp_path.glob("*.parquet"))) == 3
    assert [pq.read_metadata(path).num_rows for path in sorted(tmp_path.iterdir())] == [2, 2, 2]


# ---- interruptions


def kill_after(folder: Path, sequences: int, seconds: float) -> int:
    """A process that is killed some time after it has appended so many; its exit status."""
    command = [sys.executable, "-c", WRITING, str(folder), "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(sequences):
            assert process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        return process.wait()


def test_nothing_is_lost_or_doubled_by_kills(tmp_path, monkeypatch):
    """A writer that is killed several times writes the rows of one that is not."""
    draw = random.Random(0)
    counts = []
    for _ in range(3):
        status = kill_after(tmp_path / "killed", draw.randrange(9, 20), draw.uniform(0.0, 0.01))
        assert status == -signal.SIGKILL
        counts.append(len(table_of(tmp_path / "killed")))
    assert 0 < counts[0] < counts[1] < counts[2] < 100
    for folder in ("killed", "whole"):
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / folder), "0"])
        monkeypatch.setattr(offline, "_ROW_GROUP_TOKENS", offline._ROW_GROUP_TOKENS)
        exec(WRITING, {})
    rows = table_of(tmp_path / "whole")
    assert len(rows) == 100
    assert table_of(tmp_path / "killed") == rows
    assert not list((tmp_path / "killed").glob(".*"))


def test_an_exception_keeps_what_was_appended(tmp_path):
    ids, _, pairs = some_pairs(1)
    with pytest.raises(KeyboardInterrupt), PairWriter(tmp_path, k=K) as writer:
        writer.append(["a"], ids, pairs)
        raise KeyboardInterrupt
    assert PairWriter(tmp_path, k=K).done == {"a": 5}


def test_a_file_in_progress_is_not_read(tmp_path):
    written(tmp_path / "pairs")
    (path,) = (tmp_path / "pairs").iterdir()
    (tmp_path / "pairs" / ".pairs-000001.parquet.part").write_bytes(path.read_bytes()[:100])
    assert len(open_pairs(tmp_path / "pairs")) == 6
    assert datasets.load_dataset("parquet", data_dir=str(tmp_path / "pairs"))["train"].num_rows == 6


# ---- reading


@pytest.mark.parametrize("streaming", [False, True], ids=["random access", "streaming"])
def test_every_row_once_in_an_order_of_the_seed(tmp_path, streaming):
    ids, _, pairs = some_pairs(40)
    with PairWriter(tmp_path, k=K, tokens_per_file=40) as writer:
        writer.append([str(i) for i in range(40)], ids, pairs)
    dataset = open_pairs(tmp_path, streaming=streaming)

    def order(seed: int, epoch: int = 0) -> list[int]:
        shuffled = dataset.shuffle(seed=seed, **({"buffer_size": 16} if streaming else {}))
        if streaming:
            shuffled.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(shuffled, batch_size=4, collate_fn=list)
        return [int(row["document"]) for rows in loader for row in rows]

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(3)}) == 3
    assert all(sorted(order(seed)) == list(range(40)) for seed in range(3))
    if streaming:
        assert order(0, epoch=1) != order(0) and sorted(order(0, epoch=1)) == list(range(40))


def test_a_trainer_learns_from_disk(tmp_path):
    """As from the same pairs in memory."""
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    from akl_triton.integrations.transformers import DistillationTrainer

    teacher = tiny_model("llama", seed=1)
    texts = [(str(i), torch.arange(i, 2 * i + 6).tolist()) for i in range(6)]
    with PairWriter(tmp_path / "pairs", k=K, temperature=2.0, teacher=teacher) as writer:
        write_pairs(writer, teacher, texts, context=8, batch=4)
    in_memory = []
    for _, tokens in texts:
        for start in range(0, len(tokens), 8):
            ids = torch.tensor(tokens[start : start + 8])
            with torch.no_grad():
                pairs = teacher_pairs(teacher(input_ids=ids[None]).logits[0], K, 2.0)
            columns = (ids, pairs.ids, pairs.log_probs.half(), pairs.log_tail)
            names = ("input_ids", "teacher_ids", "teacher_log_probs", "teacher_log_tail")
            in_memory.append(dict(zip(names, columns, strict=True)))
    results = []
    for rows in (
        open_pairs(tmp_path / "pairs", teacher=teacher),
        open_pairs(tmp_path / "pairs", streaming=True),
        in_memory,
    ):
        student = tiny_model("llama")
        args = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=3,
            train_sampling_strategy="sequential",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        DistillationTrainer(
            student, args, train_dataset=rows, data_collator=PairCollator(), temperature=2.0
        ).train()
        results.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    for found in results[:2]:
        torch.testing.assert_close(found, results[2], rtol=0.0, atol=1e-6)


# ---- the teacher that writes


def test_write_pairs(tmp_path):
    """Of every position those of a run over its sequence alone, also after an interruption."""
    teacher = tiny_model("llama", seed=1)
    texts = [(str(i), list(range(5, 10 + 7 * i))) for i in range(4)]
    seen: list[int] = []

    def interrupt(tokens: int) -> None:
        seen.append(tokens)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        PairWriter(tmp_path, k=K, teacher=teacher, tokens_per_file=12) as writer,
    ):
        write_pairs(writer, teacher, texts, context=8, batch=3, progress=interrupt)
    assert 0 < sum(writer.done.values()) < sum(len(tokens) for _, tokens in texts)
    ran: list[int] = []
    hook = teacher.register_forward_pre_hook(
        lambda _, args, kwargs: ran.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    progress: list[int] = []
    with PairWriter(tmp_path, k=K, teacher=teacher, tokens_per_file=12) as again:
        write_pairs(again, teacher, texts, context=8, batch=3, progress=progress.append)
    hook.remove()
    total = sum(len(tokens) for _, tokens in texts)
    assert sum(progress) == total and sum(ran) == total - sum(seen)
    rows = table_of(tmp_path)
    tokens: dict[str, list[int]] = {}
    for row in rows:
        found = tokens.setdefault(row["document"], [])
        assert row["position"] == len(found)
        found += row["input_ids"]
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor(row["input_ids"])[None]).logits[0]
        pairs = teacher_pairs(logits, K)
        assert row["teacher_ids"] == pairs.ids.tolist()
        torch.testing.assert_close(
            torch.tensor(row["teacher_log_probs"]), pairs.log_probs, rtol=1e-3, atol=1e-4
        )
    assert tokens == dict(texts)
    longer = [("1", [*range(5, 17), *range(30)])]
    with (
        pytest.raises(ValueError, match=r"^context: expected that of the earlier start, 12 of"),
        PairWriter(tmp_path, k=K, teacher=teacher) as other,
    ):
        write_pairs(other, teacher, longer, context=7)


# ---- what does not fit


def test_pairs_of_another_are_refused(tmp_path):
    first, second = tiny_model("llama"), tiny_model("llama", seed=1)
    tokens = Tokenizer("a", "b")
    written(tmp_path, tokenizer=tokens, teacher=first)
    assert stored_in(tmp_path).k == K
    open_pairs(tmp_path, tokenizer=Tokenizer("a", "b"), teacher=first.bfloat16())
    swapped = Tokenizer("b", "a")
    for given, message in (
        ({"tokenizer": swapped}, "same schema, tokenizer, got tokenizer '"),
        ({"teacher": second}, "same schema, teacher, got teacher '"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pairs(tmp_path, **given)
    same: dict[str, Any] = {"k": K, "tokenizer": tokens, "teacher": first}
    PairWriter(tmp_path, **same)
    for given, message in (
        ({"k": K + 1}, f"got k {K} in place of {K + 1}"),
        ({"temperature": 2.0}, "got temperature 1.0 in place of 2.0"),
        ({"tokenizer": swapped, "teacher": second}, "got tokenizer '.*', teacher '.*' in place"),
    ):
        with pytest.raises(ValueError, match=message):
            PairWriter(tmp_path, **{**same, **given})


def test_files_that_do_not_belong_together(tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b", temperature=1.0, tokenizer=Tokenizer("a"))
    (other,) = (tmp_path / "b").iterdir()
    other.rename(tmp_path / "a" / "pairs-000001.parquet")
    with pytest.raises(ValueError, match=r"pairs-000001.parquet: .* got tokenizer '\w+' in place"):
        open_pairs(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"^folder: expected one with files pairs-\*"):
        open_pairs(tmp_path / "b")
    table = pq.read_table(tmp_path / "a" / "pairs-000000.parquet")
    newer = {**json.loads(table.schema.metadata[b"akl_triton"]), "schema": 2, "more": 1}
    for metadata, message in (
        ({b"akl_triton": json.dumps(newer)}, "expected schema 1, got 2, of akl_triton"),
        ({}, "got one without its metadata"),
    ):
        pq.write_table(table.replace_schema_metadata(metadata), other)
        with pytest.raises(ValueError, match=message):
            other.rename(tmp_path / "b" / "pairs-000000.parquet")
            open_pairs(tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"positions": [0, 5]}, ValueError, "positions: expected 0 for document 'b', behind"),
        ({"documents": ["a", "a"]}, ValueError, "positions: expected 5 for document 'a'"),
        ({"documents": ["a"]}, ValueError, "documents: expected 2 values"),
        ({"lengths": [0, 5]}, ValueError, "lengths: expected 1 to 5 tokens, got 0"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"teacher: expected pair"),
        ({"input_ids": torch.zeros(2, dtype=torch.long)}, ValueError, r"input_ids: expected \[B,"),
        ({"teacher": None}, TypeError, "teacher: expected a SparseTeacher, got None"),
        ({"temperature": 2.0}, ValueError, "teacher: expected pairs of the temperature 1"),
        ({"outside": "renormalise"}, ValueError, "teacher: expected pairs with outside='bucket'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_batches_that_do_not_fit(tmp_path, given, kind, message):
    ids, logits, pairs = some_pairs(2)
    if "temperature" in given:
        given = {"teacher": teacher_pairs(logits, K, given["temperature"])}
    elif "outside" in given:
        given = {"teacher": SparseTeacher(pairs.ids, pairs.log_probs, **given)}
    batch = {"documents": ["a", "b"], "input_ids": ids, "teacher": pairs, **given}
    with PairWriter(tmp_path, k=K) as writer:
        with pytest.raises(kind, match=f"^{message}"):
            writer.append(**batch)
        assert writer.done == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", [{"k": 0}, {"k": 2000}, {"temperature": 0.0}, {"tokens_per_file": 0}], ids=str
)
def test_bad_arguments(tmp_path, given):
    with pytest.raises(ValueError, match=f"^{next(iter(given))}: expected"):
        PairWriter(tmp_path, **{"k": K, **given})


def test_a_second_writer_overwrites_nothing(tmp_path):
    ids, _, pairs = some_pairs(1)
    with (
        pytest.raises(FileExistsError, match="another PairWriter has written"),
        PairWriter(tmp_path, k=K) as first,
        PairWriter(tmp_path, k=K) as second,
    ):
        first.append(["a"], ids, pairs)
        second.append(["b"], ids, pairs)
    assert [row["document"] for row in table_of(tmp_path)] == ["b"]


def test_examples_of_the_docstrings():
    results = doctest.testmod(offline)
    assert results.attempted > 0 and results.failed == 0
