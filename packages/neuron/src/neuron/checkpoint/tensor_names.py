"""Names of tensors in checkpoints: which of our modules each goes to, and which are not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# Checkpoint module -> our module, `:part` where several are merged into one. `{}` stands for the layer's number.
# These are the names of Llama, which most families took over; a family adds what it has beyond them.
LLAMA_NAMES: Mapping[str, str] = {
    "model.embed_tokens": "embed_tokens",
    "model.layers.{}.input_layernorm": "layers.{}.input_norm",
    "model.layers.{}.self_attn.q_proj": "layers.{}.attention.qkv_proj:q",
    "model.layers.{}.self_attn.k_proj": "layers.{}.attention.qkv_proj:k",
    "model.layers.{}.self_attn.v_proj": "layers.{}.attention.qkv_proj:v",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attention.o_proj",
    "model.layers.{}.post_attention_layernorm": "layers.{}.post_attention_norm",
    "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate_up_proj:gate",
    "model.layers.{}.mlp.up_proj": "layers.{}.mlp.gate_up_proj:up",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "model.norm": "norm",
    "lm_head": "lm_head.matrix",
}
HEAD = "lm_head.matrix"
"""Our name of the output head, which a model with tied embeddings does not read."""

Role = Literal["matrix", "keys_and_values", "experts", "replicated"]
"""How a tensor is divided among ranks: as the columns or heads, by KV heads (of which a rank has at least one), as the
experts, not at all."""

_KEYS_AND_VALUES = (".k_proj.", ".v_proj.")
_EXPERTS = ".experts."

# Tables that are recomputed, and the weights of multi-token prediction, which is not used.
_UNREAD_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
_UNREAD_PREFIXES = ("mtp.", "model.mtp.")
# The other half of a multimodal checkpoint whose language model is served.
_OTHER_MODALITIES = (
    "model.visual.",
    "visual.",
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
)


def role_of(name: str, *, is_matrix: bool) -> Role:
    """Experts are apart from all other matrices: a token is multiplied with few of them, and a host without memory for
    all of a model keeps them elsewhere. name: the canonical one."""
    if not is_matrix:
        return "replicated"
    if _EXPERTS in name:
        return "experts"
    return "keys_and_values" if any(part in name for part in _KEYS_AND_VALUES) else "matrix"


def canonical_name(name: str) -> str:
    """A tensor's name as a plain text checkpoint has it: multimodal ones wrap the language model in one of two ways."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def is_unread(name: str) -> bool:
    """Whether nothing here needs a tensor that checkpoints carry. name: the canonical one."""
    return name.endswith(_UNREAD_SUFFIXES) or name.startswith(_UNREAD_PREFIXES + _OTHER_MODALITIES)
