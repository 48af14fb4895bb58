"""SiLU(gate) * up of a merged projection. Torch twin: `neuron.engine.gemm.activation.silu_mul`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(out, gate_up, stride_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < SIZE
    gate = tl.load(gate_up + row * stride_row + element, mask=mask).to(tl.float32)
    up = tl.load(gate_up + row * stride_row + SIZE + element, mask=mask).to(tl.float32)
    # The twin rounds silu(gate) to the activations' dtype before it multiplies.
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * SIZE + element, (silu * up).to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [T, 2·I] = gate | up, elements contiguous. Returns [T, I]."""
    num_tokens, width = gate_up.shape
    size = width // 2
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens and size:
        block = min(_BLOCK, triton.next_power_of_2(size))
        _silu_mul_kernel[(num_tokens, triton.cdiv(size, block))](
            out, gate_up, gate_up.stride(0), SIZE=size, BLOCK=block, num_warps=4
        )
    return out
