"""Activations of gated feed-forward blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from neuron.layers.fused import fused_kernel


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020) of a merged projection. gate_up: [T, 2·I] = gate | up. Returns [T, I]."""
    kernel = fused_kernel("activation", "silu_mul", gate_up.device)
    if kernel is not None:
        result: Tensor = kernel(gate_up)
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
