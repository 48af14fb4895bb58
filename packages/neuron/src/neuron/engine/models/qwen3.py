"""Qwen3 dense (Qwen team 2025): grouped-query attention with an RMSNorm on each query and key head."""

from __future__ import annotations

from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.mlp import GatedMLP
from neuron.engine.models.decoder import CausalLM, DecoderLayer


class Qwen3ForCausalLM(CausalLM):
    """Qwen3: Llama with queries and keys normalised per head."""

    def build_layer(self, index: int) -> DecoderLayer:
        config = self.config
        bias = config.attention_bias
        attention = SelfAttention(config, index, group=self.group, qkv_bias=bias, output_bias=bias, has_qk_norm=True)
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, group=self.group)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp)
