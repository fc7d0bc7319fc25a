"""How far a student is from its teacher on each token of a text.

A token has the figures of its prediction from the tokens before it, so that the first has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from akl_triton import adaptive_kl
from akl_triton.cli import UsageError
from akl_triton.integrations.heads import without_cache

CANDIDATES = 3  # most probable tokens of either side
QUANTILES = {"median": 0.5, "p90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Candidate:
    """A token that one of the two finds likely, and its probability on both sides."""

    token: str
    teacher: float
    student: float


@dataclass(frozen=True)
class Figures:
    """The statistics of `adaptive_kl` for the prediction of one token; nats."""

    loss: float  # adaptive KL
    forward_kl: float
    reverse_kl: float
    forward_weight: float  # w, the share of the gap in the head
    head_size: int
    head_mass: float
    gap: float
    student_entropy: float
    teacher_entropy: float
    agreement: bool  # some token is a most probable one on both sides
    student_probability: float  # of the token that is in the text
    teacher_probability: float
    candidates: list[Candidate]


@dataclass(frozen=True)
class Token:
    index: int
    id: int
    text: str  # the texts of all tokens, joined, are the text; a special token has its name
    figures: Figures | None


@dataclass(frozen=True)
class TokenReport:
    tokens: list[Token]
    total: int  # tokens of the text, of which these are the first
    summary: dict[str, dict[str, float]]  # statistic -> mean, median, p90, max
    head_share: float  # of the gap, summed over the tokens first
    agreement: float  # share of the tokens

    @property
    def worst(self) -> list[Token]:
        """The tokens that have figures, largest loss first."""
        known = [token for token in self.tokens if token.figures is not None]
        return sorted(known, key=lambda token: -token.figures.loss)  # type: ignore[union-attr]


# The members of `Figures` that are averaged and tabulated, and what they are called there.
COLUMNS = {
    "loss": "adaptive KL",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "forward_weight": "w",
    "head_size": "head size",
    "head_mass": "head mass",
    "gap": "gap",
    "student_entropy": "student entropy",
    "teacher_entropy": "teacher entropy",
}


def tokenize(tokenizer: Any, text: str, limit: int) -> tuple[list[int], list[str], int]:
    """(ids, their texts) of the first `limit` tokens, and the number of all."""
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    if len(ids) < 2:
        raise UsageError(f"--text: expected two tokens or more, got {len(ids)}")
    names = tokenizer.convert_ids_to_tokens(ids[:limit])
    if not tokenizer.is_fast:  # it does not say where in the text its tokens are
        return ids[:limit], names, len(ids)
    texts, end = [], 0
    for name, (_, stop) in zip(names, encoded["offset_mapping"], strict=False):
        # From the end of the one before: white space that the tokenizer drops, and characters of
        # which a token has some bytes, are shown once.
        texts.append(text[end:stop] or (name if name in tokenizer.all_special_tokens else ""))
        end = max(end, stop)
    return ids[:limit], texts, len(ids)


@torch.no_grad()
def report_tokens(
    student: Any, teacher: Any, tokenizer: Any, text: str, limit: int, device: torch.device
) -> TokenReport:
    """The figures of the first `limit` tokens of the text."""
    ids, texts, total = tokenize(tokenizer, text, limit)
    batch = torch.tensor([ids], device=device)
    s, t = _logits("student", student, batch), _logits("teacher", teacher, batch)
    losses, stats = adaptive_kl(s, t, reduction="none", return_stats=True)
    if broken := int((~losses.isfinite()).sum()):
        raise UsageError(
            f"--text: expected finite logits of both models, got NaN or infinity for {broken} of "
            f"{len(losses)} tokens"
        )
    columns = {"loss": losses, **stats._asdict()}
    rows = {name: columns[name].tolist() for name in COLUMNS}
    agreement = stats.top1_agreement.bool().tolist()
    candidates = _candidates(s, t, tokenizer)
    of_text = [_probabilities(x, batch[0, 1:, None])[:, 0].tolist() for x in (s, t)]
    figures = [
        Figures(
            **{
                name: int(values[i]) if name == "head_size" else values[i]
                for name, values in rows.items()
            },
            agreement=agreement[i],
            student_probability=of_text[0][i],
            teacher_probability=of_text[1][i],
            candidates=candidates[i],
        )
        for i in range(len(losses))
    ]
    return TokenReport(
        tokens=[
            Token(i, id_, texts[i], figures[i - 1] if i else None) for i, id_ in enumerate(ids)
        ],
        total=total,
        summary={name: _summary(columns[name]) for name in COLUMNS},
        head_share=_head_share(stats.forward_weight, stats.gap),
        agreement=stats.top1_agreement.mean().item(),
    )


def _logits(role: str, model: Any, ids: Tensor) -> Tensor:
    """[L - 1, V], those that have a next token."""
    try:
        logits: Tensor = model(input_ids=ids, **without_cache(model)).logits
    except (IndexError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{role}: expected a model that runs on {ids.shape[1]} tokens (--max-tokens), got "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    return logits[0, :-1]


def _summary(column: Tensor) -> dict[str, float]:
    column = column.double()
    quantiles = {name: column.quantile(q).item() for name, q in QUANTILES.items()}
    return {"mean": column.mean().item(), **quantiles}


def _head_share(weight: Tensor, gap: Tensor) -> float:
    total = gap.sum()
    return ((weight * gap).sum() / total).item() if total > 0 else 0.5


def _probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """[N, K] of ids [N, K]; 0 where the model has no such token."""
    known = ids < logits.shape[-1]
    p = logits.float().softmax(-1).gather(-1, ids.where(known, 0))
    return p.where(known, 0.0)


def _candidates(student: Tensor, teacher: Tensor, tokenizer: Any) -> list[list[Candidate]]:
    """For each position the most probable tokens of either side."""
    tops = [x.topk(min(CANDIDATES, x.shape[-1]), dim=-1).indices for x in (teacher, student)]
    ids = torch.cat(tops, dim=-1)
    p, q = (_probabilities(x, ids).tolist() for x in (teacher, student))
    found = []
    for row, of_teacher, of_student in zip(ids.tolist(), p, q, strict=True):
        once = {id_: (a, b) for id_, a, b in zip(row, of_teacher, of_student, strict=True)}
        ordered = sorted(once.items(), key=lambda item: -max(item[1]))
        found.append([Candidate(_name(tokenizer, id_), *both) for id_, both in ordered])
    return found


def _name(tokenizer: Any, id_: int) -> str:
    """The text of a token, or its name where it has some bytes of a character alone."""
    text: str = tokenizer.decode([id_])
    if text and "\ufffd" not in text:
        return text
    # An id beyond the tokenizer's, as in a padded vocabulary, has no name.
    return tokenizer.convert_ids_to_tokens(id_) or f"#{id_}"


def visible(text: str) -> str:
    """The text on one line, with its white space shown."""
    for character, sign in ((" ", "\u2423"), ("\n", "\u21b5"), ("\t", "\u21e5"), ("\r", "\u240d")):
        text = text.replace(character, sign)
    return text
