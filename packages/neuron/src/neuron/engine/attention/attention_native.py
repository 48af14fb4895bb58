"""Paged attention on the CPU by our native kernels (`helexa-neuron-cpu`), on float32.

Keys and values are read where they lie: nothing is gathered, and nothing is kept beside the cache. The twin in torch is
`neuron.engine.attention.attention_cpu`, which also serves models of 16-bit activations.
"""

from __future__ import annotations

import neuron_cpu
import torch
from torch import Tensor

from neuron.engine.attention.interface import StepBatch


class NativeAttention:
    """`AttentionBackend` of the native kernels. Stateless: plans are made within a call."""

    def prepare(self, batch: StepBatch) -> None:
        pass

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_layer: Tensor,
        batch: StepBatch,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        page_size = kv_layer.shape[2]
        pages, offsets = batch.slot_mapping.div(page_size, rounding_mode="floor"), batch.slot_mapping % page_size
        kv_layer[pages, 0, offsets] = k
        kv_layer[pages, 1, offsets] = v
        return self.attend(q, kv_layer, batch, scale=scale, sliding_window=sliding_window)

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        num_tokens, num_heads, head_dim = q.shape
        if q.stride(2) != 1 or q.stride(1) != head_dim:
            q = q.contiguous()
        out = torch.empty(num_tokens, num_heads, head_dim)
        tables = batch.page_tables
        neuron_cpu.attention(
            q.data_ptr(),
            kv_layer.data_ptr(),
            out.data_ptr(),
            tables.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context_lens.data_ptr(),
            q.stride(0),
            tables.stride(0),
            batch.num_sequences,
            num_heads,
            kv_layer.shape[3],
            head_dim,
            kv_layer.shape[2],
            sliding_window or 0,
            scale,
        )
        return out
