"""Teachers from the log-probabilities that others compute: vLLM, TRL's client, DistillKit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks
from ..sparse import Outside, SparseTeacher

_Row = dict[int, float]  # ln p of some tokens


def teacher_of_vllm(
    prompt_logprobs: Sequence[Sequence[Mapping[Any, Any] | None]], temperature: float = 1.0
) -> SparseTeacher:
    """The teacher of the ``prompt_logprobs`` of vLLM.

    vLLM gives at position i, for token i, what was computed at position i - 1, and nothing at the
    first one; here the pairs of position i are those of token i + 1, as for logits, and the last
    position has none. Its own token is among the pairs of a position also where it is not one of
    the k most probable: the pairs are k + 1, of which one is absent elsewhere.

    Args:
        prompt_logprobs: of each prompt, such as ``[x.prompt_logprobs for x in llm.generate(prompts,
            SamplingParams(prompt_logprobs=k, max_tokens=1))]``, or those in the JSON of a server.
        temperature: that of the log-probabilities: 1, or the one of sampling where vLLM runs with
            ``logprobs_mode="processed_logprobs"``.

    Shape:
        ``[B, L, k + 1]``, with the length of the longest prompt; shorter ones have no pairs at
        their end.

    Raises:
        TypeError, ValueError: prompt_logprobs is not as above, or its values are no
            log-probabilities.

    Reference:
        vLLM, ``vllm.logprobs.PromptLogprobs``.

    Example:
        >>> from akl_triton.integrations import teacher_of_vllm
        >>> prompt = [None, {7: -0.1, 2: -3.0}, {5: -0.5, 7: -1.5}]
        >>> teacher_of_vllm([prompt]).ids[0, :2].tolist()
        [[2, 7], [5, 7]]
    """
    sequences = [
        [*(_row_of_vllm(position) for position in prompt[1:]), {}] for prompt in prompt_logprobs
    ]
    return _teacher(sequences, temperature)


def teacher_of_trl(
    result: Mapping[str, Sequence[Sequence[Sequence[Any]]]],
    prompt_lengths: Sequence[int],
    temperature: float = 1.0,
) -> SparseTeacher:
    """The teacher of what ``VLLMClient.get_sequence_logprobs`` of TRL returns.

    Its rows begin at the first token of each completion, with what was computed one position
    before; here the pairs of position i are those of token i + 1, and positions before have none.
    The completion's own token is among the pairs where it is known.

    Args:
        result: with ``logprobs`` and ``logprob_token_ids`` ``[B][completion][k]``, and
            ``actual_logprobs`` and ``actual_token_ids`` ``[B][completion][1]``.
        prompt_lengths: those that the client was given, of sequences that begin at position 0.
        temperature: that which the client was given.

    Shape:
        ``[B, L, k + 1]``, with the length of the longest prompt and completion.

    Raises:
        TypeError, ValueError: an argument is not as above, or values are no log-probabilities.

    Reference:
        TRL 1.16, ``trl.generation.vllm_client.VLLMClient.get_sequence_logprobs``.

    Example:
        >>> from akl_triton.integrations import teacher_of_trl
        >>> result = {"logprobs": [[[-0.1, -3.0]]], "logprob_token_ids": [[[7, 2]]],
        ...           "actual_logprobs": [[[-0.1]]], "actual_token_ids": [[[7]]]}
        >>> teacher_of_trl(result, prompt_lengths=[2]).ids[0, 1].tolist()
        [2, 7]
    """
    names = ("logprob_token_ids", "logprobs", "actual_token_ids", "actual_logprobs")
    if missing := [name for name in names if name not in result]:
        raise ValueError(
            f"result: expected {', '.join(names)}, got none of {', '.join(missing)} among "
            f"{', '.join(result)}"
        )
    sequences = []
    for length, *completion in zip(prompt_lengths, *(result[name] for name in names), strict=True):
        rows: list[_Row] = []
        for ids, logs, own_ids, own_logs in zip(*completion, strict=True):
            both = zip([*ids, *own_ids], [*logs, *own_logs], strict=True)
            # A token of padding has ln p = -inf, and the id of another.
            rows.append({int(i): float(x) for i, x in both if math.isfinite(x)})
        # Nobody has computed the pairs of a completion's first token where nothing is before it.
        before: list[_Row] = [{} for _ in range(length - 1)]
        sequences.append([*before, *(rows if length else rows[1:]), {}])
    return _teacher(sequences, temperature)


def teacher_of_distillkit(
    sparse_ids: Tensor,
    sparse_values: Tensor,
    log_values: bool = True,
    temperature: float = 1.0,
    outside: Literal["bucket", "zero"] | None = None,
) -> SparseTeacher:
    """The teacher of a ``SparseSignal`` of Arcee's DistillKit, which ``LogprobCompressor`` unpacks.

    Args:
        sparse_ids: ``[B, L, k]``; those of position i are of token i + 1, as for logits.
        sparse_values: ``[B, L, k]``, log-probabilities; where their compression makes a row sum to
            more than 1, it is divided by its sum. A pair whose value is -inf is absent.
        log_values: False where the values are logits, of which the rest of the vocabulary is not
            known.
        temperature: its ``generation_temperature``.
        outside: "bucket", the default, is DistillKit's ``symmetric_uniform``, and "zero" its
            ``zero``, which is the only one of logits.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Reference:
        https://github.com/arcee-ai/DistillKit, distillkit/signals/base.py and
        distillkit/lossfuncs/common.py.

    Example:
        >>> import torch
        >>> from akl_triton.integrations import teacher_of_distillkit
        >>> ids, values = torch.tensor([[[7, 2]]]), torch.tensor([[[0.7, 0.2]]]).log()
        >>> teacher_of_distillkit(ids, values).outside
        'bucket'
    """
    checks.check_flag("log_values", log_values)
    checks.check_tensor("sparse_ids", sparse_ids)
    checks.check_tensor("sparse_values", sparse_values)
    chosen: Outside = outside or ("bucket" if log_values else "zero")
    if not log_values and chosen != "zero":
        raise ValueError(
            "outside: expected 'zero' with log_values=False, as logits of pairs do not say what "
            f"the rest has, got {outside!r}"
        )
    values = sparse_values.float()
    total = values.logsumexp(-1, keepdim=True)
    excess = total.clamp(min=0.0) if log_values else total
    absent = values == -math.inf
    values = (values - excess).masked_fill(absent, -math.inf)
    return SparseTeacher(
        sparse_ids.masked_fill(absent, -1), values, outside=chosen, temperature=temperature
    )


def _row_of_vllm(position: Mapping[Any, Any] | None) -> _Row:
    row: _Row = {}
    for token, entry in (position or {}).items():
        value = entry
        if isinstance(entry, Mapping):  # the JSON of a server
            value = entry.get("logprob")
        elif hasattr(entry, "logprob"):
            value = entry.logprob
        if not isinstance(value, (int, float)):
            raise TypeError(
                "prompt_logprobs: expected Logprob objects, or numbers, by token, got "
                f"{checks.type_of(entry)}"
            )
        if math.isfinite(value):
            row[int(token)] = float(value)
    return row


def _teacher(sequences: Sequence[Sequence[_Row]], temperature: float) -> SparseTeacher:
    """The teacher of rows of unequal length, in sequences of unequal length."""
    length = max(map(len, sequences), default=0)
    k = max((len(row) for rows in sequences for row in rows), default=0)
    ids = torch.full((len(sequences), length, max(k, 1)), -1)
    log_probs = torch.full(ids.shape, -math.inf)
    for i, rows in enumerate(sequences):
        for j, row in enumerate(rows):
            ids[i, j, : len(row)] = torch.tensor([*row], dtype=torch.long)
            log_probs[i, j, : len(row)] = torch.tensor([*row.values()])
    return SparseTeacher(ids, log_probs, temperature=temperature)
