"""Teachers that are pairs, for tests of both backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from akl_triton import DKD, Divergence, EntropySwitch, SparseTeacher, teacher_pairs
from akl_triton.divergences import AdaptiveKL
from akl_triton.reference import head_size, reference_sparse
from akl_triton.verify import MASS_ERROR, MU_SLACK
from tests.support.cases import DIVERGENCES, V_S, rows_of_every_kind

# All but those that need the teacher's probability of every token.
SPARSE_DIVERGENCES: tuple[Divergence, ...] = tuple(
    x for x in DIVERGENCES if not isinstance(x, (DKD, EntropySwitch))
)
K = 24


def pairs_of_every_kind(
    k: int = K, temperature: float = 1.0, finite: bool = True
) -> tuple[Tensor, SparseTeacher]:
    """Student logits [N, V_s] of every kind, and pairs of their teachers: the most probable k, of
    which some rows have fewer; and rows whose pairs are the least probable ones, or hold all but
    2^-16 of the student's mass."""
    student, teacher = rows_of_every_kind(finite)
    teacher = teacher[:, :V_S]
    pairs = teacher_pairs(teacher, k, temperature)
    assert pairs.log_tail is not None
    ids, log_probs, log_tail = pairs.ids.clone(), pairs.log_probs.clone(), pairs.log_tail.clone()
    # The second row has half of its pairs, scattered; their mass is the rest's.
    lost = torch.arange(k) % 2 == 0
    log_tail[1] = torch.logaddexp(log_tail[1], log_probs[1, lost].logsumexp(0))
    ids[1, lost], log_probs[1, lost] = -1, torch.nan
    # The fourth has its last tokens in place of its first.
    log_p = (teacher[3].double() / temperature).log_softmax(0)
    ids[3] = torch.arange(V_S - k, V_S)
    log_probs[3] = log_p[-k:].float()
    log_tail[3] = log_p[:-k].logsumexp(0).float()
    # The student of the sixth is sure of the pairs, of which the teacher is not.
    student = student.clone()
    student[5, ids[5].long()] += 16.0
    log_probs[5] -= 1.0
    log_tail[5] = torch.log1p(-log_probs[5].double().exp().sum()).float()
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1))
    return student, SparseTeacher(
        ids[:, order], log_probs[:, order], log_tail, temperature=temperature
    )


def head_faults(
    divergence: AdaptiveKL, student: Tensor, teacher: SparseTeacher, stats: object, **maps: Any
) -> list[str]:
    """A line for each fault of the heads of a finite row: those of the oracle for some mu' in
    mu (1 +- MU_SLACK)."""
    size, mass, w = (
        getattr(stats, x).double() for x in ("head_size", "head_mass", "forward_weight")
    )
    p = teacher.entries().double().softmax(-1)[:, :-1]
    order = teacher.log_probs.double().argsort(dim=-1, descending=True, stable=True)
    count = (teacher.log_probs > -torch.inf).sum(-1)
    least, most = (
        head_size(p, order, divergence.mu * (1.0 + f * MU_SLACK), divergence.head).minimum(count)
        for f in (-1, 1)
    )
    faults = [
        f"row {i}: head_size {size[i]:g} is not in [{least[i]}, {most[i]}]"
        for i in (~((least <= size) & (size <= most))).nonzero().flatten().tolist()
    ]
    exact = reference_sparse(
        student,
        teacher.ids.where(teacher.log_probs > -torch.inf, -1),
        teacher.log_probs,
        teacher.log_tail,
        temperature=teacher.temperature,
        size=size.long(),
        ties=divergence.ties,
        **maps,
    )
    gap = stats.gap.double()  # type: ignore[attr-defined]
    slack = MASS_ERROR * (1.0 + 1.0 / gap.clamp(min=1e-300))
    faults += [
        f"row {i}: head_mass {mass[i]:.7f} or w {w[i]:.7f} is not {exact.head_mass[i]:.7f}, "
        f"{exact.forward_weight[i]:.7f}"
        for i in (
            ((mass - exact.head_mass).abs() > MASS_ERROR)
            | ((w - exact.forward_weight).abs() > slack)
        )
        .nonzero()
        .flatten()
        .tolist()
    ]
    return faults
