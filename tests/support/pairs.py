"""Teachers that are pairs, for tests of both backends."""

from __future__ import annotations

import torch
from torch import Tensor

from akl_triton import DKD, Divergence, EntropySwitch, SparseTeacher, teacher_pairs
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
