"""A decoder's hyperparameters, read from a Hugging Face `config.json` of any vintage: what both sides know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.families import Family, family_of
from neuron.checkpoint.hyperparameters import FILE, brief, check_values, count, language_model, number
from neuron.checkpoint.rope import RopeScaling, read_rope

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by the word that configs have for its type."""


class Quantised(NotSupported):
    """The weights are quantised in a way that is not read here. facts: `requested`, the method."""

    kind = "quant_unsupported"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder family needs to know. Sizes are the whole model's.

    head_dim: elements per attention head, not necessarily hidden_size / num_heads. sliding_windows: per layer, the
    number of positions a query sees (its own included), None for all. max_position_embeddings: positions that the
    checkpoint was made for (with yarn, after stretching). dtype: of the stored weights, one of `DTYPES`, None if the
    config is silent.
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
    dtype: str | None


def read_config(config: Mapping[str, Any], family: Family | None = None) -> ModelConfig:
    """Read a `config.json`, whose hyperparameters may be nested. family: where it is known already.

    Raises `CheckpointError` for missing or senseless values, `NotSupported` for a family or a feature that no layer
    here has.
    """
    check_values(config)
    family = family or family_of(config)
    refuse_quantised(config)
    values = language_model(config)
    activation = values.get("hidden_act") or values.get("hidden_activation") or "silu"
    if activation not in ("silu", "swish"):
        raise NotSupported(f"{FILE}: activation {brief(activation)} is not supported, only silu is", file=FILE)
    num_layers, hidden_size = count(values, "num_hidden_layers"), count(values, "hidden_size")
    num_heads = count(values, "num_attention_heads")
    head_dim = values.get("head_dim") or family.default_head_dim or _derived_head_dim(hidden_size, num_heads)
    max_positions = count(values, "max_position_embeddings", 2048)
    rope = read_rope(values, max_positions)
    rotary_dim = int(head_dim * rope.partial_rotary_factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"{FILE}: of heads of {head_dim} elements, {rotary_dim} would be rotated, which are no pairs", file=FILE
        )
    if rope.divisors and len(rope.divisors) != rotary_dim // 2:
        raise CheckpointError(
            f"{FILE}: {len(rope.divisors)} divisors of frequencies, and {rotary_dim // 2} pairs of a head are rotated",
            file=FILE,
        )
    if rope.rope_type == "yarn":
        max_positions = max(max_positions, int(rope.factor * rope.original_max_positions))
    dtype = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    return ModelConfig(
        model_type=str(values.get("model_type") or ""),
        vocab_size=count(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=count(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=count(values, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=number(values, "rms_norm_eps", 1e-6),
        rope=rope,
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
        sliding_windows=family.windows(values, num_layers),
        dtype=dtype if dtype in DTYPES else None,
    )


def _derived_head_dim(hidden_size: int, num_heads: int) -> int:
    head_dim = hidden_size // num_heads
    if head_dim < 1:
        raise CheckpointError(
            f"{FILE}: hidden_size {hidden_size} leaves {num_heads} attention heads no dimension", file=FILE
        )
    if head_dim % 2:
        raise CheckpointError(
            f"{FILE}: hidden_size {hidden_size} gives each of {num_heads} attention heads {head_dim} elements; "
            "head_dim must be an even number, as its halves are rotated against each other",
            file=FILE,
        )
    return head_dim


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raises `Quantised` where a config says that the weights are."""
    values = language_model(config)
    found = values.get("quantization_config") or values.get("compression_config")
    if not found:
        return
    method = brief(found.get("quant_method", "unknown") if isinstance(found, Mapping) else found).strip("'")
    raise Quantised(
        f"{FILE}: weights quantised with `{method}` are not supported yet, only bfloat16, float16 and float32 are",
        file=FILE,
        facts={"requested": method},
    )
