"""The lm_head of a causal language model: what it computes, and a function in its place.

    logits = softcap tanh(scale x / softcap)   or   scale x,   of   x = hidden @ weight^T + bias

A function in the place of the lm_head runs inside the forward of the model, and so of whatever
wraps it: the parameters that it reads are whole, and their gradients are reduced, where and when
those of the lm_head would be.

What becomes of x is not read from the configuration, where each family of models has a name of its
own for it: the model is run with known numbers in place of x, and its logits show the map.

Tensor parallelism cuts the weight over its rows. It is a DTensor, Shard(0), also within the
forward, and hidden states next to it are made DTensors if they are not. How x lies on the ranks,
whole or by its columns, a DTensor or not, is not read from the parallel style either: the output of
the head shows it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import LOGIT_DTYPES, type_of
from ..sharding import is_dtensor

Kind: TypeAlias = Literal["linear", "lora", "modules_to_save"]
HeadFunction: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Any]

# The numbers in place of x are powers of two: no softcap bends the smallest, so that they show the
# scale, and the largest reach it.
_SMALLEST, _LARGEST = -20, 30
# In most vocabularies the first few are special.
_FIRST_TOKEN, _TOKENS = 5, 8
# The largest error of the logits, relative to the largest logit: rounding alone, for x is computed
# with the sums of the model in another order, and then mapped in fp32.
_TOLERANCE = 1e-5
_ROUNDINGS = 4


@dataclasses.dataclass(frozen=True)
class HeadInfo:
    """The lm_head of a model, as `describe_model` found it.

    Args:
        name: the module's name in the innermost model.
        kind: "linear", or how PEFT has adapted it: "lora" or "modules_to_save".
        vocab_size: V, the logits of a token; a weight with more rows is padded.
        hidden_size: H.
        bias: whether there is one.
        tied: whether the weight is that of the input embeddings.
        dtype: that of the weight.
        scale, softcap: ``logits = softcap tanh(scale x / softcap)``, or ``scale x`` where softcap
            is None, of ``x = hidden @ weight.T + bias``.
        error: the largest difference between `logits` and the model's own, on a few tokens,
            relative to the largest logit.
    """

    name: str
    kind: Kind
    vocab_size: int
    hidden_size: int
    bias: bool
    tied: bool
    dtype: torch.dtype
    scale: float
    softcap: float | None
    error: float

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits [..., V] fp32 of what `in_place_of_head` passes to its function."""
        x = F.linear(hidden, weight, bias)[..., : self.vocab_size]
        return _mapped(x.float(), self.scale, self.softcap)


def describe_model(model: nn.Module, input_ids: Tensor | None = None) -> HeadInfo:
    """Find out what the lm_head of a causal language model is, and what becomes of its output.

    Math:
        ``logits = softcap tanh(scale x / softcap)`` or ``scale x``, of ``x = hidden @ weight.T +
        bias``. The model is run twice, in eval mode and without gradients: once with powers of two
        in place of x, which gives scale and softcap, and once as it is, which gives the error.

    Args:
        model: a causal language model of transformers, also within PEFT, DistributedDataParallel
            or torch.compile, or after ``fully_shard``, or tensor parallel with an lm_head that is
            column-parallel (then on every rank).
        input_ids: ``[B, L]``, tokens that the model can be run on; by default eight of its first.

    Dtype:
        an lm_head of fp32, bf16 or fp16. Scale and softcap have the precision of fp32.

    Raises:
        TypeError: not such a model.
        ValueError: a loss cannot be computed in the place of its lm_head, and the message says
            why: the head is quantised, or not linear, or called more than once; prompt learning
            adds tokens; it is an encoder-decoder; the logits are another function of x; the head
            is sharded otherwise than over its rows, or an adapter is on one that is sharded.

    Example:
        >>> from transformers import Gemma2Config, Gemma2ForCausalLM
        >>> from akl_triton.integrations import describe_model
        >>> sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        >>> head = describe_model(Gemma2ForCausalLM(Gemma2Config(**sizes)))
        >>> head.name, head.vocab_size, head.tied, head.scale, head.softcap
        ('lm_head', 96, True, 1.0, 30.0)
    """
    return describe(model, input_ids, "model")


