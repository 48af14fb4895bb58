"""Rotary embedding parameters as plain data: what a `config.json` says of its frequencies, in either of its forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.hyperparameters import FILE, ROPE_TYPES, brief, number


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequencies of a rotary embedding, as the checkpoint's `rope_parameters` give them.

    rope_type: `default`, `linear`, `llama3`, `yarn` or `divisors` (of the inverse frequencies, one each). theta: the
    base. partial_rotary_factor: share of a head's elements that is rotated, from the front. factor: how much longer the
    context became. original_max_positions: the context the model was pretrained on. low_freq_factor, high_freq_factor:
    llama3's band borders. beta_fast, beta_slow, truncate: yarn's ramp. attention_factor: what cosines and sines are
    multiplied by.
    """

    rope_type: str = "default"
    theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Temperature of attention under YaRN (Peng et al. 2023, section 3.4); the two mscales as DeepSeek uses them."""

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def read_rope(values: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """From `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling`.

    values: of a language model, with numbers that `check_values` has passed. max_positions: its
    `max_position_embeddings`. Raises `NotSupported`, `CheckpointError`.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise NotSupported(f"{FILE}: rope parameters that differ between layer types are not supported", file=FILE)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise NotSupported(
            f"{FILE}: rope type {brief(rope_type)} is not supported, only {', '.join(ROPE_TYPES)} are", file=FILE
        )
    for key in ROPE_TYPES[rope_type]:
        if rope.get(key) is None:
            raise CheckpointError(f"{FILE}: {key} is missing, which the rope type {rope_type} needs", file=FILE)
    theta = number(rope, "rope_theta", values.get("rope_theta") or 10_000.0)
    partial = number(rope, "partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)
    if rope_type == "default":
        return RopeScaling(theta=theta, partial_rotary_factor=partial)
    if rope_type == "divisors":
        return RopeScaling(rope_type, theta, partial, divisors=tuple(map(float, rope["divisors"])))
    original = values.get("original_max_position_embeddings") or max_positions
    original_max_positions = int(number(rope, "original_max_position_embeddings", original))
    factor = number(rope, "factor", max_positions / original_max_positions)
    attention_factor = 1.0
    if rope_type == "yarn":
        inferred = yarn_attention_factor(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
        attention_factor = number(rope, "attention_factor", inferred)
    return RopeScaling(
        rope_type=rope_type,
        theta=theta,
        partial_rotary_factor=partial,
        factor=factor,
        original_max_positions=original_max_positions,
        low_freq_factor=number(rope, "low_freq_factor", 1.0),
        high_freq_factor=number(rope, "high_freq_factor", 4.0),
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=attention_factor,
    )
