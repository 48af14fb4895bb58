"""Norms and rotary embedding on the CPU by our native kernels (`helexa-neuron-cpu`), on float32.

Each is one pass through memory where torch makes five to ten. A row is computed in one order whatever lies beside it.
Twins in torch: `neuron.engine.layers.norm.add_rms_norm`, and `neuron.engine.layers.rotary.split_and_rotate` followed by
the write of `neuron.engine.attention.attention_cpu`.
"""

from __future__ import annotations

import neuron_cpu
import torch
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of `residual + x`, or of x. Returns (normalised, sum); the sum overwrites `residual`.

    x, residual: [T, H] float32, contiguous; weight: [H] float32.
    """
    out = torch.empty_like(x)
    neuron_cpu.rms_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        eps,
    )
    return out, x if residual is None else residual


def rotate_and_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Per-head norm where there are weights, rotation, and this step's keys and values into their pages.

    qkv: [T, (Hq + 2·Hkv)·D] float32, contiguous, is overwritten; positions, slot_mapping: [T] int64; cos_sin: [P, R]
    float32; kv_layer: [num_pages, 2, page_size, Hkv, D] float32. Returns the queries, [T, Hq, D], rows of `qkv`.
    """
    neuron_cpu.rotate_and_write(
        qkv.data_ptr(),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        0 if q_weight is None else q_weight.data_ptr(),
        0 if k_weight is None else k_weight.data_ptr(),
        kv_layer.data_ptr(),
        slot_mapping.data_ptr(),
        qkv.shape[0],
        num_heads,
        num_kv_heads,
        head_dim,
        cos_sin.shape[1],
        kv_layer.shape[2],
        eps,
    )
    return qkv.view(qkv.shape[0], -1, head_dim)[:, :num_heads]