@contextmanager
def in_place_of_head(model: nn.Module, function: HeadFunction) -> Iterator[None]:
    """Make calls of the model return ``function(hidden, weight, bias)``.

    Math:
        ``hidden @ weight.T + bias`` is the output of the lm_head, with the adapters of PEFT that
        are active. `describe_model` says what becomes of it.

    The function is called where the model calls its lm_head, whose product is not computed. The
    model is called as always, wrapped or not, but without labels: it has no logits for them.

    Args:
        model: as for `describe_model`.
        function: of hidden ``[..., H]``, weight ``[V, H]`` and bias ``[V]`` or None. An active
            LoRA of rank r on the lm_head adds r to H on both. Where the lm_head is tensor parallel
            all of them are DTensors.

    Raises:
        TypeError, ValueError: as `describe_model`; a call of the model raises ValueError where it
            calls its lm_head more than once, or not at all.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from akl_triton.integrations import in_place_of_head
        >>> sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> with in_place_of_head(model, lambda hidden, weight, bias: (hidden @ weight[7]).sum()):
        ...     model(input_ids=torch.arange(6)[None]).shape
        torch.Size([])
    """
    with in_place_of(model, function, "model"):
        yield


class Found(NamedTuple):
    """The parts of a model that are needed here."""

    base: Any  # the innermost model, that of transformers
    name: str  # of its lm_head
    head: nn.Module  # as the model calls it
    linear: nn.Linear  # as it is without adapters
    kind: Kind


class _Described(NamedTuple):
    head: ref[nn.Module]  # that the model had then
    layouts: set[object]  # of its weight: FSDP2 leaves it whole, and shards it again
    info: HeadInfo


_DESCRIBED: WeakKeyDictionary[nn.Module, _Described] = WeakKeyDictionary()


def described(model: nn.Module, argument: str) -> tuple[Found, HeadInfo]:
    """The parts of a model, and what `describe` found when it had that head, sharded like that."""
    found = find(model, argument)
    known = _DESCRIBED.get(found.base)
    if known is None or known.head() is not found.head:
        return found, describe(model, None, argument)
    if _layout_of(found.linear.weight) not in known.layouts:
        return found, describe(model, None, argument)
    return found, known.info


def describe(model: nn.Module, input_ids: Tensor | None, argument: str) -> HeadInfo:
    """`describe_model` for another function, whose `argument` the model is."""
    found = find(model, argument)
    base, head = found.base, found.head
    layouts = {_layout_of(found.linear.weight)}
    if input_ids is None:
        input_ids = _some_tokens(base, found.linear)
    called = _unwrapped(model)
    forward = getattr(head, _computing(head))
    observed: list[tuple[Tensor, Tensor]] = []  # x by us and by the head
    returned: list[Tensor] = []  # by the head, whose hooks may lay x out anew
    probes: list[Tensor] = []
    refusals: list[ValueError] = []

    def observe(hidden: Tensor) -> Tensor:
        try:
            x = F.linear(*as_linear(found, hidden, argument))
        except ValueError as error:
            refusals.append(error)
            raise
        output: Tensor = forward(hidden)
        observed.append((x, output))
        return output

    def probe(hidden: Tensor) -> Any:
        probes.append(_powers(ours))
        return of_head.lay_out(probes[-1])

    def run(at_head: Callable[[Tensor], Any], calls: list[Any]) -> Tensor:
        """The logits of the model."""
        with _evaluated(called), torch.no_grad(), _replaced(head, _computing(head), at_head):
            try:
                result = called(input_ids=input_ids, **without_cache(base))
            except Exception as error:
                if error in refusals:
                    raise
                raise ValueError(
                    f"{argument}: expected a model that runs on input_ids {list(input_ids.shape)} "
                    f"alone, or describe_model(model, input_ids) with tokens that it takes, got "
                    f"{type(error).__name__} from {type(base).__name__}: {error}"
                ) from error
        if len(calls) != 1:
            refuse_calls(found, len(calls), argument)
        logits: Tensor = result[0] if isinstance(result, tuple) else result.logits
        return logits

    hook = head.register_forward_hook(lambda _, inputs, output: returned.append(output))
    try:
        logits = run(observe, observed)
    finally:
        hook.remove()
    x, output = observed[0]
    of_head = _layout(output, x, found, argument)
    of_model = _layout(returned[0] if returned else output, x, found, argument)
    ours, theirs = _whole(x), of_model.gather(logits, found, argument)
    mapped = of_model.gather(run(probe, probes), found, argument)
    scale, softcap = _map_of(probes[0], mapped, found, argument)
    info = HeadInfo(
        name=found.name,
        kind=found.kind,
        vocab_size=theirs.shape[-1],
        hidden_size=found.linear.weight.shape[1],
        bias=found.linear.bias is not None,
        tied=_weight_of(base.get_input_embeddings()) is found.linear.weight,
        dtype=found.linear.weight.dtype,
        scale=scale,
        softcap=softcap,
        error=_error(ours, theirs, scale, softcap, found, argument),
    )
    layouts.add(_layout_of(found.linear.weight))
    _DESCRIBED[base] = _Described(ref(head), layouts, info)
    return info


