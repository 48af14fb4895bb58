"""Triton kernels of the CUDA path, each the equal of a plain torch function that the CPU path uses.

| module | kernels | torch twin, under `neuron.engine` |
|---|---|---|
| `attention.attention_plan`, `.paged_attention`, `.attention_merge` | paged decode, prefill | `attention.attention` |
| `attention.kv_write` | scatter K and V rows into pages | `attention.attention` |
| `norm` | RMSNorm, residual add + RMSNorm | `layers.norm` |
| `attention.rotary` | per-head Q/K RMSNorm + rotary embedding + K/V write in one pass | `layers.rotary` |
| `activation` | SiLU(gate) * up | `gemm.activation` |
| `gemm.gemv`, `gemm.gemm` | matrix products for few rows, and one of a fixed order | `layers.linear` |
| `sampling.logsumexp` | log of the sum of exp of each row of logits | `torch.logsumexp` |
| `sampling.sampling`, `.sampling_scan`, `.sampling_pick` | from logits to tokens in two launches | `sampling.sampler` |

`native` is the same for a CPU: RMSNorm, and Q/K RMSNorm + rotary embedding + K/V write, of `helexa-neuron-cpu`.

This module imports neither Triton nor a kernel, so a host without Triton can ask `is_available` and go on with torch.
The kernel modules import Triton at their top and are imported only where it said yes. Without a GPU they run in
Triton's interpreter (`TRITON_INTERPRET=1` before the first import of Triton), which is how CI tests them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

# bf16 tensor cores and asynchronous copies to shared memory.
_MIN_COMPUTE_CAPABILITY = (8, 0)


class KernelUnsupported(ValueError):
    """A shape or dtype that no kernel here covers; the message carries the number."""


@lru_cache(maxsize=16)
def _cuda_is_ready(index: int | None) -> bool:
    if find_spec("triton") is None or not torch.cuda.is_available():
        return False
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(index) >= _MIN_COMPUTE_CAPABILITY


def is_available(device: torch.device) -> bool:
    """True if the Triton kernels run on `device`: CUDA (sm_80 or newer) or ROCm with Triton installed."""
    return device.type == "cuda" and _cuda_is_ready(device.index)
