"""The family: what the loss of a token is, as frozen dataclasses that check their fields when made.

A divergence reaches the operators as a string and a list of numbers (`Divergence.pack`): what is a
string compiles a kernel of its own, what is a number does not.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

from . import checks
from .rows import LogitMap

Head: TypeAlias = Literal["exclusive", "inclusive"]
Ties: TypeAlias = Literal["stable", "average"]
HEADS: tuple[Head, ...] = ("exclusive", "inclusive")
TIES: tuple[Ties, ...] = ("stable", "average")


class Divergence:
    """A member of the family: base of the dataclasses below, and of those that `register` takes.

    With ``p = softmax(teacher / T)``, ``q = softmax(student / T)`` and ``u_i = ln p_i - ln q_i``
    every member is a loss per token, in nats. A token that is -inf on either side takes the limit
    of the member's formula where that is finite, and is dropped where it is infinite.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False  # whether the loss of a token depends on its label
    _checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {}

    def __post_init__(self) -> None:
        for name, check in self._checks.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def pack(self) -> tuple[str, list[float]]:
        """(the name and the fields that are words, those that are numbers): `unpack` reads both."""
        words, numbers = [self.name], []
        for name in self._checks:
            value = getattr(self, name)
            if isinstance(value, (str, bool)):
                words.append(str(value))
            else:
                numbers.append(value)
        return " ".join(words), numbers

    @property
    def steepness(self) -> float:
        """A number c for which ``|dloss/ds_j| <= c (2 + loss) / T`` in every row.

        Phi in normal form is never negative, so that no phi_j is above the loss. Where c = 1, every
        g_j lies between -2 max(p_j - q_j, 0) and phi_j + 2 max(q_j - p_j, 0); of the sum of either
        maximum, at most 1 - q_j belongs to entries other than j. (The skew KLs and Jensen-Shannon
        are bounded as KLs are, see `rows.damping`: their mixture only shrinks g.)"""
        return 1.0


def number(
    default: float,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    closed: bool = False,
    instead: str = "",
    without: Mapping[float, str] | None = None,
) -> Any:
    """A field that is a number between two bounds.

    `instead` says what to use at or beyond them; `without` are numbers in between that are refused,
    with what to use in their place."""
    check = functools.partial(
        checks.check_number,
        above=above,
        below=below,
        closed=closed,
        instead=instead,
        without=without or {},
    )
    return dataclasses.field(default=default, metadata={"check": check})


def choice(default: str, choices: Sequence[str]) -> Any:
    """A field that is one of a few strings."""
    check = functools.partial(checks.check_choice, choices=choices)
    return dataclasses.field(default=default, metadata={"check": check})


def flag(default: bool) -> Any:
    """A field that is True or False."""
    return dataclasses.field(default=default, metadata={"check": checks.check_flag})


class TwoKL(Divergence, ABC):
    """A loss ``w forward_kl + (1 - w) reverse_kl`` of each token, or as `EntropySwitch` and `DKD`
    say."""

    @property
    @abstractmethod
    def fixed_weight(self) -> float | None:
        """w, or None where each token has its own."""


@dataclasses.dataclass(frozen=True)
class AdaptiveKL(TwoKL):
    r"""Forward and reverse KL, weighted per token by where the two distributions still differ.

    Math:
        With the head H, the top of the teacher's sorted mass::

            forward_kl = sum_i p_i (ln p_i - ln q_i)       reverse_kl = sum_i q_i (ln q_i - ln p_i)
            w = sum_{i in H} |p_i - q_i| / sum_i |p_i - q_i|           (1/2 where p = q)
            loss = w forward_kl + (1 - w) reverse_kl

        w is a constant of the backward pass. ``head="exclusive"``: H is the longest prefix of the
        vocabulary, sorted by teacher logit, whose mass is <= mu, and always the first token;
        ``"inclusive"``: the shortest prefix whose mass is >= mu. Equal logits at the boundary:
        ``ties="stable"`` takes the lowest indices first, ``"average"`` gives each of the n of which
        k fit the weight k / n. Softcaps keep the order of the logits, and with it the head.

    Args:
        mu: teacher mass of the head, in (0, 1).
        head, ties: the rules above.

    Reference:
        Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
        Language Models", arXiv 2404.02657, section 4 (adaptive KL) and the authors' ``AKL.py``.

    Example:
        >>> from akl_triton import AdaptiveKL
        >>> AdaptiveKL(mu=0.8)
        AdaptiveKL(mu=0.8, head='exclusive', ties='stable')
    """

    name = "adaptive_kl"
    mu: float = number(0.5, above=0.0, below=1.0)
    head: Head = choice("exclusive", HEADS)
    ties: Ties = choice("stable", TIES)

    @property
    def fixed_weight(self) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class ForwardKL(TwoKL):
    """Forward KL divergence, KL(teacher || student).

    Math:
        ``loss = sum_i p_i (ln p_i - ln q_i)``.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Example:
        >>> from akl_triton import ForwardKL
        >>> ForwardKL()
        ForwardKL()
    """

    name = "forward_kl"

    @property
    def fixed_weight(self) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class ReverseKL(TwoKL):
    """Reverse KL divergence, KL(student || teacher).

    Math:
        ``loss = sum_i q_i (ln q_i - ln p_i)``.

    Reference:
        Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543.

    Example:
        >>> from akl_triton import ReverseKL
        >>> ReverseKL()
        ReverseKL()
    """

    name = "reverse_kl"

    @property
    def fixed_weight(self) -> float:
        return 0.0


