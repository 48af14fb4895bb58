"""Activations of gated feed-forward blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron.engine.kernels.kernel_dispatch import fused_kernel

# torch divides an elementwise operation on the CPU among threads from this many elements on.
_ONE_THREAD_ELEMENTS = 32768


def silu_mul(gate_up: Tensor, *, row_by_row: bool = False) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020) of a merged projection. gate_up: [T, 2·I] = gate | up. Returns [T, I].

    row_by_row: a row gets the same bits whatever lies beside it. On the CPU, exp is computed in one way for runs of 16
    elements and in another for what is left of a row, or of a thread's share; so no thread may get a part of a row.
    """
    kernel = fused_kernel("activation", "silu_mul", gate_up.device)
    if kernel is not None:
        result: Tensor = kernel(gate_up)
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    if not row_by_row:
        return F.silu(gate).mul_(up)
    num_rows = max(_ONE_THREAD_ELEMENTS // gate.shape[1], 1)
    return torch.cat([F.silu(gate[row : row + num_rows]) for row in range(0, gate.shape[0], num_rows)]).mul_(up)
