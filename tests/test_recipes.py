"""The code of docs/recipes.md: what it computes, and that what it warns of is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from akl_triton import (
    SparseTeacher,
    adaptive_kl,
    distillation_loss,
    forward_kl,
    linear_adaptive_kl,
    linear_forward_kl,
    reverse_kl,
    teacher_pairs,
)
from akl_triton.reference import reference_adaptive_kl
from tests.support.logits import generator
from tests.support.near import assert_near
from tests.support.trace import Trace

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROCESSES = 2


def example(name: str) -> ModuleType:
    """The file of examples/ as a module, which does not run its `main`."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- in two processes

SCRIPTS = ("context_parallel", "vocabulary_shards")
H, V = 12, 50

# Two rows of documents. Shards are cut at 4, 8 and 12: within a document, and not where one ends.
DOCUMENTS = ((3, 6, 7), (10, 6))
L = sum(DOCUMENTS[0])


def make_packed() -> dict[str, Tensor]:
    g = generator(0)
    labels = torch.randint(V, (2, L), generator=g)
    labels[:, :4] = -100  # so that the shards have different numbers of tokens that count
    labels[0, 12:] = -100
    return {
        "hidden": torch.randn(2, L, H, generator=g),
        "teacher_logits": 4.0 * torch.randn(2, L, V, generator=g),
        "labels": labels,
        "position_ids": torch.stack(
            [torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS]
        ),
    }


def make_head() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(H, V, bias=False)


def of_context(rank: int) -> dict[str, Any]:
    """Loss of this rank's shard, its gradient, that of the lm_head under DDP, and wrong ones."""
    recipe, packed, head = example("context_parallel"), make_packed(), make_head()
    targets = recipe.next_labels(packed["labels"], packed["position_ids"])
    hidden, teacher, labels, cut = (
        recipe.shard(x, rank, PROCESSES)
        for x in (packed["hidden"], packed["teacher_logits"], targets, packed["labels"])
    )
    logits = head(hidden).detach().requires_grad_()
    loss = recipe.loss_of_shard(logits, teacher, labels)
    loss.backward()

    wrapped = nn.parallel.DistributedDataParallel(head)
    (PROCESSES * recipe.loss_of_shard(wrapped(hidden), teacher, labels)).backward()

    count = (targets != -100).sum()
    wrong = {
        "shifted after the cut": adaptive_kl(logits, teacher, cut, shift=1, num_items=count),
        "mean of means": adaptive_kl(logits, teacher, labels) / PROCESSES,
        "documents are not told apart": adaptive_kl(
            logits,
            teacher,
            recipe.shard(nn.functional.pad(packed["labels"][:, 1:], (0, 1), value=-100), rank, 2),
            num_items=count,
        ),
    }
    return {
        "loss": loss.detach(),
        "gradient": logits.grad,
        "of the head": head.weight.grad,
        "wrong": {name: torch.autograd.grad(value, logits)[0] for name, value in wrong.items()},
    }


PADDED, VOCAB_SIZE = V + 4, V + 1
LARGE = (512, 2048)
BYTES = 4 * LARGE[0] * LARGE[1] // PROCESSES  # of one side, on each rank
# Rows, of which one rank may have more than the other or all, and dtypes.
SHARDED = [(7, torch.float32), (8, torch.float32), (1, torch.float32), (7, torch.bfloat16)]