@dataclasses.dataclass(frozen=True)
class MixedKL(TwoKL):
    """Forward and reverse KL with the same weight for every token.

    Math:
        ``loss = alpha forward_kl + (1 - alpha) reverse_kl``.

    Args:
        alpha: in [0, 1], the weight of the forward KL.

    Reference:
        The FKL + RKL baseline of Wu et al., arXiv 2404.02657.

    Example:
        >>> from akl_triton import MixedKL
        >>> MixedKL(alpha=0.25)
        MixedKL(alpha=0.25)
    """

    name = "mixed_kl"
    alpha: float = number(0.5, above=0.0, below=1.0, closed=True)

    @property
    def fixed_weight(self) -> float:
        return self.alpha


@dataclasses.dataclass(frozen=True)
class EntropySwitch(TwoKL):
    """Reverse KL, to which the forward KL is added where the teacher is uncertain.

    Math:
        ``loss = reverse_kl + [H(p) > tau] forward_kl``, ``H(p) = -sum_i p_i ln p_i``.

    Args:
        tau: in nats, >= 0, of the teacher at the temperature of the loss.

    Reference:
        Jin et al., "Entropy-Aware On-Policy Distillation of Language Models", arXiv 2603.07079.

    Example:
        >>> from akl_triton import EntropySwitch
        >>> EntropySwitch(tau=1.5)
        EntropySwitch(tau=1.5)
    """

    name = "entropy_switch"
    tau: float = number(
        0.8, above=0.0, closed=True, instead="below 0 it is the sum of both KLs: use Jeffreys()"
    )

    @property
    def fixed_weight(self) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class DKD(TwoKL):
    """Decoupled knowledge distillation: the label's token apart from all others.

    Math:
        With y the label, P = p_y, Q = q_y, and p', q' the distributions of the other tokens, each
        of which sums to 1::

            target = P ln(P / Q) + (1 - P) ln((1 - P) / (1 - Q))
            rest = sum_{i != y} p'_i (ln p'_i - ln q'_i)
            loss = alpha target + beta rest

        The forward KL is target + (1 - P) rest, so that it hides the rest where the teacher is
        sure. `target` and `rest` are the paper's TCKD and NCKD.

    Args:
        alpha, beta: >= 0, the weights of target and rest. The paper takes alpha = 1, and beta = 8
            on CIFAR-100, 0.5 on ImageNet.

    Labels:
        are needed, and have to be tokens of the student, as for ``kd_ratio``.

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", arXiv 2203.08679, eq. 7.

    Example:
        >>> from akl_triton import DKD
        >>> DKD(beta=2.0)
        DKD(alpha=1.0, beta=2.0)
    """

    name = "dkd"
    needs_labels = True
    fixed_weight = 1.0  # rest is a forward KL
    alpha: float = number(1.0, above=0.0, closed=True)
    beta: float = number(8.0, above=0.0, closed=True)

    @property
    def steepness(self) -> float:
        return max(1.0, (self.alpha + self.beta) / 2.0)


class SumOfTerms(Divergence):
    """A loss ``sum_i phi(p_i, q_i)`` of each token: one function of an entry is all of its code.

    Math:
        With ``g = q dphi/dq`` and ``G = sum_i g_i``, ``dloss/ds_j = (g_j - q_j G) / T``.
    """

    @property
    def terms(self) -> str:
        """The name of its functions of an entry, in kernels/terms.py and in terms.py."""
        return self.name

    @property
    def numbers(self) -> tuple[float, ...]:
        """The fields that are numbers, which those functions are given."""
        return tuple(self.pack()[1])

    @property
    def limits(self) -> tuple[bool, bool]:
        """Whether phi has a finite limit at (p, 0), and at (0, q)."""
        return True, True


