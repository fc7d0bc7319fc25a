"""Compile Triton kernels for a GPU that is not there.

``compile_for`` compiles one specialisation that the caller spells out.  ``record_launches`` lets
the launchers themselves say what they launch, with which specialisation, block and warps, so that
what is analysed is what a user would run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver as driver_config

from . import ptxcpu
from .ptxcpu.driver import WARP_SIZE, CpuDriver, Utils, cached_files

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, WARP_SIZE),
    "sm_86": GPUTarget("cuda", 86, WARP_SIZE),
    "sm_89": GPUTarget("cuda", 89, WARP_SIZE),
    "sm_90": GPUTarget("cuda", 90, WARP_SIZE),
    "sm_100": GPUTarget("cuda", 100, WARP_SIZE),
    "sm_120": GPUTarget("cuda", 120, WARP_SIZE),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
"""The GPUs that kernels are compiled for: A100, RTX 3090 and A10, RTX 4090 and L40S, H100, B200,
RTX 5090, MI300, MI350."""

NVIDIA = tuple(name for name, target in TARGETS.items() if target.backend == "cuda")

# The shared memory that a block may have.
_SHARED_KIB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}
# The device ordinal selects Triton's in-process kernel cache; nothing is executed under this one.
_DEVICE_BASE = 1 << 17


@dataclass(frozen=True, slots=True)
class RecordedLaunch:
    """A launch as Triton specialised it."""

    fn: Any  # triton.JITFunction
    target: str
    signature: dict[str, str]  # type of every parameter; "constexpr" for constants
    constexprs: dict[
        str, Any
    ]  # also the arguments that are None, or 1, which Triton makes constant
    divisible: frozenset[str]  # parameters known to be multiples of 16
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    scalars: dict[str, int | float | bool]  # run-time arguments that are no tensors
    compiled: CompiledKernel

    @property
    def name(self) -> str:
        """Name of the kernel function."""
        return str(self.fn.__name__)


def _target(name: str) -> GPUTarget:
    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


class _DryLauncher:
    """A launcher that tells the driver about a launch, and does nothing else."""

    def __init__(self, src: Any, metadata: Any):
        self._source = src
        self._metadata = metadata

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
        grid = (int(grid_x), int(grid_y), int(grid_z))
        driver_config.active.observe(ptxcpu.Launch(self._source, self._metadata, grid, args))


class _DryDriver(CpuDriver):
    """Triton driver of any target: kernels are compiled, and not executed."""

    launcher_cls = _DryLauncher

    def __init__(self, target: str, observer: Callable[[ptxcpu.Launch], None] | None = None):
        super().__init__(observer=observer)
        self._target = _target(target)
        self.utils = Utils(_SHARED_KIB[target])
        self._device = _DEVICE_BASE + list(TARGETS).index(target)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device


@contextlib.contextmanager
def dry_run(target: str, observer: Callable[[ptxcpu.Launch], None] | None = None) -> Iterator[None]:
    """Compile what is launched in the ``with`` block for ``target``, and execute nothing."""
    previous = driver_config._active
    driver_config.set_active(_DryDriver(target, observer))
    try:
        yield
    finally:
        driver_config._active = previous


@contextlib.contextmanager
def record_launches(target: str = "sm_90", *, dry: bool = True) -> Iterator[list[RecordedLaunch]]:
    """Record every Triton launch of the ``with`` block, compiled for ``target``.

    Launches take CPU tensors (meta tensors too, if ``dry``).  With ``dry`` nothing is executed and
    outputs are left as they were; without, the kernels run in ptxcpu, which needs an sm target.

    Example:
        >>> with record_launches("sm_100") as launches:
        ...     adaptive_kl(student, teacher, backend="triton")
        >>> [(launch.name, launch.grid, launch.num_warps) for launch in launches]
    """
    launches: list[RecordedLaunch] = []

    def observe(launch: ptxcpu.Launch) -> None:
        launches.append(_recorded(target, launch))

    if dry:
        with dry_run(target, observe):
            yield launches
    else:
        backend = _target(target)
        if backend.backend != "cuda":
            raise ValueError(f"kernels for {target} cannot be executed here: use dry=True")
        with ptxcpu.active(backend.arch, observer=observe):
            yield launches


def _recorded(target: str, launch: ptxcpu.Launch) -> RecordedLaunch:
    source, metadata = launch.source, launch.metadata
    names = source.fn.arg_names
    return RecordedLaunch(
        fn=source.fn,
        target=target,
        signature=dict(source.signature),
        constexprs={names[path[0]]: value for path, value in source.constants.items()},
        divisible=frozenset(
            names[path[0]]
            for path, attrs in source.attrs.items()
            if ["tt.divisibility", 16] in attrs
        ),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        grid=launch.grid,
        scalars={
            name: value
            for name, value in zip(names, launch.arguments, strict=True)
            if isinstance(value, (int, float)) and source.signature[name] != "constexpr"
        },
        compiled=CompiledKernel(source, cached_files(source, metadata), metadata.hash),
    )


def compile_for(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int | None = None,
    target: str = "sm_90",
) -> CompiledKernel:
    """Compile one specialisation of a kernel, without a GPU.

    Args:
        fn: the ``triton.jit`` function.
        signature: Triton type of every run-time parameter, such as ``{"x_ptr": "*bf16"}``.
        constexprs: values of the other parameters.
        divisible: parameters (pointers, integers) that are multiples of 16, as launches with
            aligned tensors find out by themselves.
        num_stages: the target's default if None.
        target: a key of ``TARGETS``.

    Raises:
        ValueError: the target or a parameter is unknown, or a parameter is not given once.
    """
    backend = _target(target)
    names = list(fn.arg_names)
    given = [*signature, *constexprs]
    if sorted(given) != sorted(names):
        raise ValueError(f"{fn.__name__} has the parameters {names}, got {given}")
    unknown = sorted(set(divisible) - set(signature))
    if unknown:
        raise ValueError(f"divisible must name run-time parameters, got {unknown}")
    source = ASTSource(
        fn,
        {name: signature.get(name, "constexpr") for name in names},
        dict(constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    with dry_run(target):  # device code may ask the active driver for its target
        return triton.compile(source, target=backend, options=options)


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Collect the names of the kernels for which Triton meets a new specialisation, cached on disk
    or not."""
    names: list[str] = []

    def hook(*, fn: Any, **_: Any) -> None:
        names.append(fn.name)

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
        yield names
