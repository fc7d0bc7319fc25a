# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""ptxcpu as a Triton driver: caches, architectures, threads, autograd, custom ops."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver as driver_config

from bench.lab import ptxcpu

ROOT = Path(__file__).parents[4]


@triton.jit
def scale_kernel(x_ptr, y_ptr, factor, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, factor * x, mask=offs < n)


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    y = torch.empty_like(x)
    scale_kernel[(triton.cdiv(x.numel(), 256),)](x, y, factor, x.numel(), BLOCK=256)
    return y


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return scale(x, factor)

    @staticmethod
    def backward(ctx, grad):
        ctx.thread = threading.get_ident()
        return scale(grad.contiguous(), ctx.factor), None


def test_the_driver_before_comes_back() -> None:
    before = driver_config._active
    with ptxcpu.active(arch=80):
        outer = driver_config._active
        with ptxcpu.active(arch=90):
            assert driver_config.active.arch == 90
        assert driver_config._active is outer
    assert driver_config._active is before


def test_architectures_share_a_process() -> None:
    x = torch.randn(300)
    launches: list[ptxcpu.Launch] = []
    for arch in (80, 90, 100, 80):
        with ptxcpu.active(arch, observer=launches.append):
            assert torch.equal(scale(x, 3.0), 3.0 * x)
    assert [launch.metadata.target.arch for launch in launches] == [80, 90, 100, 80]


def test_observer_sees_what_was_launched() -> None:
    launches: list[ptxcpu.Launch] = []
    x = torch.randn(300)
    with ptxcpu.active(observer=launches.append):
        scale(x, 3.0)
    (launch,) = launches
    assert launch.source.fn is scale_kernel
    assert launch.grid == (2, 1, 1)
    assert launch.arguments[2:] == (3.0, 300, 256)
    assert launch.metadata.num_warps == 4


def test_threads_launch_at_the_same_time() -> None:
    inputs = torch.randn(8, 3000).unbind(0)
    results: list[torch.Tensor | None] = [None] * len(inputs)
    barrier = threading.Barrier(len(inputs))

    def work(k: int) -> None:
        barrier.wait()
        results[k] = scale(inputs[k], float(k))

    # New PTX, so that all threads want to build and load the same kernel at once.
    nonce = f"\n// {os.getpid()} {os.urandom(4).hex()}\n"
    with ptxcpu.active(edit_ptx=lambda ptx: ptx + nonce) as counters:
        scale_kernel.device_caches.clear()
        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for k, y in enumerate(results):
        assert y is not None
        assert torch.equal(y, k * inputs[k])
    assert counters["scale_kernel"]["launches"] == len(inputs)


def test_autograd_backward() -> None:
    x = torch.randn(500, requires_grad=True)
    upstream = torch.randn(500)
    with ptxcpu.active() as counters:
        Scale.apply(x, 2.5).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, 2.5 * upstream)
    assert counters["scale_kernel"]["launches"] == 2


@torch.library.custom_op("ptxcpu_test::scale", mutates_args=())
def scale_op(x: torch.Tensor, factor: float) -> torch.Tensor:
    return scale(x, factor)


@scale_op.register_fake
def _(x, factor):
    return torch.empty_like(x)


scale_op.register_autograd(
    lambda ctx, grad: (scale_op(grad.contiguous(), ctx.factor), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


def test_custom_op_passes_opcheck() -> None:
    with ptxcpu.active():
        torch.library.opcheck(scale_op, (torch.randn(64, requires_grad=True), 2.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    x = torch.randn(100, requires_grad=True)

    def loss(x):
        return scale_op(x.exp(), 0.5).sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    with ptxcpu.active() as counters:
        compiled(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 0.5 * x.detach().exp())
    assert counters["scale_kernel"]["launches"] == 2


@triton.autotune([triton.Config({"BLOCK": block}) for block in (128, 256)], key=["n"])
@triton.jit
def tuned_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


def test_autotuner_runs_are_not_counted() -> None:
    x, y = torch.randn(500), torch.empty(500)
    with ptxcpu.active() as counters:
        tuned_kernel[lambda options: (triton.cdiv(500, options["BLOCK"]),)](x, y, 500)
    assert torch.equal(x, y)
    assert counters["tuned_kernel"]["launches"] == 1


SCRIPT = """
import subprocess
import torch
from bench.lab import ptxcpu
import test_driver as tests

commands = []
run = subprocess.run

def watched_run(command, **options):
    commands.append(command[0])
    return run(command, **options)

subprocess.run = watched_run
x = torch.randn(300)
with ptxcpu.active():
    assert torch.equal(tests.scale(x, 3.0), 3.0 * x)
print(commands.count("g++"))
"""


def test_the_caches_on_disk_serve_the_next_process(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PTXCPU_CACHE": str(tmp_path / "ptxcpu"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    builds = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert [int(count) for count in builds] == [1, 0]
    assert len(list((tmp_path / "ptxcpu").iterdir())) == 1  # no temporary file is left behind
