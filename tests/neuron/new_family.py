"""A family that ships with nobody: one class, one entry, and a checkpoint of it with random weights.

What a checkpoint of it is called differs from every other family's, and so do its tensors. Processes that a test starts
learn of the entry through a `sitecustomize`, as a family of ours is in the table that they import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from neuron.checkpoint.families import Family
from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.mlp import GatedMLP
from neuron.engine.models.decoder import CausalLM, DecoderLayer
from safetensors.torch import save_file

from tests.neuron.checkpoint_folders import with_text

MODEL_TYPE = "newcomer"


class NewcomerForCausalLM(CausalLM):
    """Biases on queries, keys and values, and none elsewhere."""

    def build_layer(self, index: int) -> DecoderLayer:
        config = self.config
        attention = SelfAttention(config, index, group=self.group, qkv_bias=True)
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, group=self.group)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp)


ENTRY = Family(
    "tests.neuron.new_family:NewcomerForCausalLM",
    default_head_dim=16,
    tensor_names={
        "wte": "embed_tokens",
        "blocks.{}.pre": "layers.{}.input_norm",
        "blocks.{}.att.q": "layers.{}.attention.qkv_proj:q",
        "blocks.{}.att.k": "layers.{}.attention.qkv_proj:k",
        "blocks.{}.att.v": "layers.{}.attention.qkv_proj:v",
        "blocks.{}.att.out": "layers.{}.attention.o_proj",
        "blocks.{}.post": "layers.{}.post_attention_norm",
        "blocks.{}.ff.gate": "layers.{}.mlp.gate_up_proj:gate",
        "blocks.{}.ff.up": "layers.{}.mlp.gate_up_proj:up",
        "blocks.{}.ff.down": "layers.{}.mlp.down_proj",
        "final": "norm",
        "lm_head": "lm_head.matrix",
    },
)

CONFIG: dict[str, Any] = {
    "architectures": ["NewcomerForCausalLM"],
    "model_type": MODEL_TYPE,
    "vocab_size": 4096,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_newcomer(folder: Path) -> Path:
    """A checkpoint that can be served: the demo model's tokenizer and template over random weights."""
    generator = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"wte.weight": weight(4096, 48) * 4, "final.weight": torch.ones(48)}
    for index in range(2):
        tensors |= {
            f"blocks.{index}.pre.weight": torch.ones(48),
            f"blocks.{index}.post.weight": torch.ones(48),
            f"blocks.{index}.att.out.weight": weight(48, 64),
            f"blocks.{index}.ff.gate.weight": weight(96, 48),
            f"blocks.{index}.ff.up.weight": weight(96, 48),
            f"blocks.{index}.ff.down.weight": weight(48, 96),
        }
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            tensors[f"blocks.{index}.att.{name}.weight"] = weight(rows, 48)
            tensors[f"blocks.{index}.att.{name}.bias"] = weight(rows)
    folder.mkdir(parents=True, exist_ok=True)
    with_text(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sitecustomize(folder: Path) -> None:
    """For `PYTHONPATH`: every interpreter that starts with it has the entry in its table."""
    settings = f"default_head_dim={ENTRY.default_head_dim}, tensor_names={dict(ENTRY.tensor_names)!r}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "from neuron.checkpoint.families import FAMILIES, Family\n"
        f"FAMILIES[{MODEL_TYPE!r}] = Family({ENTRY.class_path!r}, {settings})\n"
    )
