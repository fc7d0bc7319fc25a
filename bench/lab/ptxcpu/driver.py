"""A Triton driver that executes launches on the CPU.

Triton's JIT does everything as for an NVIDIA GPU (specialisation, compilation, caches, autotuning)
and asks the active driver for four things: the target, a benchmarker, ``load_binary`` and a
launcher.  This driver answers with the chosen ``sm_XX``, a run on the CPU, nothing (there is no
GPU to load a cubin on), and a launcher that takes the kernel's PTX from Triton's cache, packs the
arguments and calls ``execute``.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver as driver_config

from . import execute
from .execute import Range, owned
from .parse import PtxError

WARP_SIZE = 32
MAX_THREADS_PER_CTA = 1024
MAX_COOPERATIVE_CTAS = 512
# The device ordinal selects Triton's in-process kernel cache: there is one per architecture, and
# none that a real GPU uses.
DEVICE_BASE = 1 << 16
# Shared memory that a CTA can opt in to, in KiB.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


class Counters(dict[str, dict[str, Any]]):
    """Counts per kernel name, added up over launches; ``reset()`` forgets them."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()  # autograd launches from a thread of its own

    def add(self, kernel: str, counts: dict[str, Any]) -> None:
        """Add the counts of one launch."""
        with self._lock:
            _add_counts(self.setdefault(kernel, {"launches": 0}), {"launches": 1, **counts})

    def reset(self) -> None:
        """Forget all counts."""
        self.clear()


