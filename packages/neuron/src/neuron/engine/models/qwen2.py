"""Qwen2 and Qwen2.5 dense (Qwen team 2024): Llama's layer with biases on the query, key and value projections."""

from __future__ import annotations

from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.mlp import GatedMLP
from neuron.engine.models.decoder import CausalLM, DecoderLayer


class Qwen2ForCausalLM(CausalLM):
    """Qwen2: Llama with biases in the projections of queries, keys and values."""

    def build_layer(self, index: int) -> DecoderLayer:
        config = self.config
        attention = SelfAttention(config, index, group=self.group, qkv_bias=True)
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, group=self.group)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp)
