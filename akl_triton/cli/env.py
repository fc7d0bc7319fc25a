"""List what is installed, the devices, and the backend that would run on each of them."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import akl_triton
from akl_triton.backend import resolve_backend, triton_obstacle


def run(arguments: argparse.Namespace) -> int:
    facts = describe()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name in ("akl_triton", "torch", "triton", "python", "platform"):
        print(f"{name:<12}{facts[name] or 'not installed'}")
    for device in facts["devices"]:
        print(f"{device['type']:<12}{device['name']}: {device['backend']}, {device['why']}")
    return 0


def describe() -> dict[str, Any]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    devices = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        devices += [
            ("cuda", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())
        ]
    if torch.backends.mps.is_available():
        devices.append(("mps", platform.processor()))
    return {
        "akl_triton": akl_triton.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [
            {
                "type": type_,
                "name": name,
                "backend": resolve_backend("auto", type_),
                "why": triton_obstacle(type_) or "the Triton kernels can run",
            }
            for type_, name in devices
        ],
    }