@dataclasses.dataclass(frozen=True)
class JensenShannon(SumOfTerms):
    """Generalised Jensen-Shannon divergence: both sides against their mixture.

    Math:
        ``loss = beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``. It tends
        to 0 where beta tends to 0 or 1; divided by beta, or by 1 - beta, to a KL divergence.

    Args:
        beta: in (0, 1), the weight of the teacher in the mixture, as in GKD, TRL and Liger.

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649, eq. 1.

    Example:
        >>> from akl_triton import JensenShannon
        >>> JensenShannon(beta=0.1)
        JensenShannon(beta=0.1)
    """

    name = "jensen_shannon"
    beta: float = number(
        0.5, above=0.0, below=1.0, instead="at 0 and 1 it is 0: use ForwardKL() or ReverseKL()"
    )


@dataclasses.dataclass(frozen=True)
class SkewKL(SumOfTerms):
    """Skew KL divergence: the teacher against a mixture that keeps the ratio bounded.

    Math:
        ``loss = KL(p || m)``, ``m = alpha p + (1 - alpha) q``.

    Args:
        alpha: in (0, 1), the weight of the teacher in the mixture.

    Reference:
        Ko et al., "DistiLLM", arXiv 2402.03898, eq. 3.

    Example:
        >>> from akl_triton import SkewKL
        >>> SkewKL()
        SkewKL(alpha=0.1)
    """

    name = "skew_kl"
    alpha: float = number(
        0.1, above=0.0, below=1.0, instead="at 0 it is ForwardKL(), and at 1 it is 0"
    )


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(SumOfTerms):
    """Skew reverse KL divergence: the student against a mixture that keeps the ratio bounded.

    Math:
        ``loss = KL(q || m)``, ``m = (1 - alpha) p + alpha q``.

    Args:
        alpha: in (0, 1), the weight of the student in the mixture.
        detach: whether m is a constant of the backward pass.

    Reference:
        Ko et al., "DistiLLM", arXiv 2402.03898; with `detach` "DistiLLM-2", arXiv 2503.07067.

    Example:
        >>> from akl_triton import SkewReverseKL
        >>> SkewReverseKL(detach=True)
        SkewReverseKL(alpha=0.1, detach=True)
    """

    name = "skew_reverse_kl"
    alpha: float = number(
        0.1, above=0.0, below=1.0, instead="at 0 it is ReverseKL(), and at 1 it is 0"
    )
    detach: bool = flag(False)

    @property
    def terms(self) -> str:
        return f"{self.name}_detached" if self.detach else self.name


@dataclasses.dataclass(frozen=True)
class TotalVariation(SumOfTerms):
    """Total variation distance, half of the gap: bounded, and blind to ratios.

    Math:
        ``loss = 1/2 sum_i |p_i - q_i|``.

    Reference:
        Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        arXiv 2307.15190.

    Example:
        >>> from akl_triton import TotalVariation
        >>> TotalVariation()
        TotalVariation()
    """

    name = "total_variation"


@dataclasses.dataclass(frozen=True)
class LKHybrid(SumOfTerms):
    """Forward KL far from the teacher, total variation near to it: for draft models.

    Math:
        ``loss = w forward_kl + (1 - w) total_variation``, ``w = exp(-eta (1 - total_variation))`` a
        constant of the backward pass. ``1 - total_variation`` is the rate at which speculative
        decoding accepts what the student drafts.

    Args:
        eta: > 0, how fast the forward KL loses its weight as the rate rises.

    Reference:
        Samarin et al., "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding",
        arXiv 2602.23881, the hybrid objective.

    Example:
        >>> from akl_triton import LKHybrid
        >>> LKHybrid()
        LKHybrid(eta=3.0)
    """

    name = "lk_hybrid"
    terms = "total_variation"
    numbers = ()
    eta: float = number(3.0, above=0.0)