def _add_counts(total: dict[str, Any], counts: dict[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, dict):
            _add_counts(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


class Utils:
    """The part of the driver that Triton loads kernels with."""

    def __init__(self, shared_kib: int):
        self._properties = {
            "max_shared_mem": shared_kib * 1024,
            "max_num_regs": 65536,
            "multiprocessor_count": 1,
            "warpSize": WARP_SIZE,
            "sm_clock_rate": 0,
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[str, str, int, int, int]:
        """(module, function, registers, spills, largest CTA).

        The handles are only names, and registers and spills are those of the cubin, unknown here
        (see bench.lab.sass): the launcher has all that a launch needs.
        """
        return name, name, 0, 0, MAX_THREADS_PER_CTA

    def unload_module(self, module: str) -> None:
        """Triton 3.9 calls this when a kernel is garbage; there is nothing to free."""


# ---------------------------------------------------------------- launching


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch as Triton resolved it: what an observer of ``CpuDriver`` is given."""

    source: Any  # triton.compiler.ASTSource: fn, signature, constants, attrs
    metadata: Any  # the compiler's options and results: num_warps, shared, hash, ...
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


def cached_files(source: Any, metadata: Any) -> dict[str, str]:
    """The files (name to path) that Triton stored when it compiled a kernel."""
    group = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json")
    if group is None:
        raise PtxError(f"Triton's cache has lost {metadata.name}, or TRITON_CACHE_DIR has changed")
    return dict(group)


def _read_ptx(source: Any, metadata: Any) -> str:
    for name, path in cached_files(source, metadata).items():
        if name.endswith(".ptx"):
            return Path(path).read_text()
    raise PtxError(f"no PTX was stored for {metadata.name} (is TRITON_STORE_BINARY_ONLY set?)")


class _Launcher:
    """Callable that Triton creates once per compiled kernel and calls for every launch.

    It holds the PTX itself: Triton shows another thread the launcher before the loaded function.
    """

    def __init__(self, src: Any, metadata: Any):
        self._source = src
        self._signature = dict(src.signature)
        self._metadata = metadata
        self._ptx = _read_ptx(src, metadata)

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: str,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *args: Any,
    ) -> None:
        if enter_hook is not None:
            enter_hook(launch_metadata)
        grid = (int(grid_x), int(grid_y), int(grid_z))
        driver: CpuDriver = driver_config.active
        driver.observe(Launch(self._source, self._metadata, grid, args))
        if math.prod(grid) > 0:
            self._launch(driver, grid, args)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _launch(self, driver: CpuDriver, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        metadata = self._metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise PtxError(f"{metadata.name}: CTA clusters (num_ctas > 1) are not supported")
        ctas = math.prod(grid)
        ranges = list(driver.extra_ranges)
        packed = [
            _pack(*parameter, ranges)
            for (name, type_), value in zip(self._signature.items(), args, strict=True)
            for parameter in _flatten(name, value, type_)
        ]
        scratch = []  # kept until the launch is over
        for kind in ("global", "profile"):
            size = getattr(metadata, f"{kind}_scratch_size", 0) or 0
            scratch.append(_scratch(size * ctas))
            packed.append(_pack(f"{kind} scratch", scratch[-1] if size else None, "*", ranges))
        threads = driver.threads
        if getattr(metadata, "launch_cooperative_grid", False):
            # All CTAs must be able to wait for each other.
            if ctas > MAX_COOPERATIVE_CTAS:
                raise PtxError(f"{metadata.name}: cooperative grid of {ctas} CTAs is too large")
            threads = max(threads, ctas)
        ptx = driver.edit_ptx(self._ptx) if driver.edit_ptx else self._ptx
        counts = execute.load(ptx).run(
            grid,
            packed,
            shared_bytes=metadata.shared,
            ranges=ranges,
            threads=min(threads, ctas),
            sched=driver.sched,
        )
        driver.record(metadata.name, counts)


def _scratch(size: int) -> torch.Tensor:
    """Zeroed global memory for the compiler's own use, aligned to 128 bytes."""
    buffer = torch.zeros(size + 128, dtype=torch.uint8)
    start = -buffer.data_ptr() % 128
    return buffer[start : start + size]


def _flatten(name: str, value: Any, type_: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, value, type) of the kernel parameters of an argument: a tuple has many, a constexpr
    none."""
    if isinstance(type_, tuple):
        for part, of_part in zip(value, type_, strict=True):
            yield from _flatten(name, part, of_part)
    elif type_.startswith("tensordesc"):
        yield from ((name, *parameter) for parameter in _flatten_descriptor(value))
    elif type_ != "constexpr":
        yield name, value, type_


def _flatten_descriptor(descriptor: Any) -> Iterator[tuple[Any, str]]:
    """A host TensorDescriptor as Triton passes it before sm_90, where there is no TMA."""
    if driver_config.active.arch >= 90:
        raise PtxError("host tensor descriptors become TMA on sm_90 and later: use arch=80")
    shape_and_strides = (*descriptor.shape, *descriptor.strides)
    yield descriptor.base, "*"
    yield from ((number, "i64") for number in shape_and_strides)
    yield descriptor.padding == "nan", "i1"
    yield getattr(descriptor, "round_f32_to_tf32", False), "i1"
    yield from ((number, "i32") for number in descriptor.shape)
    yield from ((number, "i64") for number in descriptor.strides)


_INTEGER_BYTES = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}


def _pack(name: str, value: Any, type_: str, ranges: list[Range]) -> bytes:
    """The bytes of one kernel parameter; a tensor's elements are added to the legal ranges."""
    if type_.startswith("*"):
        return struct.pack("<Q", _pointer(name, value, ranges))
    if type_ in ("fp32", "f32"):
        return struct.pack("<f", value)
    if type_ == "fp64":
        return struct.pack("<d", value)
    if type_ == "fp16":
        return struct.pack("<e", value)
    if type_ == "bf16":
        return struct.pack("<f", value)[2:]
    size = _INTEGER_BYTES.get(type_[1:]) if type_[0] in "iu" else None
    if size is None:
        raise PtxError(f"kernel parameters of type {type_} are not supported")
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _pointer(name: str, value: Any, ranges: list[Range]) -> int:
    """A pointer argument: of a tensor or Triton's TensorWrapper, a plain address, or None."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value  # legal only if the memory is in `extra_tensors` or another argument
    tensor = getattr(value, "base", None)
    if tensor is None or not hasattr(tensor, "untyped_storage"):
        tensor = value
    if tensor.device.type != "cpu":
        raise PtxError(f"ptxcpu needs CPU tensors, got one on {tensor.device}")
    ranges.append(_elements(tensor, name))
    return owned(int(value.data_ptr()), len(ranges) - 1)


def _elements(tensor: torch.Tensor, name: str = "") -> Range:
    """The memory of a tensor's elements, without that between them where it is a slice."""
    size = tensor.element_size() if tensor.numel() else 0
    gaps: list[tuple[int, int]] = []
    steps = sorted(zip(tensor.stride(), tensor.shape, strict=True)) if size else []
    for stride, length in steps:
        period = stride * tensor.element_size()
        if length == 1 or period == 0:
            continue
        if period < size:  # overlapping windows: any byte from the first to the last
            gaps = []
        elif period > size or gaps:
            gaps.append((period, size))
        size += (length - 1) * period
    storage = tensor.untyped_storage()
    return Range(
        tensor.data_ptr(), size, name, tuple(gaps[::-1]), (storage.data_ptr(), storage.nbytes())
    )


# ---------------------------------------------------------------- the driver


class _Event:
    """Stand-in for torch.cuda.Event: launches are synchronous, so it is just a time."""

    def __init__(self, enable_timing: bool = True):
        self._time = 0.0

    def record(self, stream: int | None = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end._time - self._time) * 1e3


class _DeviceInterface:
    """Stand-in for torch.cuda, as far as triton.testing.do_bench needs it."""

    Event = _Event

    def __init__(self, device: int):
        self._device = device

    def current_device(self) -> int:
        return self._device

    def synchronize(self, device: int | None = None) -> None:
        """Launches are synchronous."""


class CpuDriver(DriverBase):  # type: ignore[misc]  # Triton has no types
    """Triton driver for the compute capability ``arch`` (90 is sm_90) on the CPU.

    ``sched``: 0 runs a CTA in lockstep, other seeds run its warps in random order.
    ``threads``: host threads that share the CTAs (default: one per CPU).
    ``extra_tensors``: legal memory besides the elements of the arguments.
    ``edit_ptx``: changes the PTX before it is built, for experiments.
    ``observer``: is called with every ``Launch`` before it is executed.
    """

    launcher_cls: type = _Launcher

    def __init__(
        self,
        arch: int = 90,
        sched: int = 0,
        threads: int | None = None,
        extra_tensors: Iterable[torch.Tensor] = (),
        edit_ptx: Callable[[str], str] | None = None,
        observer: Callable[[Launch], None] | None = None,
    ):
        super().__init__()
        self.arch = arch
        self.sched = sched
        self.threads = threads or len(os.sched_getaffinity(0))
        self.extra_ranges = [_elements(tensor) for tensor in extra_tensors]
        self.edit_ptx = edit_ptx
        self._observer = observer
        self.counters = Counters()
        self.utils = Utils(SHARED_KIB.get(arch, 227))
        self._is_benchmarking = False

    @classmethod
    def is_active(cls) -> bool:
        """Never picked by default: only ``install`` and ``active`` select this driver."""
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, WARP_SIZE)

    def get_current_device(self) -> int:
        return DEVICE_BASE + self.arch

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> _DeviceInterface:
        return _DeviceInterface(self.get_current_device())

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return str(ty_to_cpp(ty))

    def get_benchmarker(self) -> Callable[..., Any]:
        """Benchmarker of the autotuner: one run, in CPU time, which is not counted."""

        def benchmark(
            kernel_call: Callable[[], Any], quantiles: Iterable[float] | None = None, **_: Any
        ) -> float | list[float]:
            self._is_benchmarking = True
            try:
                start = time.perf_counter()
                kernel_call()
                milliseconds = (time.perf_counter() - start) * 1e3
            finally:
                self._is_benchmarking = False
            return [milliseconds for _ in quantiles] if quantiles else milliseconds

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1, dtype=torch.int32)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """There is no cache model to flush."""

    def observe(self, launch: Launch) -> None:
        """Show a launch to the observer, unless the autotuner made it."""
        if self._observer is not None and not self._is_benchmarking:
            self._observer(launch)

    def record(self, kernel: str, counts: dict[str, Any]) -> None:
        """Add the counts of one launch, unless the autotuner made it."""
        if not self._is_benchmarking:
            self.counters.add(kernel, counts)


def install(arch: int = 90, sched: int = 0, **options: Any) -> Counters:
    """Make every Triton launch of this process execute on the CPU; gives the live counters.

    Takes the options of ``CpuDriver``.  ``uninstall()`` goes back.
    """
    if knobs.runtime.interpret:
        raise PtxError("TRITON_INTERPRET is set: kernels are interpreted, never compiled to PTX")
    driver = CpuDriver(arch, sched, **options)
    driver_config.set_active(driver)
    return driver.counters


def uninstall() -> None:
    """Undo ``install``: the next launch uses Triton's default driver."""
    driver_config._active = None  # reset_active() would fail where there is no GPU


@contextlib.contextmanager
def active(arch: int = 90, sched: int = 0, **options: Any) -> Iterator[Counters]:
    """Like ``install`` for the duration of a ``with`` block, whose target are the counters."""
    previous = driver_config._active
    counters = install(arch, sched, **options)
    try:
        yield counters
    finally:
        driver_config._active = previous
