"""The models of the whole fleet as one list: catalogue, neurons, what is being loaded, aliases. Pure.

Every model that can be asked for is listed, loaded or not, and a dead neuron hides none of the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from cortex_core.catalogue import Catalogue, ModelProfile, is_feasible, is_wildcard
from cortex_core.dialects.models import ModelEntry
from cortex_core.fleet import ContextLimit, ModelInfo, ModelLocation

from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot

DEFAULT_MODALITIES = ("text",)


def merge_models(snapshot: FleetSnapshot, catalogue: Catalogue, created: int) -> list[ModelEntry]:
    """All entries, sorted by id. `created` (Unix seconds) stands in where a neuron gives no time of its own."""
    entries = {model: _entry(model, snapshot, catalogue, created) for model in _ids(snapshot, catalogue)}
    for alias, target in catalogue.aliases.items():
        if alias not in entries and target in entries and not is_wildcard(alias):
            entries[alias] = msgspec.structs.replace(entries[target], id=alias, display_name=alias)
    return [entries[model] for model in sorted(entries)]


def dead_aliases(snapshot: FleetSnapshot, catalogue: Catalogue) -> list[str]:
    """Aliases whose target nothing has or knows."""
    known = _ids(snapshot, catalogue)
    return [alias for alias, target in catalogue.aliases.items() if target not in known]


def _ids(snapshot: FleetSnapshot, catalogue: Catalogue) -> set[str]:
    ids = {profile.id for profile in catalogue.models}
    for node in snapshot.nodes.values():
        ids.update(node.models, node.operations, node.unloaded)
        if node.activation.state != "ready":
            ids.update(node.activation.pending)
            if node.activation.in_progress is not None:
                ids.add(node.activation.in_progress)
    return ids


def _entry(model: str, snapshot: FleetSnapshot, catalogue: Catalogue, created: int) -> ModelEntry:
    profile = catalogue.profile(model)
    locations: list[ModelLocation] = []
    infos: list[ModelInfo] = []
    loaded = False
    for node in snapshot.nodes.values():
        status = node.status(model)
        info = node.models.get(model) or node.unloaded.get(model)
        if info is not None:
            infos.append(info)
        if status is None or not node.is_routable:
            continue
        # An unknown status of a newer neuron reads as loaded for routing, and is shown as it came.
        shown = info.status if info is not None and status == "loaded" else status
        loaded = loaded or status == "loaded"
        locations.append(
            ModelLocation(
                node=node.name,
                status=shown,
                vram_estimate_mb=_estimate(info, profile),
                progress=info.progress if info is not None else None,
                error=info.error if info is not None else None,
            )
        )
    return ModelEntry(
        id=model,
        created=min((info.created for info in infos if info.created is not None), default=created),
        loaded=loaded,
        modalities=_modalities(infos, profile),
        limit=_smallest_limit(infos, profile),
        cost=profile.cost if profile is not None else None,
        tool_call=any(info.tool_call for info in infos),
        reasoning=any(info.reasoning for info in infos),
        feasible_on=tuple(_feasible_on(profile, snapshot.nodes.values())) if profile is not None else (),
        locations=tuple(locations),
    )


def _feasible_on(profile: ModelProfile, nodes: Iterable[NodeSnapshot]) -> list[str]:
    return [
        node.name
        for node in nodes
        if node.is_routable
        and node.can_load
        and node.discovery is not None
        and is_feasible(profile, node.name, node.discovery)
    ]


def _estimate(info: ModelInfo | None, profile: ModelProfile | None) -> int | None:
    if info is not None and info.vram_used_mb:
        return info.vram_used_mb
    return profile.vram_mb if profile is not None else None


def _modalities(infos: list[ModelInfo], profile: ModelProfile | None) -> tuple[str, ...]:
    """What neurons discovered wins over what the catalogue says; the order is kept."""
    found = [capability for info in infos for capability in info.capabilities]
    if not found and profile is not None:
        found = list(profile.capabilities)
    return tuple(dict.fromkeys(found)) or DEFAULT_MODALITIES


def _smallest_limit(infos: list[ModelInfo], profile: ModelProfile | None) -> ContextLimit | None:
    limits = [info.limit for info in infos if info.limit is not None]
    if limits:
        return min(limits, key=lambda limit: limit.context)
    return profile.limit if profile is not None else None
