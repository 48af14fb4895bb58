"""Settings that placement follows, as one value."""

from __future__ import annotations

from typing import Literal

import msgspec
from cortex_core.gateway_config import EvictionSection, RoutingSection

Strategy = Literal["lru", "priority"]


class Policy(msgspec.Struct, frozen=True):
    """The settings that decisions follow, as `cortex.toml` has them."""

    strategy: Strategy = "lru"
    beta: float = 1.0
    min_residence_s: float | None = None
    patience_s: float = 30.0
    idle_unload_s: float = 0.0
    defrag_after_cycles: int = 0


def policy_of(routing: RoutingSection, eviction: EvictionSection) -> Policy:
    return Policy(
        strategy=eviction.strategy,
        beta=routing.beta,
        min_residence_s=eviction.min_residence_s,
        patience_s=eviction.patience_s,
        idle_unload_s=eviction.idle_unload_s,
        defrag_after_cycles=eviction.defrag_after_cycles,
    )
