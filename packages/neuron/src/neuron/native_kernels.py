"""Presence of the native CPU kernels (`helexa-neuron-cpu`): asked by both sides, without importing them."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

SWITCH = "NEURON_CPU_KERNELS"
"""Environment variable: `off` serves without them, `base` with plain code, `avx512` with AVX-512."""


@cache
def has_native_kernels() -> bool:
    """Whether they are installed, and the operator has not switched them off."""
    return os.environ.get(SWITCH) != "off" and find_spec("_neuron_cpu") is not None
