"""A kernel that shows the sampling kernels' noise. Imported inside a test, where Triton knows whether to interpret."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from neuron.engine.kernels.sampling.sampling_scan import log_exponential_noise


@triton.jit
def noise_kernel(out, keys, tokens, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    key = tl.load(keys + tl.program_id(0))
    tl.store(out + tl.program_id(0) * SIZE + index, log_exponential_noise(key, tl.load(tokens + index)))
