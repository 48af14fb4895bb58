"""Random checkpoints in the Hugging Face layout, written without `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}


def write_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """A tiny Qwen3 whose answers depend on the whole prompt and have no near-ties."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 1.5 / shape[-1] ** 0.5

    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    queries = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    tensors = {
        "model.embed_tokens.weight": weight(SHAPE["vocab_size"], hidden) * 4,
        "model.norm.weight": torch.ones(hidden),
    }
    for index in range(SHAPE["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{layer}.self_attn.q_proj.weight": weight(queries, hidden),
            f"{layer}.self_attn.k_proj.weight": weight(keys, hidden),
            f"{layer}.self_attn.v_proj.weight": weight(keys, hidden),
            f"{layer}.self_attn.o_proj.weight": weight(hidden, queries) * 4,
            f"{layer}.self_attn.q_norm.weight": torch.ones(SHAPE["head_dim"]) * 2,
            f"{layer}.self_attn.k_norm.weight": torch.ones(SHAPE["head_dim"]) * 2,
            f"{layer}.mlp.gate_proj.weight": weight(inner, hidden),
            f"{layer}.mlp.up_proj.weight": weight(inner, hidden),
            f"{layer}.mlp.down_proj.weight": weight(hidden, inner),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    save_file(tensors, folder / "model.safetensors")
    return folder
