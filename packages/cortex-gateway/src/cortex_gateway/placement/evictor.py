"""Which models make room for another one on a node. Pure.

A model with work in flight is never a victim, nor one that a request waits for, one that an operator pinned, one
that has only just been loaded, or one of a higher residency class than the incoming model. Among the rest, `lru`
takes the least recently used first; `priority` empties the lowest residency class first and uses recency only within
it.

A model whose requests have waited longer than the configured patience lays *claim* to room: then also models that
are in use or newly loaded are planned for. They get no new requests (see the router), and go when their last one has
been answered; their turn comes again like everyone's.
"""

from __future__ import annotations

import msgspec
from cortex_core.catalogue import ModelProfile, may_displace

from cortex_gateway.fleet.snapshot import NodeSnapshot
from cortex_gateway.placement.situation import Situation

CPU = -1
"""The one "device" of a host without accelerators."""


class Room(msgspec.Struct, frozen=True):
    """How a model fits on a node.

    `victims` have to go first. `devices` are the best ones to load on (None: no accelerators, or nothing is
    known of them). `fits` is False where even all that may go would not make enough room; `fits_later` tells
    that it would, were nothing in flight, and `settles_at` when a model that is in the way only because it is new
    may go. free_mb is what the best devices have free now, 0 = unknown.
    """

    fits: bool
    victims: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = None
    fits_later: bool = False
    settles_at: float | None = None
    free_mb: int = 0


def plan_room(profile: ModelProfile, node: NodeSnapshot, situation: Situation, *, claim: bool = False) -> Room:
    """Room for `profile` on `node`, with the fewest victims that the strategy's order allows.

    claim: plan also with models that are in use or newly loaded. Without an estimate (`vram_mb`) everything fits: the
    neuron knows better and refuses by itself.
    """
    catalogue = situation.catalogue
    free = _free_mb(node, situation)
    need = profile.vram_mb
    free_now = _best_sum(free, profile, node)
    if need is None or not free or free_now >= need:
        return Room(fits=True, devices=_pick(free, profile, node), free_mb=free_now)

    def fits_without(models: list[str]) -> bool:
        return _best_sum(_freed(free, models, node, situation), profile, node) >= need

    chosen: list[str] = []
    for model in eviction_order(node, profile.id, situation, claim=claim):
        chosen.append(model)
        if fits_without(chosen):
            break
    else:
        resident = [
            model
            for model in node.models.keys() | node.operations.keys()
            if may_displace(catalogue, profile.id, model) and not node.is_pinned(model)
        ]
        settling = [situation.stays_until(node, model) for model in resident]
        return Room(
            fits=False,
            devices=_pick(free, profile, node),
            fits_later=fits_without(sorted(resident)),
            settles_at=min((until for until in settling if until > situation.now), default=None),
            free_mb=free_now,
        )
    # The last one made it fit; earlier ones may turn out not to be needed. Spare the most recently used first.
    for model in reversed(chosen[:-1]):
        rest = [other for other in chosen if other != model]
        if fits_without(rest):
            chosen = rest
    after = _freed(free, chosen, node, situation)
    return Room(fits=True, victims=tuple(chosen), devices=_pick(after, profile, node), free_mb=free_now)


def eviction_order(node: NodeSnapshot, incoming: str, situation: Situation, *, claim: bool = False) -> list[str]:
    """All models of `node` that may go for `incoming`, the first to go first. Ties are broken by name.

    With a claim, models that are in use, waited for or newly loaded come too, after all others; but not one whose own
    requests have waited longer.
    """
    catalogue = situation.catalogue
    since = situation.waiting.since(incoming)
    candidates = []
    for model in node.models:
        if model == incoming or node.status(model) != "loaded" or node.is_pinned(model):
            continue
        if not may_displace(catalogue, incoming, model):
            continue
        is_spared = is_in_use(node, model, situation) or situation.stays_until(node, model) > situation.now
        if is_spared and (not claim or _waits_longer(model, incoming, since, situation)):
            continue
        residency = catalogue.residency(model) if situation.policy.strategy == "priority" else 0
        candidates.append((is_spared, residency, situation.last_used(node, model), model))
    return [model for *_, model in sorted(candidates)]


def may_come_free(node: NodeSnapshot, incoming: str, situation: Situation) -> bool:
    """Whether anything is on the node, or on its way there, that may make room for `incoming` sooner or later."""
    return any(
        model != incoming
        and not node.is_pinned(model)
        and node.status(model) not in (None, "failed", "unloaded")
        and may_displace(situation.catalogue, incoming, model)
        for model in node.models.keys() | node.operations.keys()
    )


def _waits_longer(model: str, incoming: str, since: float | None, situation: Situation) -> bool:
    own = situation.waiting.since(model)
    return own is not None and (since is None or (own, model) < (since, incoming))


def is_in_use(node: NodeSnapshot, model: str, situation: Situation) -> bool:
    """Whether a request is on the model, or about to be sent to it."""
    return situation.load_of(node, model) > 0 or model in situation.waiting


def estimate_mb(model: str, node: NodeSnapshot, situation: Situation) -> int:
    """What a model occupies: the neuron's figure, else the catalogue's (G2), else 0 = unknown."""
    info = node.models.get(model)
    if info is not None and info.vram_used_mb:
        return info.vram_used_mb
    profile = situation.catalogue.profile(model)
    return (profile.vram_mb or 0) if profile is not None else 0


def never_fits(profile: ModelProfile, node: NodeSnapshot) -> bool:
    """Whether the model is larger than the devices it would get, empty."""
    capacity = capacity_mb(node, profile)
    return profile.vram_mb is not None and 0 < capacity < profile.vram_mb


def capacity_mb(node: NodeSnapshot, profile: ModelProfile) -> int:
    """What the devices the model would get hold when they are empty; 0 = unknown."""
    if node.discovery is None:
        return 0
    if not node.discovery.devices:
        return node.discovery.memory_total_mb
    total = {device.index: device.vram_total_mb for device in node.discovery.devices}
    return _best_sum(total, profile, node)


def _free_mb(node: NodeSnapshot, situation: Situation) -> dict[int, int]:
    """Free memory per device as polled, less what loads since then and those under way take. Empty = unknown."""
    if node.devices:
        free = {device.index: device.vram_free_mb for device in node.devices}
    elif node.memory_free_mb > 0 and node.discovery is not None and not node.discovery.devices:
        free = {CPU: node.memory_free_mb}
    else:
        return {}
    arriving = sorted(
        model
        for model in node.models.keys() | node.operations.keys()
        if node.status(model) in ("fetching", "loading") or _came_since_the_poll(node, model)
    )
    for model in arriving:
        for index, share in _shares(model, free, node, situation):
            free[index] = max(0, free[index] - share)
    return free


def _came_since_the_poll(node: NodeSnapshot, model: str) -> bool:
    residence = node.residences.get(model)
    return residence is not None and residence.since is not None and residence.since > node.polled_at


def _shares(model: str, free: dict[int, int], node: NodeSnapshot, situation: Situation) -> list[tuple[int, int]]:
    """(device, MB) of what a model takes: evenly over its devices, or on the first where it does not say."""
    info = node.models.get(model)
    devices = [index for index in (info.devices if info is not None else ()) if index in free] or sorted(free)[:1]
    share = estimate_mb(model, node, situation) // len(devices)
    return [(index, share) for index in devices]


def _freed(free: dict[int, int], models: list[str], node: NodeSnapshot, situation: Situation) -> dict[int, int]:
    after = dict(free)
    for model in models:
        for index, share in _shares(model, after, node, situation):
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
