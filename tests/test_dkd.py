"""DKD: the label's token apart from all others, at its edges; by labels at both doors.

Every kind of row and option, at every door and on both backends: tests/test_family.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import DKD, DistillationLoss, distillation_loss, linear_distillation_loss
from akl_triton.options import Backend
from akl_triton.verify import exact, faults
from tests.support.cases import OPTIONS

INF = math.inf
V = 6500  # two full blocks, and edges of both kinds
IGNORED = -100


def rows_at_the_edges(label: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(student, teacher) of one row each, [V] and [V + 7]; named by what is odd about them."""
    g = torch.Generator().manual_seed(label)

    def pair(*edits: tuple[int, int, float]) -> tuple[Tensor, Tensor]:
        """Edits (side, token, logit); token V is all others than the label."""
        both = [3.0 * torch.randn(V + extra, generator=g) for extra in (0, 7)]
        for side, token, logit in edits:
            x = both[side]
            if token == V:
                x[torch.arange(len(x)) != label] = logit
            else:
                x[token] = logit
        return both[0], both[1]

    other = (label + 1) % V
    return {
        "ordinary": pair(),
        "a sure teacher": pair((1, label, 40.0)),
        "a sure student": pair((0, label, 40.0)),
        "both are sure": pair((0, label, 40.0), (1, label, 41.0)),
        "both are sure of another": pair((0, other, 40.0), (1, other, 41.0)),
        "a label far below": pair((0, label, -300.0), (1, label, -300.0)),
        "beyond the powers of fp32": pair((0, label, 300.0), (1, label, 300.0)),
        "a label that only the teacher has": pair((0, label, -INF)),
        "a label that only the student has": pair((1, label, -INF)),
        "a label that nobody has": pair((0, label, -INF), (1, label, -INF)),
        "a student without others": pair((0, V, -INF)),
        "a teacher without others": pair((1, V, -INF)),
        "no others": pair((0, V, -INF), (1, V, -INF)),
        "no token of both": pair((0, V, -INF), (1, label, -INF)),
        "nothing": pair((0, V, -INF), (0, label, -INF)),
        "NaN at the label": pair((0, label, math.nan)),
        "NaN at the teacher's label": pair((1, label, math.nan)),
        "NaN elsewhere": pair((1, other, math.nan)),
        "an infinite label": pair((1, label, INF)),
        "infinite elsewhere": pair((0, other, INF)),
        "NaN, and no other": pair((0, V, -INF), (0, other, math.nan)),
    }


# A kernel takes seconds to compile and to translate for a CPU.
CASES = [
    *(("torch", options) for options in OPTIONS),
    *(("triton", options) for options in ("", "labels at another temperature")),
]


@pytest.mark.parametrize("label", [0, 2100, V - 1])
@pytest.mark.parametrize("backend, options", CASES, indirect=["backend"])
def test_edges(label: int, options: str, backend: Backend, device: torch.device) -> None:
    """The label in the first block, in a full one and in the last, with statistics and without."""
    rows = rows_at_the_edges(label)
    student, teacher = (torch.stack(side) for side in zip(*rows.values(), strict=True))
    labels = torch.full((len(rows),), label)
    maps = dict(OPTIONS[options])
    kd_ratio = maps.pop("kd_ratio", 1.0)
    upstream = torch.linspace(-1.0, 2.0, len(rows))
    call: dict[str, Any] = {"kd_ratio": kd_ratio, "reduction": "none", "backend": backend, **maps}
    of = exact(DKD(beta=2.0), student, teacher, labels=labels, kd_ratio=kd_ratio, **maps)
    for inplace in (False, True):
        leaf = student.to(device).requires_grad_()
        output: Any = distillation_loss(
            1.0 * leaf,
            teacher.to(device),
            labels.to(device),
            divergence=DKD(beta=2.0),
            inplace=inplace,
            return_stats=not inplace,
            **call,
        )
        loss = output if inplace else output[0]
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(device))
        found = faults(loss, gradient, of, upstream=upstream)
        assert not found, "\n".join([*found, *rows])


def test_labels_that_are_no_tokens(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody looks, as on a GPU: their rows are NaN, and only those."""
    monkeypatch.setattr("akl_triton.checks.check_targets", lambda *_: None)
    student, teacher = torch.randn(2, 4, V, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, -1, V, IGNORED], device=device)
    leaf = student.to(device).requires_grad_()
    loss = distillation_loss(
        leaf, teacher.to(device), labels, divergence="dkd", reduction="none", backend=backend
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient[1:3].isnan().all() and gradient[[0, 3]].isfinite().all()
    assert gradient[3].count_nonzero() == 0


def test_statistics_are_those_of_all_tokens(backend: Backend, device: torch.device) -> None:
    student, teacher = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(2)).to(device)
    labels = torch.tensor([0, 2100, 7], device=device)
    options: dict[str, Any] = {"kd_ratio": 0.5, "return_stats": True, "backend": backend}
    _, stats = distillation_loss(student, teacher, labels, divergence=DKD(), **options)
    _, expected = distillation_loss(student, teacher, labels, divergence="forward_kl", **options)
    assert stats.forward_weight.isnan().all()
    for name, column in stats._asdict().items():
        if name != "forward_weight":
            torch.testing.assert_close(column, getattr(expected, name), equal_nan=True)


def test_shift_mask_and_hidden_states() -> None:
    """The label that counts is that of the token which follows; hidden states have it, too."""
    g = torch.Generator().manual_seed(3)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(shape, generator=g) for shape in ((2, 5, 6), (300, 6)) * 2
    )
    labels = torch.randint(300, (2, 5), generator=g)
    mask = torch.arange(10).view(2, 5) % 3 != 0
    divergence = DKD(alpha=0.5, beta=2.0)
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    loss = distillation_loss(student, teacher, labels, divergence=divergence, mask=mask, shift=1)
    of = exact(divergence, student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1),
               labels=labels[:, 1:].flatten())  # fmt: skip
    expected = of.oracle.loss[mask[:, 1:].flatten()].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    fused = linear_distillation_loss(
        *(hidden, weight, teacher_hidden, teacher_weight, labels),
        divergence=divergence,
        mask=mask,
        shift=1,
        chunk_bytes=3 * 8 * 300,
    )
    torch.testing.assert_close(fused, loss)


def test_labels_are_needed_and_are_tokens() -> None:
    student = torch.zeros(2, 9)
    loss_function = DistillationLoss(DKD())
    with pytest.raises(ValueError, match=r"^labels: expected the token of each position for DKD"):
        loss_function(student, student)
    with pytest.raises(ValueError, match=r"^labels: expected -100 or tokens .*DKD needs.*got 9"):
        loss_function(student, student, torch.tensor([0, 9]))
    loss_function(student, student, torch.tensor([0, IGNORED]))
    with pytest.raises(ValueError, match=r"^beta: expected a finite number in \[0, inf\)"):
        DKD(beta=-1.0)
