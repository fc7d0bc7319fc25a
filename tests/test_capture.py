"""A step makes no call that the capture of a CUDA graph forbids: no wait for the device, no copy
from or to the host, nothing whose size depends on data, no kernel that is compiled after the first
step. See docs/cuda_graphs.md.

There need be no GPU: the device is `meta`, whose tensors have no data to look at, and the bodies of
our operators are run on it, as on any device that is not the CPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from akl_triton import (
    Divergence,
    adaptive_kl,
    checks,
    distillation_loss,
    linear_distillation_loss,
)
from tests.support.cases import DIVERGENCES
from tests.support.trace import WAITS

pytest.importorskip("triton")

from akl_triton.kernels import launch
from bench.lab import ptxcpu
from bench.lab.compile import counted_compilations, dry_run

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cuda_graphs.md"
META = torch.device("meta")
FORBIDDEN = {
    torch.Tag.cudagraph_unsafe,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}
N, V, H = (2, 3), 1000, 64
Step = Callable[[], Any]


class NotCapturable(Exception):
    pass


class _FromTheHost(TorchFunctionMode):
    """Python numbers become tensors of a device by a copy, which no operator shows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            raise NotCapturable(f"torch.{function.__name__} copies from the host")
        return function(*args, **kwargs or {})


class _Operators(TorchDispatchMode):
    """Raises at what no stream capture allows, also inside of our operators; `operators` are the
    names of all."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.operators.append(name)
        if name.startswith("akl_triton::"):
            with _FromTheHost(), self:
                return OPDEFS[name]._init_fn(*args, **kwargs or {})
        # A mask as an index is counted, also where the result has the size of something else.
        masks = name.startswith("aten::index") and any(
            x.dtype in (torch.bool, torch.uint8)
            for x in tree_leaves(args[1])
            if isinstance(x, Tensor)
        )
        if name in WAITS or masks or FORBIDDEN & set(function.tags):
            raise NotCapturable(f"{name} reads data")
        results = function(*args, **kwargs or {})
        devices = {x.device for x in tree_leaves((args, kwargs, results)) if isinstance(x, Tensor)}
        if devices - {META}:
            raise NotCapturable(f"{name} of tensors on {devices}")
        return results


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Raise at what cannot be captured; gives the names of the operators."""
    with _FromTheHost(), _Operators() as mode:
        yield mode.operators


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take tensors without data: they are compiled, and not run."""
    monkeypatch.setattr(ptxcpu.CpuDriver, "get_active_torch_device", lambda _: META)
    monkeypatch.setattr(launch, "_device_of", lambda _: contextlib.nullcontext())  # has no module
    of_hidden = checks.check_projection

    def check_projection(*arguments: Any) -> None:
        with pytest.raises(ValueError, match=r"expected a tensor with data, got .* on meta"):
            of_hidden(*arguments)

    monkeypatch.setattr("akl_triton.checks.check_projection", check_projection)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def tokens() -> dict[str, Any]:
    """All that can be given for each token."""
    return {
        "labels": empty(*N, dtype=torch.int64),
        "mask": empty(*N, dtype=torch.bool),
        "token_weights": empty(*N, dtype=torch.float32),
    }


def of_logits(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Step:
    student, teacher = empty(*N, V, dtype=dtype).requires_grad_(), empty(*N, V, dtype=dtype)

    def step() -> None:
        student.grad = None
        # What a model computes, not a leaf.
        loss = distillation_loss(1 * student, teacher, **options, backend="triton")
        _backward(loss)

    return step


def of_hidden(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Step:
    hidden, weight, bias = (
        empty(*shape, dtype=dtype).requires_grad_() for shape in ((*N, H), (V, H), (V,))
    )
    teacher = empty(*N, H, dtype=dtype), empty(V, H, dtype=dtype)

    def step() -> None:
        hidden.grad = weight.grad = bias.grad = None
        loss = linear_distillation_loss(
            hidden, weight, *teacher, student_bias=bias, **options, backend="triton",
            chunk_bytes=4 * V * dtype.itemsize,  # two tokens at a time
        )  # fmt: skip
        _backward(loss)

    return step


def _backward(loss: Any) -> None:
    loss = loss[0] if isinstance(loss, tuple) else loss
    (65536.0 * loss.sum()).backward()  # with a loss scale


EVERYTHING: dict[str, Any] = {"shift": 1, "kd_ratio": 0.5, "temperature": 2.0, "return_stats": True}
STEPS: dict[str, Callable[[], Step]] = {
    "logits": of_logits,
    "logits, in place": lambda: of_logits(inplace=True),
    "logits, in place, fp16": lambda: of_logits(torch.float16, inplace=True),
    "logits, all options": lambda: of_logits(**tokens(), **EVERYTHING),
    "logits, all options, in place": lambda: of_logits(**tokens(), **EVERYTHING, inplace=True),
    "logits, a loss per token": lambda: of_logits(**tokens(), reduction="none"),
    "logits, a count": lambda: of_logits(num_items=empty(dtype=torch.int64)),
    "hidden states": of_hidden,
    "hidden states, fp16": lambda: of_hidden(torch.float16),
    "hidden states, statistics": lambda: of_hidden(return_stats=True, num_items=7),
    "hidden states, a loss per token": lambda: of_hidden(reduction="none"),
    "hidden states, token weights and a count": lambda: of_hidden(
        token_weights=tokens()["token_weights"], num_items=empty(dtype=torch.float32)
    ),
}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", STEPS)
def test_nothing_waits_or_comes_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = stand_in_kernels(monkeypatch)
    step = STEPS[name]()
    with dry_run("sm_90"), captured() as operators:
        step()
    assert launched
    door = "linear_divergence" if "hidden" in name else "divergence"
    assert any(operator.startswith(f"akl_triton::{door}") for operator in operators)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence(divergence: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that its kernels get the same arguments again."""
    launched = stand_in_kernels(monkeypatch)
    labels = tokens()["labels"]
    for options in ({}, {"inplace": True}, {"return_stats": True, "temperature": 2.0}):
        step = of_logits(labels=labels, divergence=divergence, **options)
        launched.clear()
        with dry_run("sm_90"), captured():
            step()
            step()
        # repr: some weights are NaN.
        assert repr(launched[:2]) == repr(launched[2:])
        assert len(launched) == 4


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", ["logits", "logits, in place", "hidden states"])
def test_a_step_launches_what_the_first_one_compiled(name: str) -> None:
    for kernel in (launch.forward_kernel, launch.backward_kernel, launch.rescale_kernel):
        kernel.device_caches.clear()
    launches: list[ptxcpu.Launch] = []
    step = STEPS[name]()
    with captured(), dry_run("sm_90", launches.append), counted_compilations() as compiled:
        step()
        assert compiled
        first, launches[:] = launches[:], []
        compiled.clear()
        step()
    assert compiled == []
    assert [described(launch) for launch in launches] == [described(launch) for launch in first]
    assert len(launches) >= 2


