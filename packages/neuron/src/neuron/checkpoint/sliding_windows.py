"""Sliding windows of attention by layer, as the families' configs say them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.hyperparameters import FILE


def full_attention(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Every layer sees all positions, whatever the config says."""
    return (None,) * num_layers


def windows_by_layer_type(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The Qwen families: `layer_types`, or every layer from `max_window_layers` on.

    Nothing slides unless `use_sliding_window` is set. values: of a language model, passed by `check_values`. Raises
    `CheckpointError`, `NotSupported`.
    """
    width = values.get("sliding_window")
    if not values.get("use_sliding_window", False) or width is None:
        return (None,) * num_layers
    layer_types = values.get("layer_types")
    if layer_types is None:
        first = values.get("max_window_layers")
        first = num_layers if first is None else first
        return tuple(width if layer >= first else None for layer in range(num_layers))
    if len(layer_types) != num_layers:
        raise CheckpointError(
            f"{FILE}: layer_types names {len(layer_types)} layers, the model has {num_layers}", file=FILE
        )
    unknown = sorted(set(layer_types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise NotSupported(f"{FILE}: attention of the type {', '.join(unknown)[:200]} is not supported", file=FILE)
    return tuple(width if kind == "sliding_attention" else None for kind in layer_types)


def window_of_all_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The Mistral family: one `sliding_window` for every layer, or null."""
    return (values.get("sliding_window"),) * num_layers
