"""Log-probabilities of others, made by hand from known distributions, are those of the teacher."""

from __future__ import annotations

import doctest
import json
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from akl_triton import SparseTeacher, adaptive_kl, distillation_loss, forward_kl
from akl_triton.integrations import (
    readers,
    teacher_of_distillkit,
    teacher_of_trl,
    teacher_of_vllm,
)

V, K = 20, 4
LENGTHS = (6, 4)
LOGITS = 3.0 * torch.randn(2, 6, V, generator=torch.Generator().manual_seed(0))
LOG_P = LOGITS.log_softmax(-1)  # of position i, for token i + 1
IDS = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(1))
STUDENT = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(2))
LABELS = IDS.clone()
LABELS[1, 4:] = -100


class Logprob(NamedTuple):
    """As vLLM has it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def of_position(i: int, j: int) -> dict[int, Logprob]:
    """What vLLM gives for token j of prompt i: the k most probable tokens, and the token itself."""
    log_p = LOG_P[i, j - 1]
    tokens = dict.fromkeys([*log_p.topk(K).indices.tolist(), int(IDS[i, j])])
    order = log_p.argsort(descending=True).tolist()
    return {token: Logprob(log_p[token].item(), order.index(token) + 1) for token in tokens}


def of_prompts() -> list[list[dict[int, Logprob] | None]]:
    return [
        [None, *(of_position(i, j) for j in range(1, length))] for i, length in enumerate(LENGTHS)
    ]


def expected(first: tuple[int, int] = (0, 0)) -> SparseTeacher:
    """The pairs of the known distributions, of the positions from `first` on."""
    ids = torch.full((2, 6, K + 1), -1)
    for i, length in enumerate(LENGTHS):
        for j in range(first[i], length - 1):
            top = LOG_P[i, j].topk(K).indices
            ids[i, j, :K] = top
            if IDS[i, j + 1] not in top:
                ids[i, j, K] = IDS[i, j + 1]
    log_probs = LOG_P.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    return SparseTeacher(ids, log_probs)


def assert_same(found: SparseTeacher, exact: SparseTeacher) -> None:
    assert torch.equal(found.ids, exact.ids)
    torch.testing.assert_close(found.log_probs, exact.log_probs)
    losses = [adaptive_kl(STUDENT, teacher, LABELS, shift=1) for teacher in (found, exact)]
    assert losses[0].isfinite()
    torch.testing.assert_close(*losses)


def test_vllm():
    """Shifted to where they were computed; the own token is a pair of its own where it is rare."""
    assert (expected().ids[0, :5] < 100).sum(-1).unique().tolist() == [K, K + 1]
    assert_same(teacher_of_vllm(of_prompts()), expected())


def test_vllm_as_json_and_with_an_empty_start():
    """As its server answers, and as its FlatLogprobs begin."""
    prompts: Any = [
        [{}, *({token: x._asdict() for token, x in row.items()} for row in rows[1:] if row)]
        for rows in of_prompts()
    ]
    prompts[0][2]["19"] = {"logprob": math.nan, "rank": None}  # a token that was masked
    assert_same(teacher_of_vllm(json.loads(json.dumps(prompts))), expected())
    with pytest.raises(TypeError, match=r"^prompt_logprobs: expected Logprob objects, or numbers"):
        teacher_of_vllm([[None, {3: "x"}]])


def of_trl(prompt_lengths: tuple[int, int]) -> dict[str, list[Any]]:
    """By TRL's own code, of what a server gives."""
    client = pytest.importorskip("trl.generation.vllm_client").VLLMClient
    results = []
    for i, rows in enumerate(of_prompts()):
        answer = [
            None if row is None else {str(token): x._asdict() for token, x in row.items()}
            for row in rows
        ]
        results.append(
            client._format_sequence_logprobs(
                {"prompt_logprobs": answer}, IDS[i].tolist(), prompt_lengths[i], K
            )
        )
    return {name: [x[name] for x in results] for name in results[0]}


def test_trl():
    found = teacher_of_trl(of_trl((2, 1)), (2, 1))
    assert_same(found, expected(first=(1, 0)))
    assert_same(teacher_of_trl(of_trl((0, 3)), (0, 3)), expected(first=(0, 2)))


def test_trl_pads_rows():
    """Rows with fewer pairs than were asked for have token 0 with ln p = -inf."""
    result = of_trl((1, 1))
    for name, fill in {"logprobs": -math.inf, "logprob_token_ids": 0}.items():
        result[name] = [[[*row, fill, fill] for row in rows] for rows in result[name]]
    assert_same(teacher_of_trl(result, (1, 1)), expected())
    with pytest.raises(ValueError, match=r"^result: expected logprob_token_ids, .*none of logprob"):
        teacher_of_trl({"actual_logprobs": []}, [])


def pairs(log_p: Tensor = LOG_P) -> tuple[Tensor, Tensor]:
    values, ids = log_p.topk(K)
    return ids, values


def dense_of(ids: Tensor, p: Tensor) -> Tensor:
    return torch.zeros(2, 6, V).scatter(-1, ids, p)


def test_distillkit():
    ids, values = pairs()
    found = teacher_of_distillkit(ids, values)
    assert_same(found, SparseTeacher(ids, values))
    zero = teacher_of_distillkit(ids, values, outside="zero")
    p = dense_of(ids, values.softmax(-1))
    loss = distillation_loss(STUDENT, zero, divergence="forward_kl")
    exact = (p * (p.clamp(min=1e-30).log() - STUDENT.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss, exact)


def test_distillkit_logits():
    """Its loss divides by the student's whole sum and by the sum of the teacher's pairs."""
    ids, values = pairs(LOGITS)
    found = teacher_of_distillkit(ids, values + 5.0, log_values=False, temperature=2.0)
    p = dense_of(ids, values.softmax(-1))
    exact = (p * (p.clamp(min=1e-30).log() - (STUDENT / 2.0).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(forward_kl(STUDENT, found, temperature=2.0), exact)
    with pytest.raises(ValueError, match=r"^outside: expected 'zero' with log_values=False"):
        teacher_of_distillkit(ids, values, log_values=False, outside="bucket")


def test_distillkit_compression():
    """Sums above 1 by its rounding, and pairs that are not there, whose ids are arbitrary."""
    ids, values = pairs()
    values = values - values.logsumexp(-1, keepdim=True) + 0.02
    values[0, 1, 2:] = -math.inf
    ids[0, 1, 2:] = ids[0, 1, 0]
    found = teacher_of_distillkit(ids, values)
    assert (found.ids[0, 1] < V).sum() == 2
    assert found.log_probs.exp().sum(-1).max() <= 1.0 + 1e-6
    torch.testing.assert_close(found.log_probs[0, 1].exp().sum(), values[0, 1].exp().sum())


def test_examples_of_the_docstrings():
    results = doctest.testmod(readers)
    assert results.attempted > 0 and results.failed == 0
