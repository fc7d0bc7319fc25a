"""The bytes that PyTorch's operators read and write, operator by operator.

An input is read once however often it is an argument, an output is written once, an argument that
is changed in place is both read and written (an ``out`` is only written), and views and empty
tensors are free.  That is a lower bound: what an operator reads twice inside (a sort, a softmax)
counts once.  There is no cache in this count.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that allocate, or write a tensor without reading what is in it.
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITE = {"fill_", "zero_", "copy_", "normal_", "uniform_", "random_"}
# Operators that read as much of their first argument as they return.
_PICK = {"gather", "index", "index_select", "embedding"}


@dataclass
class Moved:
    """The bytes that one operator moves, or all of them together."""

    calls: int = 0
    read: int = 0  # bytes
    written: int = 0
    large: int = 0  # bytes of both in storages of the logits' size


class OperatorMeter(TorchDispatchMode):
    """A meter of the bytes of the operators that run while it is active, by name.

    ``large`` is the size in bytes from which a storage counts as large.  ``elsewhere`` says, given
    an operator and its arguments, whether something else counts it: the calls inside a custom
    operator are hidden from a mode.
    """

    def __init__(
        self,
        large: int = 0,
        elsewhere: Callable[[Any, tuple[Any, ...]], bool] = lambda operator, arguments: False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: defaultdict[str, Moved] = defaultdict(Moved)
        self._large = large
        self._elsewhere = elsewhere

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._elsewhere(func, args):
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func.overloadpacket.__name__
        inputs: list[Tensor] = []
        changed: list[Tensor] = []
        for i, parameter in enumerate(func._schema.arguments):
            tensors = _tensors(args[i] if i < len(args) else kwargs.get(parameter.name))
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                changed += tensors
                if parameter.is_out or name in _OVERWRITE:
                    continue
            inputs += tensors
        outputs = _tensors(result)
        given = {_storage(x) for x in inputs + changed}
        fresh = [x for x in outputs if _storage(x) not in given]
        if name in _ALLOCATE or (outputs and not fresh and not changed):
            return  # new memory, or another view of the old
        moved = self.operators[name]
        moved.calls += 1
        moved.read += _bytes_read(name, inputs, outputs)
        moved.written += _bytes(fresh + changed)
        moved.large += _bytes_read(name, inputs, outputs, self._large)
        moved.large += _bytes(fresh + changed, self._large)

    def total(self) -> Moved:
        """The bytes that all operators move."""
        parts = [dataclasses.astuple(moved) for moved in self.operators.values()]
        return Moved(*map(sum, zip(*parts, strict=True)))


def _bytes_read(name: str, inputs: list[Tensor], outputs: list[Tensor], least: int = 0) -> int:
    if name in _PICK:
        source, *others = inputs
        return min(_bytes([source], least), _bytes(outputs)) + _bytes(others, least)
    return _bytes(inputs, least)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor], least: int = 0) -> int:
    """The bytes of the memory that these tensors look at; memory that is seen twice, or expanded,
    counts once.

    Storages of less than `least` bytes are left out.
    """
    views: defaultdict[int, dict[Any, int]] = defaultdict(dict)
    sizes = {}
    for x in tensors:
        elements = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            elements *= size if stride else min(size, 1)
        view = (x.storage_offset(), tuple(x.shape), x.stride())
        views[_storage(x)][view] = elements * x.element_size()
        sizes[_storage(x)] = x.untyped_storage().nbytes()
    return sum(
        min(sum(seen.values()), sizes[storage])
        for storage, seen in views.items()
        if sizes[storage] >= least
    )
