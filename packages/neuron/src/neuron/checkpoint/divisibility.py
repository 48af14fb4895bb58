"""Whether a model's sizes can be divided among ranks: known from `config.json`, before anything large is fetched.

The engine decides again when it builds its part (`neuron.engine.parallel.sharding`); a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def indivisible(config: Mapping[str, Any], num_ranks: int, *, is_even: bool) -> str | None:
    """What stands in the way, with the numbers; None if nothing does, or if the sizes are not all there.

    config: a `config.json`, whose sizes may be nested under `text_config`. is_even: the parts are to be equal.
    """
    nested = config.get("text_config")
    sizes = {**config, **nested} if isinstance(nested, Mapping) else config
    heads, inner = sizes.get("num_attention_heads"), sizes.get("intermediate_size")
    kv_heads = sizes.get("num_key_value_heads") or heads
    if num_ranks < 2 or not (_is_size(heads) and _is_size(kv_heads) and _is_size(inner)):
        return None
    if kv_heads < num_ranks and num_ranks % kv_heads:
        return f"{num_ranks} ranks are no multiple of its {kv_heads} KV heads"
    if not is_even:
        if kv_heads < num_ranks and heads // kv_heads < num_ranks // kv_heads:
            return (
                f"its {kv_heads} KV heads with {heads // kv_heads} query heads each are too few for {num_ranks} ranks"
            )
        return f"its feed-forward block has {inner} columns for {num_ranks} ranks" if inner < num_ranks else None
    for size, what in (
        (heads, "attention heads"),
        (kv_heads if kv_heads >= num_ranks else num_ranks, "KV heads"),
        (inner, "columns of its feed-forward block"),
    ):
        if size % num_ranks:
            return f"its {size} {what} do not divide by {num_ranks} ranks"
    return None


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
