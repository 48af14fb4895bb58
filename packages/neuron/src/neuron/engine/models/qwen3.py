"""Qwen3 dense (Qwen team 2025): grouped-query attention with an RMSNorm on each query and key head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from neuron.checkpoint.config import ModelConfig, windows_by_layer_type
from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.mlp import GatedMLP
from neuron.engine.models.decoder import LLAMA_NAMES, CausalLM, DecoderLayer


class Qwen3ForCausalLM(CausalLM):
    CHECKPOINT_NAMES: ClassVar[Mapping[str, str]] = {
        **LLAMA_NAMES,
        "model.layers.{}.self_attn.q_norm": "layers.{}.attention.qk_norm:q",
        "model.layers.{}.self_attn.k_norm": "layers.{}.attention.qk_norm:k",
    }

    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        config = ModelConfig.from_hf(hf, default_head_dim=128)
        return dataclasses.replace(config, sliding_windows=windows_by_layer_type(hf, config.num_layers))

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