@contextmanager
def in_place_of(model: nn.Module, function: HeadFunction, argument: str) -> Iterator[None]:
    """`in_place_of_head` for another function, whose `argument` the model is."""
    found = find(model, argument)
    base, head = found.base, found.head
    forward = base.forward
    results: list[Any] = []

    def at_head(hidden: Tensor, *others: Any, **options: Any) -> Tensor:
        if results:
            refuse_calls(found, 2, argument)
        if others or options:
            raise ValueError(
                f"{argument}: expected a call of {found.name} with hidden states alone, got also "
                f"{', '.join(options) or len(others)}"
            )
        results.append(function(*as_linear(found, hidden, argument)))
        return hidden.new_zeros(*hidden.shape[:-1], 1)  # what follows maps it, and is dropped

    def redirected(*args: Any, **kwargs: Any) -> Any:
        results.clear()
        forward(*args, **kwargs)
        if not results:
            refuse_calls(found, 0, argument)
        return results.pop()

    with _replaced(head, _computing(head), at_head), _replaced(base, "forward", redirected):
        yield


def find(model: nn.Module, argument: str) -> Found:
    """The innermost model and its lm_head, or an error that says what stands in the way."""
    base = innermost(model, argument)
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{argument}: expected a causal language model, got {type(base).__name__}, an "
            "encoder-decoder, which needs inputs for its decoder"
        )
    head = base.get_output_embeddings()
    name = next((name for name, module in base.named_modules() if module is head), "lm_head")
    linear, kind = _linear_of(head)
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Linear) or not _is_plain(weight):
        of = f" with a weight of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"{argument}: expected an lm_head that is a torch.nn.Linear of fp32, bf16 or fp16, or "
            "plain LoRA or modules_to_save of one, neither quantised nor one of several, got "
            f"{type_of(linear)}{of} as {name} of {type(base).__name__}"
        )
    return Found(base, name, head, linear, kind)


def innermost(model: nn.Module, argument: str) -> Any:
    """The model of transformers within its wrappers."""
    peft = sys.modules.get("peft")
    inner: Any = _unwrapped(model)
    while peft is not None and isinstance(inner, (peft.PeftModel, peft.PeftMixedModel)):
        for name, config in inner.peft_config.items():
            if config.is_prompt_learning:
                raise ValueError(
                    f"{argument}: expected the logits of the input's tokens, got prompt learning "
                    f"({type(config).__name__} as adapter {name!r}), which adds tokens of its own"
                )
        inner = _unwrapped(inner.get_base_model())
    if not (hasattr(inner, "get_output_embeddings") and hasattr(inner, "config")):
        raise TypeError(
            f"{argument}: expected a causal language model of transformers, or one within PEFT, "
            f"DistributedDataParallel, torch.compile or fully_shard, got {type_of(inner)}"
        )
    return inner