@dataclasses.dataclass(frozen=True)
class DecoupledKL(SumOfTerms):
    """Forward KL, and apart from it the spread of what the logits differ by.

    Math:
        With w_i proportional to p_i^kappa and ``u_i = ln p_i - ln q_i``, which is (t_i - s_i) / T
        up to a constant of the row::

            loss = alpha forward_kl + beta / 2 (sum_i w_i u_i^2 - (sum_i w_i u_i)^2)

        For kappa = 1 the second part, the paper's weighted mean squared error of all pairs of
        logits, is ``1/4 sum_ij p_i p_j ((t_i - t_j) - (s_i - s_j))^2``: a variance, which takes no
        pairs. The paper's first part is the cross-entropy, larger by the teacher's entropy, which
        has no gradient. w is that of the tokens which are finite on both sides, as they alone are
        summed.

    Args:
        alpha, beta: >= 0, the weights of both parts.
        kappa: in [0, 4]: 0 weighs all tokens alike, and a large one the most probable alone.

    Reference:
        Cui et al., "Decoupled Kullback-Leibler Divergence Loss", arXiv 2305.13948, theorem 1, where
        the student's side of the squared error has a gradient as in its IKL; kappa is the gamma of
        its successor, "Generalized Kullback-Leibler Divergence Loss", arXiv 2503.08038.

    Example:
        >>> from akl_triton import DecoupledKL
        >>> DecoupledKL(beta=0.5)
        DecoupledKL(alpha=1.0, beta=0.5, kappa=1.0)
    """

    name = "decoupled_kl"
    terms = "moments"
    limits = (False, False)
    alpha: float = number(1.0, above=0.0, closed=True)
    beta: float = number(1.0, above=0.0, closed=True)
    kappa: float = number(1.0, above=0.0, below=4.0, closed=True)

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.kappa,)

    @property
    def steepness(self) -> float:
        # w_j |u_j - mean| <= sqrt(variance), and beta sqrt(variance) <= beta / 2 + loss.
        return max(1.0, (self.alpha + 0.5 * self.beta) / 2.0)


@dataclasses.dataclass(frozen=True)
class Alpha(SumOfTerms):
    """Alpha divergence: Hellinger (1/2), Pearson's chi squared (2), Tsallis, up to a factor.

    Math:
        ``loss = (sum_i p_i^a q_i^(1 - a) - 1) / (a (a - 1))``. It tends to the forward KL where a
        tends to 1, and to the reverse KL where a tends to 0.

    Args:
        a: any number but 0 and 1. Entries that are -inf are dropped where their limit is infinite:
            on the student's side for a >= 1, on the teacher's for a <= 0.

    Reference:
        Amari, "Differential-Geometrical Methods in Statistics", 1985.

    Example:
        >>> from akl_triton import Alpha
        >>> Alpha(a=2.0)
        Alpha(a=2.0)
    """

    name = "alpha"
    a: float = number(0.5, without={0.0: "ReverseKL()", 1.0: "ForwardKL()"})

    @property
    def limits(self) -> tuple[bool, bool]:
        return self.a < 1.0, self.a > 0.0

    @property
    def steepness(self) -> float:
        return _steepness_of_powers(self.a, 1.0 - self.a)