def make_logits(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """student and teacher [n, PADDED], labels [n]"""
    g = generator(n)
    student, teacher = (4.0 * torch.randn(2, n, PADDED, generator=g)).to(dtype)
    labels = torch.randint(VOCAB_SIZE, (n,), generator=g)
    labels[2:4] = -100
    return student, teacher, labels


def my_columns(rank: int, *logits: Tensor) -> list[Tensor]:
    return [x.chunk(PROCESSES, dim=1)[rank].contiguous() for x in logits]


def of_vocabulary(rank: int) -> dict[str, Any]:
    recipe = example("vocabulary_shards")
    results: dict[str, Any] = {}
    for n, dtype in SHARDED:
        *logits, labels = make_logits(n, dtype)
        student, teacher = my_columns(rank, *logits)
        student.requires_grad_()
        loss = recipe.loss_of_rows(student, teacher, labels, VOCAB_SIZE)
        loss.backward()
        results[f"{n} rows of {dtype}"] = loss.detach(), student.grad

    student, teacher, labels = make_logits(7, torch.float32)
    (columns,) = my_columns(rank, student)
    rows = recipe.whole_rows(columns.requires_grad_())
    rows.sum().backward()  # whose gradient has strides of 0
    results["rows"] = rows.detach(), columns.grad, recipe.of_my_rows(labels)
    results["of DTensor"] = of_dtensor(rank)

    student, teacher = my_columns(rank, *torch.randn(2, *LARGE, generator=generator(0)))
    student.requires_grad_()
    with Trace() as trace:
        recipe.loss_of_rows(student, teacher, torch.arange(LARGE[0]), LARGE[1]).backward()
    results["allocations"] = trace.allocations(BYTES)
    return results


def of_dtensor(rank: int) -> tuple[Tensor, Tensor | None]:
    """The same exchange by DTensor, as docs/recipes.md has it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    *logits, labels = make_logits(7, torch.float32)
    student, teacher = my_columns(rank, *logits)
    student.requires_grad_()
    mine = [
        DTensor.from_local(x, mesh, [Shard(-1)]).redistribute(placements=[Shard(0)]).to_local()
        for x in (student, teacher)
    ]
    loss = adaptive_kl(
        mine[0],
        mine[1],
        labels.chunk(PROCESSES)[rank],
        num_items=(labels != -100).sum(),
        vocab_size=VOCAB_SIZE,
    )
    loss.backward()
    return loss.detach(), student.grad


def in_a_process(rank: int, ports: list[int], folder: str) -> None:
    """Each script as torchrun starts it, and then the rest.

    Each has a port: a second process group in the store of the first may find its addresses there.
    """
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
    }
    for name, port in zip(SCRIPTS, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        printed = Path(folder, f"{name}, {rank}")
        with printed.open("w") as file, contextlib.redirect_stdout(file):
            example(name).main()
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    results = {"context": of_context(rank), "vocabulary": of_vocabulary(rank)}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have printed and saved."""
    if not dist.is_available():
        pytest.skip("torch without distributed")
    made: Path = tmp_path_factory.mktemp("recipes")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in SCRIPTS]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        in_a_process, (ports, str(made)), nprocs=PROCESSES
    )
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """The results of each rank."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def test_what_the_scripts_print(folder: Path) -> None:
    """Only rank 0 prints, and errors that are those of rounding, but for the wrong way."""
    context, vocabulary = ((folder / f"{name}, 0").read_text() for name in SCRIPTS)
    assert all((folder / f"{name}, 1").read_text() == "" for name in SCRIPTS)
    number = r"(\d\.\de[-+]\d+)"
    right, wrong = re.findall(rf"gradient off by {number} of it", context)
    assert float(right) < 1e-5 and float(wrong) > 0.1
    (error,) = re.findall(rf"gradients off by {number} of them", vocabulary)
    assert float(error) < 1e-5
    for total, whole in re.findall(r"loss (\S+) of (\S+), ", context + vocabulary)[::2]:
        assert float(total) == pytest.approx(float(whole), abs=1e-3)


# ---- context parallel, packed sequences


def one_document_at_a_time() -> tuple[Tensor, Tensor, Tensor]:
    """The mean over all tokens, its gradient, and that of the lm_head."""
    packed, head = make_packed(), make_head()
    logits = head(packed["hidden"])
    logits.retain_grad()
    total, count = torch.zeros(()), 0
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            labels = packed["labels"][row, here]
            total = total + adaptive_kl(
                logits[row, here],
                packed["teacher_logits"][row, here],
                labels,
                shift=1,
                reduction="sum",
            )
            count += int((labels[1:] != -100).sum())
            start += length
    loss = total / count
    loss.backward()
    assert logits.grad is not None and head.weight.grad is not None
    return loss.detach(), logits.grad, head.weight.grad


def test_shards_of_packed_rows(found: list[dict[str, Any]]) -> None:
    """The sum of the shards is the mean over the documents, loss and gradients."""
    shard = example("context_parallel").shard
    loss, gradient, of_the_head = one_document_at_a_time()
    assert_near(sum(x["context"]["loss"] for x in found), loss)
    for rank, results in enumerate(found):
        assert_near(results["context"]["gradient"], shard(gradient, rank, PROCESSES))
        assert_near(results["context"]["of the head"], of_the_head)


@pytest.mark.parametrize(
    "way", ["shifted after the cut", "mean of means", "documents are not told apart"]
)
def test_what_goes_wrong_without(found: list[dict[str, Any]], way: str) -> None:
    """The loss may look right; the gradient is not."""
    shard = example("context_parallel").shard
    _, gradient, _ = one_document_at_a_time()
    wrong = torch.cat([x["context"]["wrong"][way] for x in found])
    exact = torch.cat([shard(gradient, rank, PROCESSES) for rank in range(PROCESSES)])
    assert (wrong - exact).norm() > 0.1 * exact.norm()


# ---- shards of the vocabulary


@pytest.mark.parametrize(("n", "dtype"), SHARDED)
def test_vocabulary_shards(found: list[dict[str, Any]], n: int, dtype: torch.dtype) -> None:
    student, teacher, labels = make_logits(n, dtype)
    loss = adaptive_kl(student.requires_grad_(), teacher, labels, vocab_size=VOCAB_SIZE)
    loss.backward()
    assert student.grad is not None
    results = [x["vocabulary"][f"{n} rows of {dtype}"] for x in found]
    assert_near(sum(of_rank for of_rank, _ in results), loss.detach())
    for rank, (_, gradient) in enumerate(results):
        assert gradient.dtype == dtype
        assert_near(gradient, *my_columns(rank, student.grad))


def test_whole_rows(found: list[dict[str, Any]]) -> None:
    student, _, labels = make_logits(7, torch.float32)
    rows, gradients, of_my_rows = zip(*(x["vocabulary"]["rows"] for x in found), strict=True)
    assert [len(x) for x in rows] == [4, 3]
    assert torch.equal(torch.cat(rows), student)
    assert torch.equal(torch.cat(of_my_rows), labels)
    assert all(torch.equal(x, torch.ones(7, PADDED // PROCESSES)) for x in gradients)


def test_dtensor_does_the_same(found: list[dict[str, Any]]) -> None:
    for results in found:
        loss, gradient = results["vocabulary"]["of DTensor"]
        expected, of_recipe = results["vocabulary"][f"7 rows of {torch.float32}"]
        assert_near(loss, expected)
        assert_near(gradient, of_recipe)


def test_no_rank_holds_all_logits(found: list[dict[str, Any]]) -> None:
    """For each side what is received and its rows; for the gradient what is sent and received."""
    for results in found:
        sizes = results["vocabulary"]["allocations"]
        assert set(sizes) == {BYTES} and len(sizes) == 6


# ---- draft vocabularies

N, OF_TEACHER, OF_DRAFT = 40, 300, 70


def make_draft(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = generator(0)
    recipe = example("draft_vocabulary")
    text = (OF_TEACHER * torch.rand(4096, generator=g) ** 3).long()
    t2d, d2t = recipe.vocabulary_maps(text, OF_TEACHER, OF_DRAFT)
    return {
        "hidden": torch.randn(N, H, generator=g).to(dtype),
        "weight": torch.randn(OF_DRAFT, H, generator=g).to(dtype).requires_grad_(),
        "teacher_hidden": torch.randn(N, 2 * H, generator=g).to(dtype),
        "teacher_weight": torch.randn(OF_TEACHER, 2 * H, generator=g).to(dtype),
        "labels": torch.randint(-1, OF_TEACHER, (N,), generator=g).where(
            torch.rand(N, generator=g) > 0.2, -100
        ),
        "text": text,
        "t2d": t2d,
        "d2t": d2t,
    }


def test_the_maps_are_those_of_eagle() -> None:
    """The most frequent tokens; both maps, and the labels, agree."""
    draft, recipe = make_draft(), example("draft_vocabulary")
    t2d, d2t, text, labels = (draft[x] for x in ("t2d", "d2t", "text", "labels"))
    of_teacher = torch.arange(OF_DRAFT) + d2t
    assert torch.equal(of_teacher, t2d.nonzero().flatten()) and len(d2t) == OF_DRAFT
    counts = text.bincount(minlength=OF_TEACHER)
    assert counts[t2d].min() >= counts[~t2d].max()

    found = recipe.draft_labels(labels, t2d)
    has = (labels >= 0) & t2d[labels.clamp(min=0)]
    assert 0 < has.sum() < N
    assert torch.equal(of_teacher[found[has]], labels[has])
    assert bool((found[~has] == -100).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draft_vocabulary(dtype: torch.dtype) -> None:
    """Rows of the lm_head: the teacher's probabilities of the draft's tokens, renormalised."""
    draft, recipe = make_draft(dtype), example("draft_vocabulary")
    in_draft = draft["teacher_weight"][draft["t2d"]]
    labels = recipe.draft_labels(draft["labels"], draft["t2d"])
    assert in_draft.dtype == dtype
    loss = linear_adaptive_kl(
        draft["hidden"], draft["weight"], draft["teacher_hidden"], in_draft, labels
    )
    loss.backward()
    gradient = draft["weight"].grad
    assert gradient is not None and gradient.dtype == dtype

    whole = draft["teacher_hidden"] @ draft["teacher_weight"].T
    p = whole.double().softmax(-1)[:, draft["t2d"]]
    student = draft["hidden"] @ draft["weight"].detach().T
    exact = reference_adaptive_kl(student, (p / p.sum(-1, keepdim=True)).log())
    counts = (labels != -100).double()
    torch.testing.assert_close(
        loss.double(), (exact.loss * counts).sum() / counts.sum(), rtol=1e-5, atol=0.0
    )
    rows = exact.grad * (counts / counts.sum())[:, None]
    expected = rows.mT @ draft["hidden"].double()
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_has_the_width_of_the_teacher() -> None:
    """Beside logits that are made whole and then restricted."""
    n, size, few = 256, 4096, 512
    g = generator(0)
    hidden, teacher_hidden = torch.randn(2, n, H, generator=g)
    weight = torch.randn(few, H, generator=g, requires_grad=True)
    teacher_weight = torch.randn(size, H, generator=g)
    t2d = torch.zeros(size, dtype=torch.bool).index_fill(0, torch.arange(few) * 8, True)
    in_draft = teacher_weight[t2d]
    with Trace() as ours:
        linear_forward_kl(hidden, weight, teacher_hidden, in_draft).backward()
    with Trace() as dense:
        forward_kl(hidden @ weight.T, (teacher_hidden @ teacher_weight.T)[:, t2d]).backward()
    assert dense.allocations(4 * n * size)
    assert not ours.allocations(4 * n * size) and ours.peak() < 4 * n * size


def test_draft_first_keeps_the_mass_of_other_tokens() -> None:
    """Total variation is the rate of rejection; forward KL weighs tokens by the draft's mass."""
    draft, recipe = make_draft(), example("draft_vocabulary")
    t2d = draft["t2d"]
    weight = recipe.draft_first(draft["teacher_weight"], t2d)
    teacher = draft["teacher_hidden"] @ weight.T
    student = (draft["hidden"] @ draft["weight"].detach().T).requires_grad_()
    p = (draft["teacher_hidden"] @ draft["teacher_weight"].T).double().softmax(-1)[:, t2d]
    q, mass = student.double().softmax(-1), p.sum(-1)
    assert float(mass.min()) < 0.5 < float(mass.max())

    def loss_and_gradient(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss.sum(), student, retain_graph=True)[0]

    accepted = torch.minimum(p, q).sum(-1)
    for ours, exact in (
        (
            distillation_loss(student, teacher, divergence="total_variation", reduction="none"),
            1.0 - accepted,
        ),
        (
            forward_kl(student, teacher, reduction="none"),
            mass * (p / mass[:, None] * (p / mass[:, None] / q).log()).sum(-1) + mass * mass.log(),
        ),
        (
            reverse_kl(student, teacher, reduction="none"),
            reverse_kl(student, teacher[:, :OF_DRAFT], reduction="none") - mass.log(),
        ),
    ):
        for x, y in zip(loss_and_gradient(ours), loss_and_gradient(exact), strict=True):
            assert_near(x, y)


def test_pairs_of_a_draft() -> None:
    """Pairs of the draft's own logits have their minimum where the dense loss has it. Those of the
    whole vocabulary have not: what other tokens have is then wanted of the draft's."""
    draft = make_draft()
    t2d = draft["t2d"]
    whole = draft["teacher_hidden"] @ draft["teacher_weight"].T
    restricted = (draft["teacher_hidden"] @ draft["teacher_weight"][t2d].T).requires_grad_()
    k = 20
    pairs = teacher_pairs(restricted, k)
    (gradient,) = torch.autograd.grad(forward_kl(restricted, pairs, reduction="sum"), restricted)
    assert gradient.abs().max() < 1e-5

    of_whole = whole.log_softmax(-1)[:, t2d].gather(1, pairs.ids.long())
    with_others = SparseTeacher(pairs.ids, of_whole)  # the bucket is all that is left of 1
    loss = forward_kl(restricted, with_others, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, restricted)
    assert gradient.abs().max() > 0.1
