"""A decoder's hyperparameters, read from a Hugging Face `config.json` of any vintage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.hyperparameters import ROPE_TYPES, check_values, language_model, quantization_of
from neuron.engine.layers.rotary import RopeScaling, yarn_attention_factor
from neuron.engine.models.errors import BadCheckpoint, UnsupportedArchitecture

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder family needs to know. Sizes are the whole model's, `*_local` those of this rank.

    head_dim: elements per attention head, not necessarily hidden_size / num_heads. sliding_windows: per layer, the
    number of positions a query sees (its own included), None for all. max_position_embeddings: positions that the
    checkpoint was made for (with yarn, after stretching). dtype: of the stored weights, None if the config is silent.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeScaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_windows: tuple[int | None, ...]
    dtype: torch.dtype | None
    num_heads_local: int
    num_kv_heads_local: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, default_head_dim: int | None = None) -> ModelConfig:
        """Read a `config.json`. `default_head_dim`: the family's, where the config may leave it out.

        Hyperparameters may be nested under `text_config`. Raises `BadCheckpoint` for missing or senseless values,
        `UnsupportedArchitecture` for a feature that no layer here has.
        """
        try:
            check_values(hf)
        except CheckpointError as exc:
            raise BadCheckpoint(exc.message) from exc
        hf = language_model(hf)
        num_layers = _count(hf, "num_hidden_layers")
        hidden_size = _count(hf, "hidden_size")
        num_heads = _count(hf, "num_attention_heads")
        num_kv_heads = _count(hf, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise BadCheckpoint(f"{num_heads} attention heads do not divide among {num_kv_heads} KV heads")
        head_dim = _count(hf, "head_dim", default_head_dim or hidden_size // num_heads)
        activation = hf.get("hidden_act") or hf.get("hidden_activation") or "silu"
        if activation not in ("silu", "swish"):
            raise UnsupportedArchitecture(f"activation {str(activation)[:80]!r} is not supported, only silu is")
        _refuse_quantization(hf)
        max_positions = _count(hf, "max_position_embeddings", 2048)
        rope = _rope(hf, max_positions)
        rotary_dim = int(head_dim * rope.partial_rotary_factor)
        if rotary_dim < 2 or rotary_dim % 2:
            raise BadCheckpoint(f"of heads of {head_dim} elements, {rotary_dim} would be rotated, which are no pairs")
        if rope.rope_type == "yarn":
            max_positions = max(max_positions, int(rope.factor * rope.original_max_positions))
        return cls(
            model_type=str(hf.get("model_type", "")),
            vocab_size=_count(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(hf, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(hf, "rms_norm_eps", 1e-6),
            rope=rope,
            max_position_embeddings=max_positions,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            sliding_windows=(None,) * num_layers,
            dtype=_stored_dtype(hf),
            num_heads_local=num_heads,
            num_kv_heads_local=num_kv_heads,
        )


def windows_by_layer_type(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows of the Qwen families: `layer_types`, or every layer from `max_window_layers` on.

    Nothing slides unless `use_sliding_window` is set.
    """
    hf = language_model(hf)
    window = hf.get("sliding_window")
    if not hf.get("use_sliding_window", False) or window is None:
        return (None,) * num_layers
    width = _count(hf, "sliding_window")
    layer_types = hf.get("layer_types")
    if layer_types is None:
        first = hf.get("max_window_layers")
        first = num_layers if first is None else int(first)
        return tuple(width if layer >= first else None for layer in range(num_layers))
    if len(layer_types) != num_layers:
        raise BadCheckpoint(f"layer_types names {len(layer_types)} layers, the model has {num_layers}")
    unknown = sorted(set(layer_types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UnsupportedArchitecture(f"attention of the type {', '.join(unknown)[:200]} is not supported")
    return tuple(width if kind == "sliding_attention" else None for kind in layer_types)


def window_of_all_layers(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows of the Mistral family: one `sliding_window` for every layer, or null."""
    hf = language_model(hf)
    window = None if hf.get("sliding_window") is None else _count(hf, "sliding_window")
    return (window,) * num_layers


def _count(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadCheckpoint(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise BadCheckpoint(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def _stored_dtype(hf: Mapping[str, Any]) -> torch.dtype | None:
    return _DTYPES.get(str(hf.get("dtype") or hf.get("torch_dtype")).removeprefix("torch."))


def _refuse_quantization(hf: Mapping[str, Any]) -> None:
    method = quantization_of(hf)
    if method is not None:
        raise UnsupportedArchitecture(
            f"quantised weights (quant_method {method!r}) are not supported, only bfloat16, float16 and float32 are"
        )


def _rope(hf: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """Rotary parameters of either form: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    values = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(values, Mapping):
        raise BadCheckpoint(f"config.json: rope parameters must be an object, got {values!r}")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise UnsupportedArchitecture("rope parameters that differ between layer types are not supported")
    rope_type = str(values.get("rope_type") or values.get("type") or "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedArchitecture(
            f"rope type {rope_type[:80]!r} is not supported, only {', '.join(ROPE_TYPES)} are"
        )
    theta = _number(values, "rope_theta", hf.get("rope_theta") or 10_000.0)
    partial = _number(values, "partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    if rope_type == "default":
        return RopeScaling(theta=theta, partial_rotary_factor=partial)
    original = hf.get("original_max_position_embeddings") or max_positions
    original_max_positions = int(_number(values, "original_max_position_embeddings", original))
    stretch = max_positions / original_max_positions if rope_type == "yarn" else None
    factor = _number(values, "factor", stretch)
    attention_factor = 1.0
    if rope_type == "yarn":
        inferred = yarn_attention_factor(factor, values.get("mscale"), values.get("mscale_all_dim"))
        attention_factor = _number(values, "attention_factor", inferred)
    is_llama3 = rope_type == "llama3"
    return RopeScaling(
        rope_type=rope_type,
        theta=theta,
        partial_rotary_factor=partial,
        factor=factor,
        original_max_positions=original_max_positions,
        low_freq_factor=_number(values, "low_freq_factor", None if is_llama3 else 1.0),
        high_freq_factor=_number(values, "high_freq_factor", None if is_llama3 else 4.0),
        beta_fast=_number(values, "beta_fast", 32.0),
        beta_slow=_number(values, "beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
        attention_factor=attention_factor,
    )
