# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Offline compilation of a kernel that the caller spells out, and of those that launchers
launch."""

import pytest
import torch
import triton
import triton.language as tl

from bench.lab import ptxcpu
from bench.lab.compile import NVIDIA, TARGETS, compile_for, record_launches


@triton.jit
def scale_kernel(x_ptr, y_ptr, bias_ptr, factor, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(y_ptr + offs, factor * x, mask=offs < n)


def scale(x: torch.Tensor, y: torch.Tensor) -> None:
    n = x.numel()
    scale_kernel[(triton.cdiv(n, 512),)](x, y, None, 2.0, n, BLOCK=512, num_warps=2)


@pytest.mark.parametrize("target", TARGETS)
def test_a_recorded_launch_says_all_that_triton_decided(target: str) -> None:
    x, y = torch.ones(5008), torch.zeros(5008)
    with record_launches(target) as launches:
        scale(x, y)
    (launch,) = launches
    assert launch.fn is scale_kernel
    assert (launch.name, launch.target) == ("scale_kernel", target)
    assert launch.signature == {
        **{"x_ptr": "*fp32", "y_ptr": "*fp32", "bias_ptr": "constexpr", "factor": "fp32"},
        **{"n": "i32", "BLOCK": "constexpr"},
    }
    assert launch.constexprs == {"bias_ptr": None, "BLOCK": 512}
    assert launch.divisible == {"x_ptr", "y_ptr", "n"}
    assert launch.scalars == {"factor": 2.0, "n": 5008}
    assert (launch.num_warps, launch.grid) == (2, (10, 1, 1))
    assert launch.compiled.metadata.target == TARGETS[target]
    assert y.count_nonzero() == 0  # nothing was executed


def test_alignment_is_that_of_the_arguments() -> None:
    x, y = torch.ones(5009)[1:], torch.zeros(5008)
    with record_launches() as launches:
        scale(x, y)
        scale(x[:5007], y[:5007])
        scale(x[:1], y)
    assert [launch.divisible for launch in launches] == [{"y_ptr", "n"}, {"y_ptr"}, {"y_ptr"}]
    assert launches[2].constexprs["n"] == 1  # Triton makes a constant of an argument that is 1


def test_meta_tensors_record_sizes_that_no_memory_would_hold() -> None:
    x = torch.empty(1 << 39, dtype=torch.bfloat16, device="meta")
    with record_launches("sm_90") as launches:
        scale(x, x)
    assert launches[0].signature["n"] == "i64"
    assert launches[0].grid == (1 << 30, 1, 1)


def test_executed_launches_can_be_recorded_too() -> None:
    x, y = torch.ones(500), torch.zeros(500)
    with record_launches("sm_80", dry=False) as launches:
        scale(x, y)
    assert torch.equal(y, 2 * x)
    assert launches[0].compiled.metadata.target == TARGETS["sm_80"]
    with (
        pytest.raises(ValueError, match="gfx942 cannot be executed"),
        record_launches("gfx942", dry=False),
    ):
        pass


def test_dry_and_executed_launches_do_not_share_their_kernels() -> None:
    x, y = torch.ones(500), torch.zeros(500)
    with record_launches("sm_90"):
        scale(x, y)
    with ptxcpu.active(90):
        scale(x, y)
    assert torch.equal(y, 2 * x)
    with record_launches("sm_90") as launches:
        scale(x, y)
    assert len(launches) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_compile_for(target: str) -> None:
    kernel = compile_for(
        scale_kernel,
        {"x_ptr": "*bf16", "y_ptr": "*bf16", "factor": "fp32", "n": "i32"},
        {"bias_ptr": None, "BLOCK": 512},
        divisible=["x_ptr", "y_ptr", "n"],
        num_warps=2,
        num_stages=1,
        target=target,
    )
    assert kernel.metadata.target == TARGETS[target]
    assert (kernel.metadata.num_warps, kernel.metadata.num_stages) == (2, 1)
    assert kernel.asm["cubin" if target in NVIDIA else "hsaco"]


def test_both_ways_give_the_same_code() -> None:
    x, y = torch.ones(5008), torch.zeros(5008)
    with record_launches("sm_90") as launches:
        scale(x, y)
    signature = {
        name: type_ for name, type_ in launches[0].signature.items() if type_ != "constexpr"
    }
    kernel = compile_for(
        scale_kernel,
        signature,
        launches[0].constexprs,
        divisible=launches[0].divisible,
        num_warps=2,
        target="sm_90",
    )
    # The text after the code names the folder that it was compiled in, which need not be this one:
    # Triton's cache serves all folders.
    code, other = (k.asm["ptx"].partition(".file")[0] for k in (kernel, launches[0].compiled))
    assert code == other and "st.global" in code


def test_bad_requests_name_what_is_wrong() -> None:
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "factor": "fp32", "n": "i32"}
    constexprs = {"bias_ptr": None, "BLOCK": 512}
    with pytest.raises(ValueError, match=r"target must be one of sm_80, .*got 'sm_70'"):
        compile_for(scale_kernel, signature, constexprs, target="sm_70")
    with pytest.raises(ValueError, match="scale_kernel has the parameters"):
        compile_for(scale_kernel, signature, {"BLOCK": 512})
    with pytest.raises(ValueError, match="scale_kernel has the parameters"):
        compile_for(scale_kernel, {**signature, "BLOCK": "i32"}, constexprs)
    with pytest.raises(ValueError, match=r"divisible must name run-time parameters, .*'BLOCK'"):
        compile_for(scale_kernel, signature, constexprs, divisible=["BLOCK"])
