"""Shapes of a checkpoint's tensors against its `config.json`, from their headers alone.

The engine decides again, of every tensor, when it builds the model; what is refused here, it would refuse. Sizes that
are in no file would otherwise cost a start of the engine, and be asked of the memory of the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from neuron.checkpoint.config import ModelConfig
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.safetensors_header import TensorHeader
from neuron.checkpoint.tensor_names import HEAD, canonical_name

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that a float model's weights come in."""

# Sizes of the weights of our modules, rows and columns. One that is not here is left to the engine.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "embed_tokens": ("vocabulary", "hidden"),
    "layers.{}.input_norm": ("hidden",),
    "layers.{}.attention.qkv_proj:q": ("queries", "hidden"),
    "layers.{}.attention.qkv_proj:k": ("keys", "hidden"),
    "layers.{}.attention.qkv_proj:v": ("keys", "hidden"),
    "layers.{}.attention.o_proj": ("hidden", "queries"),
    "layers.{}.attention.qk_norm:q": ("head",),
    "layers.{}.attention.qk_norm:k": ("head",),
    "layers.{}.post_attention_norm": ("hidden",),
    "layers.{}.mlp.gate_up_proj:gate": ("inner", "hidden"),
    "layers.{}.mlp.gate_up_proj:up": ("inner", "hidden"),
    "layers.{}.mlp.down_proj": ("hidden", "inner"),
    "norm": ("hidden",),
    HEAD: ("vocabulary", "hidden"),
}


def check_shapes(config: ModelConfig, names: Mapping[str, str], tensors: Iterable[TensorHeader]) -> None:
    """Refuse a checkpoint whose tensors are missing, or of another shape or dtype than its config needs.

    names: its family's `tensor_names`. Raises `CheckpointError`, which names the tensors.
    """
    sizes = {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "head": config.head_dim,
        "queries": config.num_heads * config.head_dim,
        "keys": config.num_kv_heads * config.head_dim,
    }
    by_name = {canonical_name(tensor.name): tensor for tensor in tensors}
    missing: list[str] = []
    misshapen: list[str] = []
    for name, shape in _wanted(config, names):
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


def _wanted(config: ModelConfig, names: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for theirs, ours in names.items():
        if ours not in _SIZES or (ours == HEAD and config.tie_word_embeddings):
            continue
        for index in range(config.num_layers) if "{}" in theirs else (0,):
            yield f"{theirs.format(index)}.weight", _SIZES[ours]
