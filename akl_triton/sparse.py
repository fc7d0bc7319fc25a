"""Teachers that are k pairs a token, and a probability for all the rest."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from . import checks
from .divergences import DKD, FAMILY, Divergence, EntropySwitch, ForwardKL
from .kernels.layout import ABSENT
from .rows import BLOCK_BYTES

Outside: TypeAlias = Literal["bucket", "zero", "renormalise"]
OUTSIDE: tuple[Outside, ...] = ("bucket", "zero", "renormalise")
MOST_PAIRS = 1024
# Log-probabilities are rounded; those of a row may sum to 1 within this, and as much as their dtype
# rounds them.
SUM_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class SparseTeacher:
    r"""A teacher of which k tokens are known at each position, and the mass of all others.

    It takes the place of the teacher's logits in every loss.

    Math:
        With S the k tokens of a row, p their probabilities, ``tau = 1 - sum_S p`` and ``sigma = 1 -
        sum_S q`` the masses of all other tokens, the loss is that of the k + 1 entries (p, tau) and
        (q, sigma)::

            forward_kl = sum_S p (ln p - ln q) + tau ln(tau / sigma)
            reverse_kl = sum_S q (ln q - ln p) + sigma ln(sigma / tau)
            gap = sum_S |p - q| + |tau - sigma|

        and likewise of every other member of the family. For a KL, and for every other
        f-divergence, it is the divergence of two coarser distributions: never larger than that of
        the whole vocabulary, equal where q / p is the same for all other tokens, and larger the
        more pairs there are. The gradient of a token that is no pair is its share of that of the
        rest, ``e^(s_j / T) / sum_{i not in S} e^(s_i / T)``.

        ``outside`` says what the other tokens are:

        ``"bucket"``: the above. ``"zero"``: tau = 0, and the p of the pairs sum to 1, so that the
        student is drawn to the pairs alone; with ids that were sampled from the teacher, and
        ``log_probs`` the logarithms of count / n, the forward KL has the dense gradient as its
        expectation (random sampling KD). ``"renormalise"``: tau = sigma = 0, and both sides sum to
        1 over the pairs. The gradient is then blind to the mass outside of them: use it to compare
        with code that does so.

        The head of `AdaptiveKL` is found among the pairs, by the same rule as in a whole
        vocabulary: `DivergenceStats.head_mass` well below mu says that it ends with the last pair.
        At T = 1 a few dozen pairs hold the head of nearly every token of a text, at T = 2 several
        hundred may not: adaptive KL of pairs is a loss for T = 1.

    Args:
        ids: ``[..., k]``, the tokens, in any order; a negative id is no pair.
        log_probs: ``[..., k]``, their ln p: natural logarithms of a softmax of the whole
            vocabulary, at the temperature of the loss. (With "zero" and "renormalise" up to a
            constant of the row.)
        log_tail: ``[...]``, ln tau. Without it tau is ``1 - sum_S p``, which cancels where
            log_probs are rounded to 16 bits or less. For "bucket" only.
        outside: as above.
        temperature: that of log_probs, which is the only one a loss can have: the pairs do not say
            what the rest of the vocabulary is at another.

    Shape:
        ``[...]`` are the leading dimensions of the student's logits; 1 <= k <= 1024, the same for
        all rows. `entries` are ``[..., k + 1]``.

    Dtype:
        ids int32 or int64; log_probs and log_tail fp32, bf16 or fp16.

    Statistics:
        forward_kl, reverse_kl, gap and teacher_entropy are those of the k + 1 entries. The
        student's entropy and cross-entropy are of its whole vocabulary, and top1_agreement compares
        its most probable token with the most probable pair.

    Raises:
        TypeError, ValueError: an argument is not as above. On a CPU also where an id comes twice in
            a row, or the probabilities of a row sum to more than 1, or with log_tail to something
            else, and in the loss where an id is no token of the student; elsewhere that would wait
            for the device, and the loss of a row with an id that comes twice, or that is no token,
            is NaN.

    Reference:
        "zero" with sampled ids: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge
        Distillation in LLMs", arXiv 2503.16870.

    Example:
        >>> import torch
        >>> from akl_triton import SparseTeacher, adaptive_kl
        >>> teacher = SparseTeacher(torch.tensor([[7, 2]]), torch.tensor([[0.6, 0.3]]).log())
        >>> round(adaptive_kl(torch.zeros(1, 10), teacher).item(), 4)
        1.2644
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None = None
    outside: Outside = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checks.check_choice("outside", self.outside, OUTSIDE)
        temperature = checks.check_number("temperature", self.temperature, above=0.0)
        checks.check_pairs(self.ids, self.log_probs, self.log_tail, self.outside, MOST_PAIRS)
        # Ascending, so that equal logits of a head are taken in the order of their ids, a kernel
        # knows the pairs in a block, and the order in which they come changes no bit.
        absent = (self.ids < 0) | (self.ids == ABSENT)  # the latter in pairs that were made before
        ids = self.ids.clamp(max=ABSENT - 1).masked_fill(absent, ABSENT).int()
        ids, order = ids.sort(dim=-1)
        log_probs = self.log_probs.gather(-1, order)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "log_probs", log_probs.masked_fill(ids == ABSENT, -math.inf))
        object.__setattr__(self, "temperature", temperature)
        checks.check_sums(ids, self.log_probs, self.log_tail, self.outside, SUM_TOLERANCE)

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions, ``[...]``."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def to(self, device: torch.device | str) -> SparseTeacher:
        """The same pairs on a device."""
        tail = None if self.log_tail is None else self.log_tail.to(device)
        return dataclasses.replace(
            self, ids=self.ids.to(device), log_probs=self.log_probs.to(device), log_tail=tail
        )

    def entries(self) -> Tensor:
        """``[..., k + 1]`` fp32, ln p of the pairs in ascending order of their ids, and ln tau."""
        log_probs = self.log_probs.float()
        if self.outside != "bucket":
            rest = torch.full_like(log_probs[..., 0], -math.inf)
        elif self.log_tail is not None:
            rest = self.log_tail.float()
        else:
            rest = (1.0 - log_probs.exp().sum(-1)).clamp(min=0.0).log()
        return torch.cat([log_probs, rest[..., None]], dim=-1)


