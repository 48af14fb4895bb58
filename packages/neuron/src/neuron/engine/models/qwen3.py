"""Qwen3 dense (Qwen team 2025): grouped-query attention with an RMSNorm on each query and key head."""

from __future__ import annotations

from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.mlp import GatedMLP
from neuron.engine.models.decoder import CausalLM, DecoderLayer


class Qwen3ForCausalLM(CausalLM):
    """Qwen3: Llama with queries and keys normalised per head."""

    def build_layer(self, index: int) -> DecoderLayer:
        config = self.config
        attention = SelfAttention(
            config.hidden_size,
            layer_index=index,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm_eps=config.rms_norm_eps,
            sliding_window=config.sliding_windows[index],
            group=self.group,
        )
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, group=self.group)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp)
