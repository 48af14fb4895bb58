"""The dispatcher of fused operations: a Triton kernel where the device has one, else the plain torch function.

Each operation lives as a plain function in `gemm` or `layers`; this folder may offer its equal.
Kernel modules import Triton at their top, so they are imported here, on first use, and only where they can run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from neuron.engine import kernels


@lru_cache(maxsize=64)
def _kernel(module: str, name: str, device: torch.device) -> Callable[..., Any] | None:
    if not kernels.is_available(device):
        return None
    function: Callable[..., Any] = getattr(import_module(f"neuron.engine.kernels.{module}"), name)
    return function


@lru_cache(maxsize=16)
def native_kernel(name: str) -> Callable[..., Any]:
    """`neuron.engine.kernels.native.<name>`, for layers that use the native CPU kernels: a distribution that may be
    absent, so it is imported here, on first use."""
    function: Callable[..., Any] = getattr(import_module("neuron.engine.kernels.native"), name)
    return function


def fused_kernel(module: str, name: str, device: torch.device) -> Callable[..., Any] | None:
    """`neuron.engine.kernels.<module>.<name>` if it runs on `device`, else None.

    On the CPU this costs one comparison.
    """
    if device.type == "cpu":
        return None
    return _kernel(module, name, device)
