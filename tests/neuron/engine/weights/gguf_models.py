"""Small models in GGUF, their matrices in blocks of many types, beside the same numbers as safetensors."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from neuron.checkpoint.block_types import BLOCK_TYPES
from neuron.checkpoint.gguf.tensor_names import gguf_name
from neuron.engine.quantization.gguf_blocks import dequantize
from safetensors.torch import save_file
from torch import Tensor

from tests.neuron.checkpoint.gguf.writer import model_metadata, write
from tests.neuron.engine.quantization.blocks import SCALES, random_blocks

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 160, 256, 512, 4, 2, 64, 2
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "rope_theta": 10_000.0, "eos_token_id": 2,
}  # fmt: skip


def shapes(model_type: str, *, tied: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        for name, size in sizes.items():
            found[f"{prefix}.self_attn.{name}_proj.weight"] = (size, HIDDEN)
            if model_type == "qwen2":
                found[f"{prefix}.self_attn.{name}_proj.bias"] = (size,)
        if model_type == "qwen3":
            found |= {f"{prefix}.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        found[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        found |= {f"{prefix}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        found[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    found["model.norm.weight"] = (HIDDEN,)
    return found if tied else found | {"lm_head.weight": (VOCAB, HIDDEN)}


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of the model in the order of a file: within a head, 0, D/2, 1, D/2 + 1, …"""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_pair(folder: Path, model_type: str, *, kinds: Sequence[str], tied: bool = False) -> tuple[Path, Path]:
    """(folder with safetensors, GGUF file). kinds: of the matrices, in turn."""
    turns = itertools.cycle(kinds)
    architecture = model_type if model_type != "mistral" else "llama"
    numbers, stored = {}, {}
    for index, (name, shape) in enumerate(shapes(model_type, tied=tied).items()):
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0) if architecture == "llama" else 0
        kind = next(turns) if len(shape) > 1 else "F32"
        if kind in SCALES:
            raw = random_blocks(kind, *shape, seed=index)
            numbers[name] = dequantize(raw, kind)
        else:
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(index))
            drawn = 1 + 0.1 * drawn if name.endswith("norm.weight") else drawn / math.sqrt(shape[-1])
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            numbers[name] = drawn.to(dtype)
            raw = numbers[name].view(torch.uint8).view(shape[0], -1)
        if heads:
            raw = interleaved(raw, heads)
        assert raw.numel() == math.prod(shape) // BLOCK_TYPES[kind].block_elements * BLOCK_TYPES[kind].block_bytes
        stored[gguf_name(name)] = kind, shape, raw.numpy().tobytes()
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, folder / "model.safetensors")
    architectures = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = CONFIG | {
        "model_type": model_type, "architectures": [f"{architectures[model_type]}ForCausalLM"],
        "tie_word_embeddings": tied, "attention_bias": model_type == "qwen2",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    metadata = model_metadata(
        architecture, VOCAB, block_count=LAYERS, embedding_length=HIDDEN, feed_forward_length=INNER,
        attention__head_count=HEADS, attention__head_count_kv=KV_HEADS, attention__key_length=HEAD_DIM,
        rope__dimension_count=HEAD_DIM,
    )  # fmt: skip
    return folder, write(folder.with_suffix(".gguf"), metadata, stored)
