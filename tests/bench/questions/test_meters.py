"""The meters of bench/: what they count is what can be counted by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("matplotlib")

from akl_triton import adaptive_kl
from akl_triton.reference import authors_adaptive_kl
from bench.inputs import real_logits
from bench.questions import growth, operators, traffic

compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not counted"
)

# ---------------------------------------------------------------- operators

X = 4 * 8 * 4  # bytes of the fp32 [4, 8] tensors x, y, z
INDEX = 4 * 8 * 8  # of int64
PICKED = torch.zeros(4, 2, dtype=torch.int64)

OPERATORS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], int, int]] = {
    "two inputs": (lambda x, y, z: x + y, 2 * X, X),
    "the same input twice": (lambda x, y, z: x * x, X, X),
    "both halves": (lambda x, y, z: x[:2] + x[2:], X, X // 2),
    "overlapping views": (lambda x, y, z: x[:3] + x[1:], X, 3 * X // 4),
    "part of a tensor": (lambda x, y, z: x[:1] + y[:1], X // 2, X // 4),
    "an expanded input": (lambda x, y, z: x[:, :1].expand(4, 8) + y, X + X // 8, X),
    "views": (lambda x, y, z: x.t().reshape(2, 16)[1:].detach().expand(3, 1, 16), X, X),
    "in place": (lambda x, y, z: x.add_(y), 2 * X, X),
    "out": (lambda x, y, z: torch.add(x, y, out=z), 2 * X, X),
    "out in place": (lambda x, y, z: torch.add(x, y, out=x), 2 * X, X),
    "copied over": (lambda x, y, z: x.copy_(y), X, X),
    "filled": (lambda x, y, z: x.fill_(1.0), 0, X),
    "allocated": (lambda x, y, z: torch.empty_like(x), 0, 0),
    "allocated and cleared": (lambda x, y, z: torch.zeros(4, 8), 0, X),
    "reduced": (lambda x, y, z: x.sum(-1), X, X // 8),
    "two outputs": (lambda x, y, z: x.sort(-1), X, X + INDEX),
    "picked": (lambda x, y, z: y.gather(-1, PICKED), 4 * 2 * (4 + 8), 4 * 2 * 4),
    "converted": (lambda x, y, z: x.bfloat16(), X, X // 2),
    "list of inputs": (lambda x, y, z: torch.cat([x, y]), 2 * X, 2 * X),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_bytes_of_an_operator(name: str) -> None:
    run, read, written = OPERATORS[name]
    x, y, z = torch.zeros(3, 4, 8).unbind()
    x, y, z = x.clone(), y.clone(), z.clone()
    with operators.OperatorMeter() as meter:
        run(x, y, z)
    total = meter.total()
    assert (total.read, total.written) == (read, written)


def test_bytes_of_large_tensors() -> None:
    small, large = torch.zeros(8), torch.zeros(64, 8)
    with operators.OperatorMeter(large=large.nbytes) as meter:
        small + small
        large + small
    total = meter.total()
    assert total.large == 2 * large.nbytes
    assert total.read + total.written == 2 * large.nbytes + 3 * small.nbytes


def test_backward_is_counted() -> None:
    """exp: x read, y written; backward: grad and y read, the product written."""
    x = torch.zeros(4, 8, requires_grad=True)
    with operators.OperatorMeter() as meter:
        x.exp().backward(torch.ones(4, 8))
    assert meter.operators["exp"] == operators.Moved(1, X, X, 2 * X)
    assert meter.operators["mul"] == operators.Moved(1, 2 * X, X, 3 * X)


def test_what_a_mode_cannot_see_is_refused() -> None:
    with operators.OperatorMeter(), pytest.raises(ValueError, match=r"measure akl_triton\.eager"):
        adaptive_kl(torch.zeros(1, 8), torch.zeros(1, 8), backend="torch")


@compiled
def test_operators_beside_each_other() -> None:
    """Ours moves and holds a small part of what the authors' code does."""
    student, teacher = torch.randn(2, 4, 4_096, generator=torch.Generator().manual_seed(0))
    found = [
        operators.measure(subject, student.bfloat16(), teacher.bfloat16())
        for subject in operators.subjects()
        if subject.computes == "adaptive_kl"
    ]
    ours, torch_backend, authors = found
    assert 6 < ours["bytes_in_kernels"] <= ours["bytes"] < 40
    assert ours["temporaries"] < 0.1
    assert authors["bytes_in_kernels"] == torch_backend["bytes_in_kernels"] == 0
    assert authors["bytes"] > 400
    assert authors["temporaries"] > 20
    data = {"arch": "sm_90", "rows": 4, "vocabulary": 4_096, "subjects": found}
    table = operators.markdown(json.loads(json.dumps(data)))
    assert f"| AKL | authors, eager | {authors['bytes']:.1f} |" in table
    assert "| sort | 1 | 4.0 | 12.0 |" in table


# ---------------------------------------------------------------- traffic

V = 36_864  # too long a row to be held on chip


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    """bf16: a teacher that is sure, one that is not, one whose logits at the boundary all tie."""
    sure = torch.zeros(V)
    sure[7] = 20.0
    unsure = torch.linspace(-4.0, 4.0, V)[
        torch.randperm(V, generator=torch.Generator().manual_seed(0))
    ]
    tied = torch.zeros(V)
    teacher = torch.stack([sure, unsure, tied]).bfloat16()
    student = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    return student, teacher


