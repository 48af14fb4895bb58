"""Whether the tensors of a checkpoint have the sizes that its `config.json` says: known from their headers alone.

The engine decides again, of every tensor, when it builds the model; what is refused here, it would refuse. Sizes that
are in no file would otherwise cost a start of the engine, and be asked of the memory of the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.hyperparameters import language_model
from neuron.checkpoint.safetensors_header import TensorHeader

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that a float model's weights come in."""

# What a layer of every supported family has: rows and columns by the sizes they are of.
_OF_A_LAYER: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj.weight": ("queries", "hidden"),
    "self_attn.k_proj.weight": ("keys", "hidden"),
    "self_attn.v_proj.weight": ("keys", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "queries"),
    "mlp.gate_proj.weight": ("inner", "hidden"),
    "mlp.up_proj.weight": ("inner", "hidden"),
    "mlp.down_proj.weight": ("hidden", "inner"),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
_OF_A_MODEL: Mapping[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocabulary", "hidden"),
    "model.norm.weight": ("hidden",),
}
_HEAD = "lm_head.weight"


def canonical_name(name: str) -> str:
    """A tensor's name as a plain text checkpoint has it: multimodal ones wrap the language model in one of two ways."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def check_shapes(config: Mapping[str, Any], tensors: Iterable[TensorHeader], *, default_head_dim: int | None) -> None:
    """Refuse a checkpoint whose tensors are missing, or of another shape or dtype than its config needs.

    config: one that `check_values` has passed as complete. default_head_dim: the family's, where the config has none.
    Raises `CheckpointError`, which names the tensors.
    """
    values = language_model(config)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim") or default_head_dim or hidden // heads
    sizes = {
        "hidden": hidden,
        "inner": values["intermediate_size"],
        "vocabulary": values["vocab_size"],
        "queries": heads * head_dim,
        "keys": (values.get("num_key_value_heads") or heads) * head_dim,
    }
    by_name = {canonical_name(tensor.name): tensor for tensor in tensors}
    wanted = _wanted(values["num_hidden_layers"], has_head=not values.get("tie_word_embeddings", False))
    missing: list[str] = []
    misshapen: list[str] = []
    for name, shape in wanted:
        tensor = by_name.get(name)
        expected = tuple(sizes[size] for size in shape)
        if tensor is None:
            missing.append(name)
        elif tensor.shape != expected:
            misshapen.append(f"{name} {list(tensor.shape)} (expected {list(expected)})")
        elif tensor.dtype not in FLOATS:
            raise CheckpointError(f"dtype {tensor.dtype} is not supported for weights", tensors=[name])
    if missing:
        raise CheckpointError("the checkpoint lacks tensors that the model needs", tensors=missing)
    if misshapen:
        raise CheckpointError("tensors have another shape than config.json says", tensors=misshapen)


def _wanted(num_layers: int, *, has_head: bool) -> Iterable[tuple[str, tuple[str, ...]]]:
    yield from _OF_A_MODEL.items()
    if has_head:
        yield _HEAD, ("vocabulary", "hidden")
    for index in range(num_layers):
        for suffix, shape in _OF_A_LAYER.items():
            yield f"model.layers.{index}.{suffix}", shape
