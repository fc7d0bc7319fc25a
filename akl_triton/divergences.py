"""The family: what the loss of a token is, as frozen dataclasses that check their fields when made.

A divergence reaches the operators as a string and a list of numbers (`Divergence.pack`): what is a
string compiles a kernel of its own, what is a number does not.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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


def number(
    default: float, above: float, below: float, *, closed: bool = False, instead: str = ""
) -> Any:
    """A field that is a number between two bounds; `instead` says what to use at or beyond them."""
    check = partial(checks.check_number, above=above, below=below, closed=closed, instead=instead)
    return dataclasses.field(default=default, metadata={"check": check})


def choice(default: str, choices: Sequence[str]) -> Any:
    """A field that is one of a few strings."""
    check = partial(checks.check_choice, choices=choices)
    return dataclasses.field(default=default, metadata={"check": check})


class TwoKL(Divergence):
    """A loss ``w forward_kl + (1 - w) reverse_kl`` of each token."""

    @property
    def fixed_weight(self) -> float | None:
        """w, or None where each token has its own."""
        raise NotImplementedError


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


FAMILY: dict[str, type[Divergence]] = {}


def register(kind: type[Divergence]) -> None:
    """Make a member known by its name."""
    kind._checks = {f.name: f.metadata["check"] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    FAMILY[kind.name] = kind


for _kind in (AdaptiveKL, ForwardKL, ReverseKL, MixedKL):
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
        raise TypeError(
            "divergence: expected a member of the family, such as AdaptiveKL(), or its name, got "
            f"{checks.type_of(given)}; a class of your own has to be registered"
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
    """What makes a loss of a token's logits: all that a backend has to know but the tensors."""

    divergence: Divergence
    temperature: float = 1.0
    student_map: LogitMap = LogitMap()
    teacher_map: LogitMap = LogitMap()

    @property
    def rate(self) -> float:
        """The most that the derivative of a scaled logit is, by the student's own."""
        return self.student_map.scale / self.temperature

    def pack(self) -> tuple[Any, ...]:
        """The operators' arguments of RULE_SCHEMA, which `unpack` reads."""
        key, numbers = self.divergence.pack()
        return key, numbers, self.temperature, *self.student_map, *self.teacher_map

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> Rule:
        (
            key,
            numbers,
            temperature,
            student_softcap,
            student_scale,
            teacher_softcap,
            teacher_scale,
        ) = packed
        return cls(
            _unpack(key, numbers),
            temperature,
            LogitMap(student_softcap, student_scale),
            LogitMap(teacher_softcap, teacher_scale),
        )


RULE_SCHEMA = """str divergence, float[] numbers, float temperature,
    float? student_softcap, float student_logit_scale,
    float? teacher_softcap, float teacher_logit_scale"""


def _unpack(key: str, numbers: Sequence[float]) -> Divergence:
    """The divergence that `Divergence.pack` gave."""
    name, *words = key.split(" ")
    kind = FAMILY[name]
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
