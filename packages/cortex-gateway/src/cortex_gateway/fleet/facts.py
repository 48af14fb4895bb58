"""Facts of a model that limits and budgets need: its window and its price. Pure."""

from __future__ import annotations

from cortex_core.catalogue import Catalogue
from cortex_core.fleet import ContextLimit, ModelCost

from cortex_gateway.fleet.snapshot import FleetSnapshot


def widest_limit(model: str, snapshot: FleetSnapshot, catalogue: Catalogue) -> ContextLimit | None:
    """The largest window a request could meet, as any node may get it; None if one of them does not say."""
    infos = [info for node in snapshot.nodes.values() if (info := node.models.get(model)) is not None]
    if not infos:
        profile = catalogue.profile(model)
        return profile.limit if profile is not None else None
    limits = [info.limit for info in infos if info.limit is not None]
    return max(limits, key=lambda limit: limit.context) if len(limits) == len(infos) else None


def price(model: str, catalogue: Catalogue) -> ModelCost | None:
    profile = catalogue.profile(model)
    return profile.cost if profile is not None else None