def as_linear(found: Found, hidden: Tensor, argument: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) whose product is the output of the head.

    An active adapter of LoRA adds columns: ``scaling A dropout(hidden)`` to the hidden states, B to
    the weight. Their product is summed as PEFT does, which a bf16 weight plus B A would round.

    Where the weight is a DTensor here, within the forward, so are hidden states, whole on every
    rank. What the model passes is plain and on all ranks, or a DTensor, which may have some tokens
    on each."""
    head: Any = found.head
    weight: Any = found.linear.weight
    bias = found.linear.bias
    if is_dtensor(weight):
        _check_columns(found, weight, argument)
        hidden = _replicated(hidden, weight)
    elif 0 < len(weight) < found.linear.out_features:
        _refuse_sharding(found, f"{len(weight)} of {found.linear.out_features} rows", argument)
    if found.kind != "lora":
        return hidden, weight, bias
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    if head.disable_adapters or head.merged:
        return hidden, weight, bias
    if is_dtensor(weight):
        _refuse_sharding(found, f"{weight.placements} with an adapter of LoRA", argument)
    hiddens, weights = [hidden], [weight]
    for name in head.active_adapters:
        if name in head.lora_A:
            a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
            reduced = a(head.lora_dropout[name](hidden.to(a.weight.dtype))) * scaling
            hiddens.append(reduced.to(hidden.dtype))
            weights.append(b.weight.to(weight.dtype))
            if b.bias is not None:
                of_adapter = (b.bias * scaling).to(weight.dtype)
                bias = of_adapter if bias is None else bias + of_adapter
    return torch.cat(hiddens, -1), torch.cat(weights, -1), bias


def _check_columns(found: Found, weight: Any, argument: str) -> None:
    """Tensor parallelism has cut the weight over its rows, in one dimension of the mesh."""
    from torch.distributed.tensor import Shard

    # By their type: what FSDP2 makes of rows that are sharded twice is a Shard, too.
    rows = [p for p in weight.placements if type(p) is Shard and p.dim == 0]
    others = [p for p in weight.placements if p not in rows]
    if len(rows) != 1 or not all(p.is_replicate() for p in others):
        _refuse_sharding(found, weight.placements, argument)


def _refuse_sharding(found: Found, how: object, argument: str) -> NoReturn:
    raise ValueError(
        f"{argument}: expected an lm_head whose weight is whole within the forward, or a DTensor "
        "that is sharded over its rows, Shard(0), in one mesh dimension, as ColwiseParallel makes "
        f"it, without adapters, got {how} of {found.name} of {type(found.base).__name__}"
    )


def _replicated(hidden: Any, weight: Any) -> Tensor:
    """Hidden states whole on all ranks that have rows of the weight, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = [Replicate()] * weight.device_mesh.ndim
    if not is_dtensor(hidden):
        # Each rank's gradient is by its own columns: the sum is what it passes on.
        return DTensor.from_local(hidden, weight.device_mesh, whole, run_check=False)
    replicated: Tensor = hidden.redistribute(placements=whole)
    return replicated


def without_cache(base: nn.Module) -> dict[str, Any]:
    """The argument that keeps a model from storing keys and values that nobody reads."""
    known = inspect.signature(type(base).forward).parameters
    return {"use_cache": False} if "use_cache" in known else {}


def refuse_calls(found: Found, calls: int, argument: str) -> NoReturn:
    raise ValueError(
        f"{argument}: expected a model that calls its lm_head once, got {calls} calls of "
        f"{found.name} by {type(found.base).__name__}"
    )


