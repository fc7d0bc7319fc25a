"""The stored cost of the kernels is that of the kernels as they are."""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import asdict

import pytest

from bench.questions.instructions import GPUS, kernel_costs
from bench.store import load


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
@pytest.mark.parametrize("target", GPUS)
def test_stored_instructions_are_those_of_the_kernels(target: str) -> None:
    stored = load("instructions")
    if stored["versions"]["triton"] != importlib.metadata.version("triton"):
        pytest.skip("another Triton compiled the kernels")
    (case,) = (
        case
        for case in stored["data"]["ours"]
        if (case["loss"], case["target"], case["dtype"]) == ("adaptive_kl", target, "bf16")
        and 151_936 in case["vocabularies"]
    )
    for name, cost in kernel_costs("adaptive_kl", target, 151_936).items():
        found = json.loads(json.dumps({**asdict(cost), "per_position": cost.per_position}))
        assert found == case["kernels"][name], (
            "the kernels have changed: python -m bench instructions --save"
        )
