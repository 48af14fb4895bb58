"""Llama 2 and 3.x and their many descendants (Touvron et al. 2023; Llama team 2024).

Rotary scaling (linear, llama3, yarn) is the config's business; attention and feed-forward biases are optional.
"""

from __future__ import annotations

from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.mlp import GatedMLP
from neuron.engine.models.decoder import CausalLM, DecoderLayer


class LlamaForCausalLM(CausalLM):
    """Llama: rotary embedding, grouped-query attention, a gated feed-forward block."""

    def build_layer(self, index: int) -> DecoderLayer:
        config = self.config
        bias = config.attention_bias
        attention = SelfAttention(config, index, group=self.group, qkv_bias=bias, output_bias=bias)
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, group=self.group)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp)