@compiled
def test_scans_of_a_row(rows: tuple[Tensor, Tensor]) -> None:
    found = traffic.scans(*rows, temperature=1.0)
    sure, unsure, tied = found["boundary"]
    assert sure == 0.0
    assert unsure >= 1.0
    assert tied >= 1.0
    sure_cut, _, tied_cut = found["cut"]
    assert sure_cut == 0.0
    assert tied_cut >= 0.5  # half of the row's ties are in the head: read as far as there
    summary = traffic.summarise(found)
    assert summary["rows_without"] == pytest.approx(1 / 3)
    assert summary["max"] == max(b + c for b, c in zip(*found.values(), strict=True))


@compiled
def test_traffic_of_rows(rows: tuple[Tensor, Tensor]) -> None:
    """What must be moved is: both logits, and the gradient once."""
    cases = [traffic.case(*rows, temperature=1.0, synthetic=kind) for kind in (False, True)]
    case = cases[0]
    for phase, written in (("forward", 0.0), ("backward", 2.0), ("with_gradient", 2.0)):
        of_row = 100 / V  # bytes of a row's loss and state
        assert case[phase]["compulsory_read"] == pytest.approx(4.0, abs=of_row)
        assert case[phase]["compulsory_written"] == pytest.approx(written, abs=of_row)
        assert case[phase]["bytes_written"] == pytest.approx(written, abs=of_row)
        assert case[phase]["bytes_read"] >= 4.0
    forward, backward, both = case["forward"], case["backward"], case["both"]
    assert both["bytes_read"] == pytest.approx(forward["bytes_read"] + backward["bytes_read"])
    assert forward["launches"] == backward["launches"] == 1 / 3
    # Stages A and B each read both rows; R reads the teacher's as often as the scans say.
    assert forward["bytes_read"] == pytest.approx(2 * 4 + 2 * case["scans"]["mean"], rel=0.1)
    data = {"arch": "sm_90", "texts": ["objects"], "cases": cases}
    table = traffic.markdown(json.loads(json.dumps(data)))
    assert table.count(f"| {V:,} | bfloat16 | 1 |") == 2


# ---------------------------------------------------------------- logits


def test_resampling_to_the_same_vocabulary_changes_nothing() -> None:
    student, teacher = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    new_s, new_t = real_logits.resampled(student, teacher, 500, 500)
    torch.testing.assert_close(new_s, student)
    assert torch.equal(new_t, teacher)


def test_resampling_keeps_the_top_and_the_range() -> None:
    student, teacher = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    new_s, new_t = real_logits.resampled(student, teacher, 1_900, 2_000)
    assert new_s.shape == (3, 1_900)
    assert new_t.shape == (3, 2_000)
    for extreme in (torch.amax, torch.amin):
        assert torch.equal(extreme(new_t, -1), extreme(teacher, -1))
    # Ids keep their order: the top token stands as far along the row as it did.
    before, after = teacher.argmax(-1) / 500, new_t.argmax(-1) / 2_000
    torch.testing.assert_close(before, after, atol=0.1, rtol=0.0)


def test_logits_are_computed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def compute(rows: int, texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        calls.append((rows, texts))
        return torch.full((rows, 4), 1.0), torch.full((rows, 4), 2.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(real_logits, "version", lambda name: "1.0")
    monkeypatch.setattr(real_logits, "_compute", compute)
    for _ in range(2):
        student, teacher = real_logits.real_logits(5, ("objects",))
        assert torch.equal(student, torch.full((5, 4), 1.0))
        assert torch.equal(teacher, torch.full((5, 4), 2.0))
    assert len(calls) == 1
    real_logits.real_logits(6, ("objects",))
    real_logits.real_logits(5, ("types",))
    monkeypatch.setattr(real_logits, "version", lambda name: "1.1")
    real_logits.real_logits(5, ("objects",))
    assert len(calls) == 4


# ---------------------------------------------------------------- growth


def test_saved_bytes_of_known_graphs() -> None:
    student, teacher = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8)
    assert growth.saved_bytes(lambda s, t: s * t, student, teacher) == 0  # the inputs themselves
    assert growth.saved_bytes(lambda s, t: s.exp(), student, teacher) == X
    assert growth.saved_bytes(lambda s, t: s.exp().exp(), student, teacher) == 2 * X


@pytest.mark.parametrize("shape", [(2, 64), (2, 4_096), (200, 64)])
def test_saved_state_is_eight_floats_a_row(shape: tuple[int, int]) -> None:
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    ours = growth.saved_bytes(growth.LOSSES["PyTorch backend"], student, teacher)
    assert ours == 8 * 4 * shape[0]
    assert growth.saved_bytes(authors_adaptive_kl, student, teacher) > 20 * student.numel()


def test_flat_from() -> None:
    found = [
        {"vocabulary": v, "fixed": {"bytes": b}}
        for v, b in ((1, 10.0), (2, 12.0), (4, 10.2), (8, 9.8), (16, 10.0))
    ]
    assert growth.flat_from(found, "fixed", "bytes") == 4
    assert growth.flat_from(found[2:], "fixed", "bytes") == 4
    assert growth.flat_from(found[:2], "fixed", "bytes") == 2


@compiled
def test_cost_does_not_depend_on_the_rows(rows: tuple[Tensor, Tensor]) -> None:
    def cost_of(n: int) -> dict[str, float]:
        student, teacher = (x[1:2].expand(n, V).contiguous() for x in rows)
        return growth.cost(student, teacher)

    assert cost_of(5) == pytest.approx(cost_of(1))
