"""Self-attention over a paged KV cache: the layer, and which backend a device has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuron.checkpoint.config import ModelConfig
from neuron.engine import kernels
from neuron.engine.attention.interface import AttentionBackend, StepContext
from neuron.engine.kernels.kernel_dispatch import fused_kernel, native_kernel
from neuron.engine.layers.linear import QKVParallelLinear, RowParallelLinear
from neuron.engine.layers.norm import QKNorm
from neuron.engine.layers.rotary import StepRotary, split_and_rotate
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.quantization.weight_format import WeightFormat


def make_attention_backend(
    device: torch.device, *, deterministic: bool = False, native: bool = False
) -> AttentionBackend:
    """The backend for a device: Triton kernels where they run, else gathered pages and torch's SDPA.

    deterministic: a token's result depends on its sequence alone, not on the batch nor on how its prompt was cut.
    native: the CPU's native kernels, on float32.
    """
    if kernels.is_available(device):
        from neuron.engine.attention.attention_triton import TritonAttention

        return TritonAttention(deterministic=deterministic)
    if deterministic:
        from neuron.engine.attention.attention_fixed import FixedRunAttention

        return FixedRunAttention()
    if native:
        from neuron.engine.attention.attention_native import NativeAttention  # a distribution that may be absent

        return NativeAttention()
    from neuron.engine.attention.attention_cpu import GatherAttention

    return GatherAttention()


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions, optional QK norm and sliding window.

    One rank holds a part of the query heads and their KV heads (`shard_heads`); the output projection sums over ranks.
    Heads and the layer's window are the config's; has_qk_norm: queries and keys are normalised head by head.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        *,
        group: ParallelGroup,
        qkv_bias: bool = False,
        output_bias: bool = False,
        has_qk_norm: bool = False,
        weight_format: WeightFormat | None = None,
    ) -> None:
        super().__init__()
        head_dim = config.head_dim
        self.layer_index = layer_index
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.sliding_window = config.sliding_windows[layer_index]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            bias=qkv_bias,
            group=group,
            weight_format=weight_format,
        )
        self.o_proj = RowParallelLinear(
            self.qkv_proj.query_heads.scaled(head_dim),
            config.hidden_size,
            bias=output_bias,
            group=group,
            weight_format=weight_format,
        )
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        # Set before loading: float32, by the native CPU kernels.
        self.uses_native_kernels = False
        self.qk_norm: QKNorm | None = None
        if has_qk_norm:
            self.qk_norm = QKNorm(self.num_heads, self.num_kv_heads, head_dim, config.rms_norm_eps)

    def _rotate_and_write(self, device: torch.device) -> Callable[..., Tensor] | None:
        """The kernel that normalises, rotates and writes in one pass, None where there is none."""
        if self.uses_native_kernels:
            return native_kernel("rotate_and_write")
        return fused_kernel("attention.rotary", "rotate_and_write", device)

    def forward(self, hidden: Tensor, rotary: StepRotary, ctx: StepContext) -> Tensor:
        """[T, H] -> [T, H]"""
        qkv = self.qkv_proj(hidden)
        kv_layer = ctx.kv.layer(self.layer_index)
        shape = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        norm = self.qk_norm
        rotate_and_write = self._rotate_and_write(qkv.device)
        if rotate_and_write is not None:
            q = rotate_and_write(
                qkv,
                rotary.positions,
                rotary.cos_sin,
                kv_layer,
                ctx.batch.slot_mapping,
                q_weight=None if norm is None else norm.q,
                k_weight=None if norm is None else norm.k,
                eps=0.0 if norm is None else norm.eps,
                **shape,
            )
            attended = ctx.attention.attend(
                q, kv_layer, ctx.batch, scale=self.scale, sliding_window=self.sliding_window
            )
        else:
            q, k, v = split_and_rotate(qkv, rotary, qk_norm=norm, **shape)
            attended = ctx.attention.forward(
                q, k, v, kv_layer, ctx.batch, scale=self.scale, sliding_window=self.sliding_window
            )
        projected: Tensor = self.o_proj(attended.flatten(1))
        return projected
