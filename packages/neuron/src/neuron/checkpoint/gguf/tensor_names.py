"""Names of tensors in GGUF files, and their names in the checkpoints that the files were made of.

The latter are what `neuron.checkpoint.tensor_names` maps to our modules. Source: `MODEL_TENSORS` and `TENSOR_NAMES` of
the gguf package, `convert_hf_to_gguf.py` of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_MODULES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
ROPE_DIVISORS = "rope_freqs.weight"
"""What inverse frequencies are divided by, [head_dim / 2]: the scaling of Llama 3, which is in no key."""

HEAD = "output.weight"
"""Absent where the head is the embedding."""

_NAME = re.compile(r"(blk)\.(0|[1-9]\d{0,4})\.([a-z_]+)\.(weight|bias)|([a-z_]+)\.(weight|bias)")

# Rows of queries and keys lie as pairs (elements 0 and D/2 of a head, 1 and D/2 + 1, …) where llama.cpp rotates
# neighbours, and as halves, as in the original, where it rotates those.
_INTERLEAVED_ARCHITECTURES = frozenset(("llama", "mistral3"))
_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


def original_name(name: str) -> str | None:
    """A tensor's name in the original checkpoint; None for one that no served architecture has."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if found[1]:
        module = _MODULES.get(f"blk.{{}}.{found[3]}")
        return None if module is None else f"{module.format(found[2])}.{found[4]}"
    module = _MODULES.get(found[5])
    return None if module is None else f"{module}.{found[6]}"


def gguf_name(name: str) -> str:
    """The opposite of `original_name`. Raises `KeyError` for a name that files have no other for."""
    module, _, suffix = name.rpartition(".")
    number = re.search(r"\.layers\.(\d+)\.", name)
    generic = module if number is None else module.replace(f".layers.{number[1]}.", ".layers.{}.")
    theirs = {original: ours for ours, original in _MODULES.items()}[generic]
    return f"{theirs.format(number[1]) if number else theirs}.{suffix}"


def is_interleaved(architecture: str, name: str) -> bool:
    """Whether a tensor's rows lie as pairs: within a head of D rows, row 2i + s of the file is row s·D/2 + i."""
    return architecture in _INTERLEAVED_ARCHITECTURES and _ROTATED.fullmatch(name) is not None