def described(launch: ptxcpu.Launch) -> tuple[Any, ...]:
    return (
        launch.metadata.hash,
        launch.metadata.name,
        launch.grid,
        [_argument(x) for x in launch.arguments],
    )


def _argument(x: Any) -> Any:
    return (x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x


def stand_in_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the launches (kernel, grid, arguments) before Triton has any of them to compile."""
    launched: list[Any] = []

    class Kernel:
        def __init__(self, name: str):
            self._name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: launched.append(
                (self._name, grid, {name: _argument(x) for name, x in arguments.items()})
            )

    for name in ("forward_kernel", "backward_kernel", "rescale_kernel"):
        monkeypatch.setattr(launch, name, Kernel(name))
    return launched


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    "of_tokens", [("labels",), ("mask",), ("token_weights", "shift")], ids="-".join
)
def test_the_door_of_hidden_states_counts_tokens(
    of_tokens: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one wait that there is, of which docs/cuda_graphs.md tells."""
    stand_in_kernels(monkeypatch)
    given = {**tokens(), "shift": 1}
    step = of_hidden(**{name: given[name] for name in of_tokens})
    with dry_run("sm_90"), captured(), pytest.raises(NotCapturable, match="aten::nonzero"):
        step()


def test_the_operators_that_wait_are_left_out_of_the_graphs_of_torch_compile() -> None:
    names = [name for name in OPDEFS if name.startswith("akl_triton::")]
    of_name = {name: getattr(torch.ops.akl_triton, name.split("::")[1]).default for name in names}
    tagged = {name for name, op in of_name.items() if torch.Tag.cudagraph_unsafe in op.tags}
    of_hidden_states = {"linear_divergence", "linear_divergence_backward"}
    of_shards = {"meet", "shard_divergence", "shard_divergence_with_gradient"}
    assert tagged == {f"akl_triton::{name}" for name in of_hidden_states | of_shards}


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "masked": lambda x: x[x > 0],
    "assigned by a mask": lambda x: x.index_put_((x > 0,), x.sum()),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.ones(3).to(META),
    "a number from the host": lambda x: x + torch.tensor(1.0, device=META),
    "a scalar on the host": lambda x: x * torch.ones(()),
    "into the host's": lambda x: torch.ones(3).copy_(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_waits_would_be_found(name: str) -> None:
    x = torch.empty(3, device=META)
    with captured(), pytest.raises((NotCapturable, RuntimeError)):
        WAITING[name](x)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", ["if", "assigned by a mask", "a number from the host"])
def test_waits_in_an_operator_would_be_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_kernels(monkeypatch)
    original = launch.forward

    def forward(student: Tensor, *arguments: Any, **options: Any) -> None:
        original(student, *arguments, **options)
        WAITING[name](student)

    monkeypatch.setattr(launch, "forward", forward)
    with dry_run("sm_90"), captured(), pytest.raises((NotCapturable, RuntimeError)):
        of_logits()()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_example_of_the_document() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "adaptive_kl": adaptive_kl}
    exec(example, names)
    replayed = names["loss"].clone(), names["student_logits"].grad.clone()
    loss = names["step"]()
    assert torch.equal(loss, replayed[0])
    assert torch.equal(names["student_logits"].grad, replayed[1])
