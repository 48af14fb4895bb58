"""Mistral (Jiang et al. 2023): Llama's layer without biases, every layer with the same sliding window (or none)."""

from __future__ import annotations

from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.mlp import GatedMLP
from neuron.engine.models.decoder import CausalLM, DecoderLayer


class MistralForCausalLM(CausalLM):
    """Mistral: Llama with a sliding window in some or all layers."""

    def build_layer(self, index: int) -> DecoderLayer:
        config = self.config
        attention = SelfAttention(
            config,
            index,
            group=self.group,
        )
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, group=self.group)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp)