def _unwrapped(model: Any) -> Any:
    """The model within torch.compile and DistributedDataParallel."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _linear_of(head: Any) -> tuple[Any, Kind]:
    """The module that has the weight, and what PEFT has made of it."""
    if "peft" not in sys.modules:
        return head, "linear"
    from peft.tuners import lora
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters
        if head.disable_adapters or not active or active[0] not in head.modules_to_save:
            return head.original_module, "modules_to_save"
        return head.modules_to_save[active[0]], "modules_to_save"
    # fully_shard makes a class of its own; a variant, such as DoRA, is another function.
    if getattr(type(head), "forward", None) is lora.Linear.forward and not head.lora_variant:
        return head.get_base_layer(), "lora"
    return head, "linear"


def _is_plain(weight: Any) -> bool:
    """A tensor that products can be computed with: a class of its own stands for quantised data."""
    plain = type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight)
    return plain and weight.dtype in LOGIT_DTYPES


def _weight_of(embeddings: Any) -> object:
    linear, _ = _linear_of(embeddings)
    return getattr(linear, "weight", None)


def _layout_of(weight: Any) -> object:
    """How a weight lies on the ranks."""
    return (weight.device_mesh.shape, weight.placements) if is_dtensor(weight) else None


def _some_tokens(base: Any, linear: nn.Linear) -> Tensor:
    device = torch.device("cpu") if base.device.type == "meta" else base.device
    weight: Any = linear.weight
    ranks = weight.device_mesh.size() if is_dtensor(weight) else 1
    count = -(-_TOKENS // ranks) * ranks  # the sequence may be sharded, too
    tokens = torch.arange(_FIRST_TOKEN, _FIRST_TOKEN + count, device=device)
    return tokens.clamp(max=weight.shape[0] - 1)[None]


def _powers(like: Tensor) -> Tensor:
    """Numbers [..., V] fp32 of both signs; each token has all, and each row many of them."""
    tokens, rows = like.shape[:-1].numel(), like.shape[-1]
    index = torch.arange(rows, device=like.device)
    index = index + 7 * torch.arange(tokens, device=like.device)[:, None]
    exponent = index % (_LARGEST - _SMALLEST + 1) + _SMALLEST
    numbers = torch.exp2(exponent.float()) * (1 - 2 * (index % 2))
    return numbers.view(like.shape)


class _Layout(NamedTuple):
    """How logits [..., V] lie on the ranks."""

    of: Any = None  # a DTensor that lies like that; None where all ranks have all, in plain tensors
    is_local: bool = False  # plain tensors, each a rank's part

    def lay_out(self, whole: Tensor) -> Any:
        if self.of is None:
            return whole
        from torch.distributed.tensor import DTensor, Replicate

        mesh = self.of.device_mesh
        x = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        x = x.redistribute(placements=self.of.placements)
        return x.to_local() if self.is_local else x

    def gather(self, logits: Any, found: Found, argument: str) -> Tensor:
        """Whole logits, on every rank, of what the model has made of some that lie like that."""
        if not self.is_local or is_dtensor(logits):
            return _whole(logits)
        from torch.distributed.tensor import DTensor

        if logits.shape != self.of.to_local().shape:
            _refuse_output(logits, self.of, found, argument)
        gathered: Tensor = DTensor.from_local(
            logits,
            self.of.device_mesh,
            self.of.placements,
            run_check=False,
            shape=self.of.shape,
            stride=self.of.stride(),
        ).full_tensor()
        return gathered


def _layout(output: Any, x: Any, found: Found, argument: str) -> _Layout:
    """How the output of the head lies on the ranks, which have columns of x as in the weight."""
    if is_dtensor(output):
        return _Layout(output)
    if not is_dtensor(x) or output.shape == x.shape:
        return _Layout()
    if output.shape == x.to_local().shape:
        return _Layout(x, is_local=True)
    _refuse_output(output, x, found, argument)


def _refuse_output(output: Tensor, x: Any, found: Found, argument: str) -> NoReturn:
    raise ValueError(
        f"{argument}: expected logits {list(x.shape)} of the lm_head {found.name}, which is "
        f"sharded as {x.placements}, whole or {list(x.to_local().shape)} of them on this rank, or "
        f"a DTensor, got {list(output.shape)} from {type(found.base).__name__}"
    )


def _whole(x: Any) -> Tensor:
    """A tensor that all ranks have whole."""
    whole: Tensor = x.full_tensor() if is_dtensor(x) else x
    return whole


def _mapped(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    return scale * x if softcap is None else softcap * torch.tanh(scale / softcap * x)


def _map_of(x: Tensor, logits: Tensor, found: Found, argument: str) -> tuple[float, float | None]:
    """(scale, softcap) of the powers x and of the logits that the model made of them."""
    if logits.shape[:-1] == x.shape[:-1] and logits.shape[-1] <= x.shape[-1]:
        x, y = x[..., : logits.shape[-1]].double(), logits.double()
        size = x.abs()
        scale = (y / x)[size == size.min()].median().item()
        limit = y.abs()[size == size.max()].median().item()
        softcap = limit if limit < 0.5 * scale * size.max().item() else None
        near = max(_TOLERANCE, _ROUNDINGS * torch.finfo(logits.dtype).eps)
        if 0.0 < scale < math.inf and torch.allclose(
            y, _mapped(x, scale, softcap), rtol=near, atol=0.0
        ):
            return scale, softcap
    raise ValueError(
        f"{argument}: expected logits softcap tanh(scale x / softcap), or scale x, of the output x "
        f"of the lm_head {found.name}, with a scale > 0, got another function of it "
        f"{list(x.shape)}, with values {list(logits.shape)}, from {type(found.base).__name__}"
    )


def _error(
    x: Tensor, logits: Tensor, scale: float, softcap: float | None, found: Found, argument: str
) -> float:
    """The largest difference between the logits and what the map makes of x, relative to them."""
    logits, eps = logits.float(), torch.finfo(x.dtype).eps
    largest = logits.abs().max()
    ours = _mapped(x[..., : logits.shape[-1]].float(), scale, softcap)
    error = ((ours - logits).abs().max() / largest).item() if largest != 0 else 0.0
    if not error <= max(_TOLERANCE, _ROUNDINGS * eps):
        raise ValueError(
            f"{argument}: expected an lm_head {found.name} that is hidden @ weight.T + bias, got "
            f"logits from {type(found.base).__name__} that are off by {error:.1e} of the largest"
        )
    return error


def _computing(module: nn.Module) -> str:
    """The attribute that computes a module: hooks of accelerate, which bring a weight to its
    device, take the place of `forward`."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The module with another function as an attribute of its own."""
    own = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, in which it draws no random numbers and keeps no count."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