@dataclasses.dataclass(frozen=True)
class AlphaBeta(SumOfTerms):
    """Alpha-beta divergence, which shifts mass between hardness and confidence.

    Math:
        With l = a + b, ``loss = sum_i (a p_i^l + b q_i^l - l p_i^a q_i^b) / (a b l)``. With
        l = 1 it is `Alpha`.

    Args:
        a, b: numbers of which neither nor their sum is 0.

    Reference:
        Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
        Distillation via alpha-beta-Divergence", arXiv 2505.04560, eq. 5.

    Example:
        >>> from akl_triton import AlphaBeta
        >>> AlphaBeta(a=0.2, b=0.7)
        AlphaBeta(a=0.2, b=0.7)
    """

    name = "alpha_beta"
    a: float = number(0.2, without={0.0: "Alpha() near 0, or ReverseKL() for b = 1"})
    b: float = number(0.7, without={0.0: "ForwardKL() for a = 1"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a + self.b == 0.0:
            raise ValueError(
                f"b: expected a number whose sum with a is not 0, got a = {self.a}, b = {self.b}"
            )

    @property
    def limits(self) -> tuple[bool, bool]:
        return self.b > 0.0 < self.a + self.b, self.a > 0.0 < self.a + self.b

    @property
    def steepness(self) -> float:
        return _steepness_of_powers(self.a, self.b)


# The widest vocabulary for which `steepness` holds.
WIDEST = 2.0**20
# The steepness of a divergence without a bound: with it `rows.room` is 1, which leaves a gradient
# in fp16 as large as it is.
UNBOUNDED = 2.0**13


def _steepness_of_powers(a: float, b: float) -> float:
    """`SumOfTerms.steepness` of the alpha-beta divergence.

    With l = a + b, g = b phi - D with D = (p^l - q^l) / l. If l >= 1, |D| <= |p - q|. If 0 < l < 1,
    D^2 <= 2 k phi max(p, q)^l, and by Cauchy and Schwarz the |D_i| sum to no more than
    sqrt(4 k W loss), where W = V^(1-l) is the most that the p_i^l sum to. With l < 0 there is no
    bound."""
    total = a + b
    if total < 0.0:
        return UNBOUNDED
    if total >= 1.0:
        return max(1.0, abs(b))
    k = max(1.0, max(abs(a), abs(b)) / (2.0 * total))
    return abs(b) + math.sqrt(k) * (0.5 + math.sqrt(0.5 * WIDEST ** (1.0 - total)))


@dataclasses.dataclass(frozen=True)
class ToDi(SumOfTerms):
    """Token-wise distillation: forward and reverse KL, weighted per entry by which side is larger.

    Math:
        ``loss = sum_i (p_i - q_i) (ln p_i - ln q_i)`` in value: ``sum_i v_i p_i u_i - (1 - v_i) q_i
        u_i`` with v = sigmoid(u) a constant of the backward pass is weighted so that its gradient
        is ``g = (q - p) - u q^2 / (p + q)``.

    Reference:
        Jung et al., "ToDi: Token-wise Distillation via Fine-Grained Divergence Control",
        arXiv 2505.16297.

    Example:
        >>> from akl_triton import ToDi
        >>> ToDi()
        ToDi()
    """

    name = "todi"
    limits = (False, False)


@dataclasses.dataclass(frozen=True)
class Jeffreys(SumOfTerms):
    """Jeffreys divergence: the sum of forward and reverse KL.

    Math:
        ``loss = sum_i (p_i - q_i) (ln p_i - ln q_i)``, which is forward_kl + reverse_kl.

    Reference:
        Jeffreys, "An invariant form for the prior probability in estimation problems", 1946.

    Example:
        >>> from akl_triton import Jeffreys
        >>> Jeffreys()
        Jeffreys()
    """

    name = "jeffreys"
    limits = (False, False)


FAMILY: dict[str, type[Divergence]] = {}


class Terms(NamedTuple):
    """The functions of an entry that a member of one's own brings."""

    triton: Callable[..., Any] | None
    torch: Callable[..., Any] | None


TERMS: dict[str, Terms] = {}


def register(
    kind: type[Divergence],
    *,
    triton: Callable[..., Any] | None = None,
    torch: Callable[..., Any] | None = None,
) -> None:
    """Make a divergence of one's own a member of the family, known by its name.

    Args:
        kind: a frozen dataclass that derives from `SumOfTerms`, with a class attribute ``name``,
            whose fields are made by ``number``, ``choice`` or ``flag`` of akl_triton.divergences;
            at most two are numbers.
        triton: its function of an entry for the kernels, as those of kernels/terms.py, decorated
            with ``triton.jit``; without it, only the PyTorch backend has the member.
        torch: the same for the PyTorch backend, as those of terms.py.

    Raises:
        ValueError: the name is taken by another member, or there are more than two numbers.
    """
    if FAMILY.get(kind.name, kind) is not kind:
        raise ValueError(
            f"kind: expected a name that no other member has, got {kind.name!r} of "
            f"{checks.type_of(kind)}"
        )
    kind._checks = {f.name: f.metadata["check"] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if issubclass(kind, SumOfTerms) and len(numbers := kind().numbers) > 2:
        raise ValueError(
            f"kind: expected at most two numbers for its function of an entry, which is what "
            f"kernels take, got {len(numbers)} of {checks.type_of(kind)}"
        )
    FAMILY[kind.name] = kind
    if triton is not None or torch is not None:
        TERMS[kind.name] = Terms(triton, torch)


for _kind in (
    *(AdaptiveKL, ForwardKL, ReverseKL, MixedKL, EntropySwitch, DKD),
    *(JensenShannon, SkewKL, SkewReverseKL, TotalVariation, LKHybrid, DecoupledKL),
    *(Alpha, AlphaBeta, ToDi, Jeffreys),
):
    register(_kind)


def divergence(name: str, **numbers: Any) -> Divergence:
    """The member of that name, with its numbers: for trainers that are configured by text.

    Args:
        name: the name of a member in small letters, such as "adaptive_kl".
        numbers: its fields, where they are not the defaults.

    Raises:
        ValueError, TypeError: there is no such member, or it has no such field; the message lists
            those there are, the most similar first.

    Example:
        >>> import akl_triton
        >>> akl_triton.divergence("mixed_kl", alpha=0.25)
        MixedKL(alpha=0.25)
    """
    checks.check_choice("divergence", name, nearest_first(name, FAMILY))
    kind = FAMILY[name]
    check_names(kind.__name__, numbers, kind._checks)
    return kind(**numbers)


def resolve(given: Divergence | str) -> Divergence:
    """The divergence that the option of that name means."""
    if isinstance(given, str):
        return divergence(given)
    if FAMILY.get(getattr(given, "name", "")) is not type(given):
        got = (
            f"the class {given.__name__}; make one, {given.__name__}()"
            if isinstance(given, type)
            else f"{checks.type_of(given)}; a class of your own has to be registered"
        )
        raise TypeError(
            "divergence: expected a member of the family, such as AdaptiveKL(), or its name, got "
            + got
        )
    return given


def nearest_first(name: object, known: Iterable[str]) -> list[str]:
    """The known names, those that a typing error could have meant before the others."""
    near = difflib.get_close_matches(str(name), known := list(known))
    return near + [other for other in known if other not in near]


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for the first name that the owner does not know."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"{owner}: expected options among {', '.join(known)}, got {name}{meant}"
            )


class Rule(NamedTuple):
    """The rule that makes a loss of logits: all that a backend has to know, besides the tensors."""

    divergence: Divergence
    temperature: float = 1.0
    student_map: LogitMap = LogitMap()
    teacher_map: LogitMap = LogitMap()
    divergence_weight: float = 1.0  # the loss is the sum of these times the divergence
    label_weight: float = 0.0  # and the cross-entropy of the student at T = 1 with the labels
    rest: bool = False  # whether all other tokens are an entry, the last, which is in no head
    vocab_size: int | None = None  # tokens of both sides, where the logits are padded

    @property
    def needs_labels(self) -> bool:
        """Whether the loss of a token depends on its label."""
        return self.label_weight > 0.0 or self.divergence.needs_labels

    @property
    def rate(self) -> float:
        """The most that the derivative of a scaled logit is, by the student's own."""
        return self.student_map.scale / self.temperature

    @property
    def bound(self) -> float:
        """A number for which the gradient of a row is at most that times (2 + |loss|)."""
        of_divergence = self.rate * self.divergence.steepness * max(1.0, self.divergence_weight)
        return of_divergence + self.label_weight * self.student_map.scale

    def pack(self) -> tuple[str, list[float]]:
        """The operators' arguments of RULE_SCHEMA, which `unpack` reads. A softcap of 0 is none."""
        key, numbers = self.divergence.pack()
        maps = [x or 0.0 for side in (self.student_map, self.teacher_map) for x in side]
        weights = [self.divergence_weight, self.label_weight]
        shape = [float(self.rest), float(self.vocab_size or 0)]
        return key, [self.temperature, *maps, *weights, *shape, *numbers]

    @classmethod
    def unpack(cls, key: str, numbers: Sequence[float]) -> Rule:
        kind = FAMILY[key.split(" ", 1)[0]]
        return _unpacked(kind, key, tuple(numbers))  # type: ignore[arg-type]


# Two arguments, as PyTorch takes a time that is quadratic in their number.
RULE_SCHEMA = "str divergence, float[] numbers"


@functools.lru_cache(maxsize=256)
def _unpacked(kind: type[Divergence], key: str, numbers: tuple[float, ...]) -> Rule:
    """The rule that `Rule.pack` gave; a step of training has the same one again and again."""
    temperature, cap_s, scale_s, cap_t, scale_t, weight, label_weight, *shape = numbers[:9]
    maps = LogitMap(cap_s or None, scale_s), LogitMap(cap_t or None, scale_t)
    rest, vocab_size = shape[0] != 0.0, int(shape[1]) or None
    divergence = _divergence_of(kind, key, numbers[9:])
    return Rule(divergence, temperature, *maps, weight, label_weight, rest, vocab_size)


def _divergence_of(kind: type[Divergence], key: str, numbers: Sequence[float]) -> Divergence:
    """The divergence that `Divergence.pack` gave."""
    _, *words = key.split(" ")
    of_words, of_numbers = iter(words), iter(numbers)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if isinstance(field.default, bool):
            values[field.name] = next(of_words) == "True"
        elif isinstance(field.default, str):
            values[field.name] = next(of_words)
        else:
            values[field.name] = next(of_numbers)
    return kind(**values)
