"""Which models make room for another one on a node. Pure.

A model with work in flight is never a victim, nor one of a higher residency class than the incoming model.
Among the rest, `lru` takes the least recently used first; `priority` empties the lowest residency class first and
uses recency only within it.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from cortex_core.catalogue import Catalogue, ModelProfile, may_displace

from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import NodeSnapshot

Strategy = Literal["lru", "priority"]

CPU = -1
"""The one "device" of a host without accelerators."""


class Room(msgspec.Struct, frozen=True):
    """How a model fits on a node.

    `victims` have to go first. `devices` are the best ones to load on (None: no accelerators, or nothing is
    known of them). `fits` is False where even all that may go would not make enough room; `fits_later` tells
    that it would, were nothing in flight. free_mb is what the best devices have free now, 0 = unknown.
    """

    fits: bool
    victims: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = None
    fits_later: bool = False
    free_mb: int = 0
    capacity_mb: int = 0


def plan_room(
    profile: ModelProfile, node: NodeSnapshot, catalogue: Catalogue, activity: Activity, strategy: Strategy
) -> Room:
    """Room for `profile` on `node`, with the fewest victims that the strategy's order allows.

    Without an estimate (`vram_mb`) everything fits: the neuron knows better and refuses by itself.
    """
    free = _free_mb(node, catalogue)
    capacity = _capacity_mb(node, profile)
    need = profile.vram_mb
    if need is None or not free:
        return Room(fits=True, devices=_pick(free, profile, node), free_mb=_best_sum(free, profile, node))
    free_now = _best_sum(free, profile, node)
    if free_now >= need:
        return Room(fits=True, devices=_pick(free, profile, node), free_mb=free_now, capacity_mb=capacity)

    order = eviction_order(node, profile.id, catalogue, activity, strategy)
    chosen: list[str] = []
    for model in order:
        chosen.append(model)
        if _best_sum(_freed(free, chosen, node, catalogue), profile, node) >= need:
            break
    else:
        resident = [model for model in node.models if may_displace(catalogue, profile.id, model)]
        later = _best_sum(_freed(free, resident, node, catalogue), profile, node)
        return Room(
            fits=False,
            devices=_pick(free, profile, node),
            fits_later=later >= need,
            free_mb=free_now,
            capacity_mb=capacity,
        )
    # The last one made it fit; earlier ones may turn out not to be needed. Spare the most recently used first.
    for model in reversed(chosen[:-1]):
        rest = [other for other in chosen if other != model]
        if _best_sum(_freed(free, rest, node, catalogue), profile, node) >= need:
            chosen = rest
    after = _freed(free, chosen, node, catalogue)
    return Room(
        fits=True,
        victims=tuple(chosen),
        devices=_pick(after, profile, node),
        free_mb=free_now,
        capacity_mb=capacity,
    )


def eviction_order(
    node: NodeSnapshot, incoming: str, catalogue: Catalogue, activity: Activity, strategy: Strategy
) -> list[str]:
    """All models of `node` that may go for `incoming`, the first to go first. Ties are broken by name."""
    candidates = [
        model
        for model in node.models
        if model != incoming
        and node.status(model) == "loaded"
        and may_displace(catalogue, incoming, model)
        and not activity.is_busy(node.name, model, node.loads.get(model))
    ]
    if strategy == "priority":
        return sorted(
            candidates,
            key=lambda model: (catalogue.residency(model), activity.last_used(node.name, model), model),
        )
    return sorted(candidates, key=lambda model: (activity.last_used(node.name, model), model))


def estimate_mb(model: str, node: NodeSnapshot, catalogue: Catalogue) -> int:
    """What a model occupies: the neuron's figure, else the catalogue's (G2), else 0 = unknown."""
    info = node.models.get(model)
    if info is not None and info.vram_used_mb:
        return info.vram_used_mb
    profile = catalogue.profile(model)
    return (profile.vram_mb or 0) if profile is not None else 0


def never_fits(profile: ModelProfile, node: NodeSnapshot) -> bool:
    """Whether the model is larger than the devices it would get, empty."""
    capacity = _capacity_mb(node, profile)
    return profile.vram_mb is not None and 0 < capacity < profile.vram_mb


def _free_mb(node: NodeSnapshot, catalogue: Catalogue) -> dict[int, int]:
    """Free memory per device as polled, less what loads under way may still take. Empty = unknown."""
    if node.devices:
        free = {device.index: device.vram_free_mb for device in node.devices}
    elif node.memory_free_mb > 0 and node.discovery is not None and not node.discovery.devices:
        free = {CPU: node.memory_free_mb}
    else:
        return {}
    arriving = sorted(
        model for model in node.models.keys() | node.operations.keys() if node.status(model) in ("fetching", "loading")
    )
    for model in arriving:
        for index, share in _shares(model, free, node, catalogue):
            free[index] = max(0, free[index] - share)
    return free


def _shares(model: str, free: dict[int, int], node: NodeSnapshot, catalogue: Catalogue) -> list[tuple[int, int]]:
    """(device, MB) of what a model takes: evenly over its devices, or on the first where it does not say."""
    info = node.models.get(model)
    devices = [index for index in (info.devices if info is not None else ()) if index in free] or sorted(free)[:1]
    share = estimate_mb(model, node, catalogue) // len(devices)
    return [(index, share) for index in devices]


def _freed(free: dict[int, int], models: list[str], node: NodeSnapshot, catalogue: Catalogue) -> dict[int, int]:
    after = dict(free)
    for model in models:
        for index, share in _shares(model, after, node, catalogue):
            after[index] += share
    return after


def _eligible(profile: ModelProfile, node: NodeSnapshot, indexes: list[int]) -> list[int]:
    floor = profile.min_device_vram_mb
    if floor is None or node.discovery is None:
        return indexes
    total = {device.index: device.vram_total_mb for device in node.discovery.devices}
    large = [index for index in indexes if total.get(index, 0) >= floor]
    return large if len(large) >= profile.min_devices else indexes


def _ranked(free: dict[int, int], profile: ModelProfile, node: NodeSnapshot) -> list[int]:
    eligible = _eligible(profile, node, sorted(free))
    return sorted(eligible, key=lambda index: (-free[index], index))[: profile.min_devices]


def _best_sum(free: dict[int, int], profile: ModelProfile, node: NodeSnapshot) -> int:
    return sum(free[index] for index in _ranked(free, profile, node))


def _pick(free: dict[int, int], profile: ModelProfile, node: NodeSnapshot) -> tuple[int, ...] | None:
    if not free or CPU in free:
        return None
    return tuple(sorted(_ranked(free, profile, node)))


def _capacity_mb(node: NodeSnapshot, profile: ModelProfile) -> int:
    if node.discovery is None:
        return 0
    if not node.discovery.devices:
        return node.discovery.memory_total_mb
    total = {device.index: device.vram_total_mb for device in node.discovery.devices}
    return _best_sum(total, profile, node)
