"""The values of a `config.json` that sizes and loops depend on: of the right type, and within what models have.

A value far outside would not only fail later: a thousand million layers are built one by one, and a table of positions
is as long as the config says. Both sides ask this before they use a value, so none gets to see another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from neuron.checkpoint.errors import CheckpointError

FILE = "config.json"

INTEGERS: Mapping[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 1_024),
    "hidden_size": (1, 2**18),
    "intermediate_size": (1, 2**22),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (2, 2**12),
    "vocab_size": (1, 2**22),
    "max_position_embeddings": (1, 2**25),
    "original_max_position_embeddings": (1, 2**25),
    "sliding_window": (1, 2**31 - 1),
    "max_window_layers": (0, 1_024),
}
"""Least and most of each whole number; null is as good as absent."""

NUMBERS: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (1e-30, 1.0),
    "rope_theta": (1.0001, 1e18),
    "partial_rotary_factor": (1e-3, 1.0),
}
ROPE_NUMBERS: Mapping[str, tuple[float, float]] = {
    **NUMBERS,
    "factor": (1e-3, 1e5),
    "original_max_position_embeddings": (1, 2**25),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
    "attention_factor": (1e-6, 1e6),
}
_DIVISORS = (1e-6, 1e6)
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "divisors": ("divisors",),
}
"""Rotary scalings that layers here have, and the numbers that each cannot do without."""
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_SHOWN = 80
_LONGEST_NAME = 200
_MOST_ARCHITECTURES = 16


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: `text_config` over the top level where a checkpoint nests it."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def check_values(config: Mapping[str, Any]) -> None:
    """Refuse what is there and cannot be.

    config: a `config.json`, whose values may be nested under `text_config`. Raises `CheckpointError`, which names the
    key, its value and what it may be.
    """
    values = language_model(config)
    for key, (least, most) in INTEGERS.items():
        value = values.get(key)
        if value is not None and (not _is_integer(value) or not least <= value <= most):
            raise _wrong(key, value, "a positive integer" if least else "an integer", f" ({least} to {most})")
    for key, limits in NUMBERS.items():
        _check_number(values, key, limits)
    for key in FLAGS:
        if values.get(key) not in (None, True, False):
            raise _wrong(key, values[key], "true or false")
    for form in ("rope_parameters", "rope_scaling"):
        _check_rope(values, form)
    _check_heads(values)
    _check_names(config, "architectures", _MOST_ARCHITECTURES)
    _check_names(values, "layer_types", INTEGERS["num_hidden_layers"][1])
    for holder in (config, values):
        model_type = holder.get("model_type")
        if model_type is not None and not (isinstance(model_type, str) and len(model_type) <= _LONGEST_NAME):
            raise _wrong("model_type", model_type, "a name")


def is_complete(config: Mapping[str, Any]) -> bool:
    """Whether a config has every value that has no default."""
    values = language_model(config)
    return all(values.get(key) is not None for key in _REQUIRED)


def count(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number, or its default. Raises `CheckpointError` where there is neither, or one below 1."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{FILE}: {key} is missing", file=FILE)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(key, value, "a positive integer")
    return value


def number(values: Mapping[str, Any], key: str, default: float) -> float:
    """A number above 0, or its default. Raises `CheckpointError`."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _wrong(key, value, "a positive number")
    return float(value)


def _check_names(values: Mapping[str, Any], key: str, most: int) -> None:
    names = values.get(key)
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in names):
        raise _wrong(key, names, "a list of names")
    if len(names) > most:
        raise CheckpointError(f"{FILE}: {key} lists {len(names)} names, and at most {most} make sense", file=FILE)


def _check_rope(values: Mapping[str, Any], form: str) -> None:
    rope = values.get(form)
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{FILE}: rope parameters must be an object, got {brief(rope)}", file=FILE)
    for key, limits in ROPE_NUMBERS.items():
        _check_number(rope, key, limits, prefix=f"{form}.")
    if rope.get("divisors") is not None:
        _check_divisors(rope["divisors"], f"{form}.divisors")
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise _wrong(f"{form}.high_freq_factor", high, f"more than the low_freq_factor {low}")
    if (rope.get("rope_type") or rope.get("type")) == "yarn":
        positions = values.get("max_position_embeddings") or 2048
        original = (
            rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or positions
        )
        factor = rope.get("factor")
        most = INTEGERS["max_position_embeddings"][1]
        if factor is not None and factor * original > most:
            raise _wrong(f"{form}.factor", factor, f"at most {most / original:g} for {original:g} positions")


def _check_divisors(divisors: Any, key: str) -> None:
    """One for each rotated pair of a head, so there are no more than half of its elements."""
    most = INTEGERS["head_dim"][1] // 2
    if not isinstance(divisors, list) or not 1 <= len(divisors) <= most:
        raise _wrong(key, divisors, f"a list of 1 to {most} numbers")
    for value in divisors:
        _check_number({key: value}, key, _DIVISORS)


def _check_heads(values: Mapping[str, Any]) -> None:
    heads = values.get("num_attention_heads")
    kv_heads = values.get("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise CheckpointError(f"{FILE}: {heads} attention heads do not divide among {kv_heads} KV heads", file=FILE)
    head_dim = values.get("head_dim")
    if head_dim is not None and head_dim % 2:
        raise _wrong("head_dim", head_dim, "an even number, as its halves are rotated against each other")


def _check_number(values: Mapping[str, Any], key: str, limits: tuple[float, float], *, prefix: str = "") -> None:
    value = values.get(key)
    if value is None:
        return
    least, most = limits
    is_number = _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
    if not is_number or not least <= value <= most:
        raise _wrong(f"{prefix}{key}", value, "a positive number", f" ({least:g} to {most:g})")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(key: str, value: Any, wanted: str, limits: str = "") -> CheckpointError:
    return CheckpointError(f"{FILE}: {key} must be {wanted}, got {brief(value)}{limits}", file=FILE)


def brief(value: Any) -> str:
    """A value as Python writes it, cut to what a message bears."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of hundreds of digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
