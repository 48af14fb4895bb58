"""Checkpoint folders that pass every check and take no room: true headers over data that is all holes."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron.daemon.hub.sources import demo_model_path

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BYTES = {"F32": 4, "BF16": 2, "F16": 2}

TINY: dict[str, Any] = {
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
    "tie_word_embeddings": True,
}


def shapes_of(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The tensors of a Qwen3 of these sizes."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": [hidden],
            f"{layer}.post_attention_layernorm.weight": [hidden],
            f"{layer}.self_attn.q_proj.weight": [queries, hidden],
            f"{layer}.self_attn.k_proj.weight": [keys, hidden],
            f"{layer}.self_attn.v_proj.weight": [keys, hidden],
            f"{layer}.self_attn.o_proj.weight": [hidden, queries],
            f"{layer}.self_attn.q_norm.weight": [head_dim],
            f"{layer}.self_attn.k_norm.weight": [head_dim],
            f"{layer}.mlp.gate_proj.weight": [inner, hidden],
            f"{layer}.mlp.up_proj.weight": [inner, hidden],
            f"{layer}.mlp.down_proj.weight": [hidden, inner],
        }
    return shapes


def header_of(shapes: Mapping[str, list[int]], dtype: str = "F32") -> tuple[dict[str, Any], int]:
    """A safetensors header over tensors that lie one after another, and the bytes of their data."""
    entries: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return entries, at


def write_safetensors(file: Path, header: object, num_bytes: int) -> None:
    """A file of this header, and holes for its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + num_bytes)


def write_checkpoint(folder: Path, config: Mapping[str, Any] = TINY, *, dtype: str = "F32") -> Path:
    """A folder with the demo model's tokenizer and template, this config, and weights to match."""
    folder.mkdir(parents=True, exist_ok=True)
    with_text(folder)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", *header_of(shapes_of(config), dtype))
    return folder


def with_text(folder: Path) -> Path:
    """The folder, with the demo model's tokenizer and template."""
    for name in TEXT_FILES:
        shutil.copy(demo_model_path() / name, folder / name)
    return folder