def teacher_pairs(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> SparseTeacher:
    """The k most probable tokens of a dense teacher, and the mass of all others.

    Math:
        ``ln p = teacher / T - logsumexp(teacher / T)`` of the k largest, and ``log_tail =
        logsumexp`` of the others, less the same: it does not cancel.

    Args:
        teacher_logits: ``[..., V]``.
        k: 1 <= k <= min(V, 1024).
        temperature: T > 0, that of the loss.

    Shape:
        ids and log_probs ``[..., k]``, log_tail ``[...]``. Nothing of the logits' size is
        allocated.

    Dtype:
        logits fp32, bf16 or fp16; ids int32, log_probs and log_tail fp32.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Reference:
        See `SparseTeacher`.

    Example:
        >>> import torch
        >>> from akl_triton import teacher_pairs
        >>> pairs = teacher_pairs(torch.tensor([[0.7, 0.1, 0.15, 0.05]]).log(), k=2)
        >>> pairs.ids.tolist(), round(pairs.log_tail.exp().item(), 4)
        ([[0, 2]], 0.15)
    """
    checks.check_vocabulary("teacher_logits", teacher_logits)
    vocabulary = teacher_logits.shape[-1]
    k = checks.check_integer("k", k)
    if not 1 <= k <= min(vocabulary, MOST_PAIRS):
        raise ValueError(f"k: expected an integer from 1 to {min(vocabulary, MOST_PAIRS)}, got {k}")
    temperature = checks.check_number("temperature", temperature, above=0.0)
    rows = teacher_logits.detach().reshape(-1, vocabulary)
    n, device = rows.shape[0], rows.device
    ids = torch.empty(n, k, dtype=torch.int32, device=device)
    log_probs = torch.empty(n, k, dtype=torch.float32, device=device)
    log_tail = torch.empty(n, dtype=torch.float32, device=device)
    step = max(BLOCK_BYTES // (4 * vocabulary), 1)
    for start in range(0, n, step):
        some = slice(start, start + step)
        scaled = rows[some].float() / temperature
        lse = scaled.logsumexp(-1, keepdim=True)
        top, index = scaled.topk(k, dim=-1)
        ids[some], log_probs[some] = index.int(), top - lse
        log_tail[some] = scaled.scatter_(-1, index, -math.inf).logsumexp(-1) - lse[:, 0]
    leading = teacher_logits.shape[:-1]
    return SparseTeacher(
        ids.view(*leading, k),
        log_probs.view(*leading, k),
        log_tail.view(leading),
        temperature=temperature,
    )


def check_supported(divergence: Divergence, outside: Outside) -> None:
    """A divergence that pairs suffice for."""
    if outside == "zero" and not isinstance(divergence, ForwardKL):
        raise ValueError(
            "divergence: expected ForwardKL() for outside='zero', as no other divergence is finite "
            f"or unbiased without the rest, got {divergence}; use outside='bucket'"
        )
    if isinstance(divergence, (DKD, EntropySwitch)):
        works = ", ".join(
            kind.__name__ for kind in FAMILY.values() if kind not in (DKD, EntropySwitch)
        )
        raise ValueError(
            f"divergence: expected one that a SparseTeacher suffices for ({works}), got "
            f"{divergence}, which needs the teacher's probability of every token"
        )
