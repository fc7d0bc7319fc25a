"""The options of the losses, each in one place: its name, type, default, check and description.

The signatures and docstrings of the public functions, the checks of the modules and the tables of
the documentation are made from the annotations here.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import TypedDict

from . import checks
from .divergences import Divergence, check_names

Reduction: TypeAlias = Literal["none", "sum", "mean"]
Backend: TypeAlias = Literal["auto", "triton", "torch"]
REDUCTIONS: tuple[Reduction, ...] = ("none", "sum", "mean")
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")


class Option(NamedTuple):
    """An option, but for its name and type."""

    default: Any
    text: str
    check: Callable[[str, Any], Any] | None = None  # None: it belongs to a call, which checks it


_positive = partial(checks.check_number, above=0.0)


class SharedOptions(TypedDict, total=False):
    """The options that every loss has."""

    temperature: Annotated[float, Option(1.0, "T > 0 of both distributions", _positive)]
    kd_ratio: Annotated[
        float,
        Option(
            1.0,
            "in [0, 1]: the loss is `kd_ratio * divergence + (1 - kd_ratio) * cross_entropy`, the "
            "latter of the student at T = 1 with the labels, which then have to be tokens. A label "
            "that is none is refused on a CPU, and makes its row NaN on a GPU, which nobody waits "
            "for",
            partial(checks.check_number, above=0.0, below=1.0, closed=True),
        ),
    ]
    mask: Annotated[
        Tensor | None,
        Option(
            None,
            "`[...]` bool, True for the tokens that count; with labels, a token counts where both "
            "say so. A mask of 0 and 1 passed as `labels` is not noticed: every token would count",
        ),
    ]
    token_weights: Annotated[
        Tensor | None,
        Option(
            None,
            "`[...]`, multiply the loss of each token; the mean still divides by the number of "
            "tokens",
        ),
    ]
    ignore_index: Annotated[
        int, Option(-100, "the label of tokens that do not count", checks.check_integer)
    ]
    reduction: Annotated[
        Reduction,
        Option(
            "mean",
            '"none" (the shape of labels), "sum", or "mean" over the tokens that count',
            partial(checks.check_choice, choices=REDUCTIONS),
        ),
    ]
    num_items: Annotated[
        float | Tensor | None,
        Option(
            None,
            "replaces that count in the mean: a number or a 0-d tensor >= 0 (on a GPU not checked: "
            "that would wait for it), the tokens of all micro-batches of a step; 0, where all of "
            "these are ignored, is taken as 1 and gives 0",
        ),
    ]
    vocab_size: Annotated[
        int | None,
        Option(
            None,
            "the tokens of a vocabulary that is padded (Qwen 2.5: 151665 of 151936 and 152064 "
            "logits): the logits from there on have no probability on either side, and a gradient "
            "of exactly 0; nothing is copied",
            checks.check_optional_integer,
        ),
    ]
    scale_by_t2: Annotated[
        bool,
        Option(
            False,
            "multiply the divergence by T^2 (Hinton et al., arXiv 1503.02531)",
            checks.check_flag,
        ),
    ]
    backend: Annotated[
        Backend,
        Option(
            "auto",
            '"auto" is "triton" where it can run, else "torch"',
            partial(checks.check_choice, choices=BACKENDS),
        ),
    ]


class CommonOptions(SharedOptions, total=False):
    """Those of the losses of tensors, whose positions and maps they do not know."""

    shift: Annotated[
        int,
        Option(
            0,
            "compare the logits of position i with label i + shift (1: next-token labels as in the "
            "batch), and likewise with mask and token_weights; the last positions then have no "
            "label and do not count",
            checks.check_shift,
        ),
    ]
    student_softcap: Annotated[
        float | None,
        Option(
            None,
            "of a model that caps its logits (Gemma 2: 30), where those passed are not capped yet: "
            "the logits are `softcap tanh(logit_scale x / softcap)` of what is passed, x",
            checks.check_softcap,
        ),
    ]
    teacher_softcap: Annotated[
        float | None, Option(None, "the same of the teacher", checks.check_softcap)
    ]
    student_logit_scale: Annotated[
        float,
        Option(
            1.0,
            "of a model that scales its logits (Cohere's `logit_scale`, 1 / Granite's "
            "`logits_scaling`), where they are not scaled yet",
            _positive,
        ),
    ]
    teacher_logit_scale: Annotated[float, Option(1.0, "the same of the teacher", _positive)]
    group: Annotated[
        ProcessGroup | str | None,
        Option(
            None,
            "the process group over which the vocabulary is sharded, or its name: each rank passes "
            "its own columns of both sides, in the order of the ranks, and has the whole loss and "
            "the gradient of its columns. All ranks make the same call. DTensors bring their group "
            "along: see docs/vocabulary_parallel.md",
            checks.check_group,
        ),
    ]


class LossOptions(CommonOptions, total=False):
    """The options of the losses of logits."""

    inplace: Annotated[
        bool,
        Option(
            False,
            "compute the gradient in the forward pass into the storage of `student_logits`, which "
            "are consumed: whatever else reads them must have done so; only where a gradient is "
            "needed, and for one backward pass",
            checks.check_flag,
        ),
    ]


class ChunkOptions(TypedDict, total=False):
    """The options of how hidden states are made into logits."""

    chunk_bytes: Annotated[
        int | None,
        Option(
            None,
            "bytes that the logits of both sides may take at a time; by default 1 GiB, on a CPU "
            "256 MiB",
            checks.check_optional_integer,
        ),
    ]
    accum_dtype: Annotated[
        torch.dtype,
        Option(
            torch.float32,
            "in which the gradients of weight and bias are summed over the chunks",
            checks.check_accum_dtype,
        ),
    ]


class LinearLossOptions(CommonOptions, ChunkOptions, total=False):
    """The options of the losses of hidden states."""

    student_bias: Annotated[Tensor | None, Option(None, "`[V_s]`, the bias of the lm_head")]
    teacher_bias: Annotated[Tensor | None, Option(None, "`[V_t]`, the same of the teacher")]


class ModelLossOptions(SharedOptions, ChunkOptions, total=False):
    """The options of the loss of two models, which know the rest."""


RETURN_STATS = Option(False, "also return `DivergenceStats`", checks.check_flag)


def _table(options: type) -> dict[str, Option]:
    hints = get_type_hints(options, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


LOSS_OPTIONS = _table(LossOptions)
LINEAR_LOSS_OPTIONS = _table(LinearLossOptions)
MODEL_LOSS_OPTIONS = _table(ModelLossOptions)


def resolved(
    owner: str,
    divergence: Divergence | type[Divergence],
    table: Mapping[str, Option],
    given: Mapping[str, Any],
) -> tuple[Divergence, dict[str, Any]]:
    """The divergence, and the options that are given, checked but for those that a call checks.

    `divergence` is a class where its fields are options of the owner, as with the short names."""
    own = divergence._checks if isinstance(divergence, type) else {}
    check_names(owner, given, (*own, *table))
    options = {}
    for name, value in given.items():
        if name not in own:
            check = table[name].check
            options[name] = value if check is None else check(name, value)
    if isinstance(divergence, type):
        divergence = divergence(**{name: given[name] for name in own if name in given})
    return divergence, options


def completed(table: Mapping[str, Option], options: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option."""
    return {name: options.get(name, option.default) for name, option in table.items()}


_Function = TypeVar("_Function", bound=Callable[..., Any])


def documented(
    options: type, kind: type[Divergence] | None = None
) -> Callable[[_Function], _Function]:
    """Give a public function the signature that its ``**options`` stand for, and their text.

    The docstring's line ``{options}`` becomes a list of them. `kind` is the divergence of a short
    name, whose fields are options, too."""

    def complete(function: _Function) -> _Function:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        table = _table(options)
        hints = get_type_hints(options)
        keyword = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        if kind is not None:
            named += [keyword(n, default=getattr(kind, n)) for n in kind._checks]
        named += [
            keyword(name, default=option.default, annotation=hints[name])
            for name, option in table.items()
        ]
        function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        text = "\n".join(_argument(name, option.text) for name, option in table.items())
        function.__doc__ = (function.__doc__ or "").replace("        {options}", text)
        return function

    return complete


def _argument(name: str, text: str) -> str:
    """A paragraph of a docstring's Args."""
    return textwrap.fill(
        f"{name}: {text}.", 100, initial_indent=" " * 8, subsequent_indent=" " * 12,
        break_long_words=False,
    )  # fmt: skip
