"""Eviction: the models that make room for another one on a node. Pure.

A model with work in flight is never a victim, nor one that a request waits for, one that an operator pinned, one
that has only just been loaded, or one of a higher residency class than the incoming model. Among the rest, `lru`
takes the least recently used first; `priority` empties the lowest residency class first and uses recency only within
it.

What may come free later is no more than what those models hold that may go, in use or not, and those that are on their
way. A model that failed holds nothing, nor does the incoming one; what other programs hold is nobody's to free.

A model whose requests have waited longer than the configured patience lays *claim* to room: then also models that
are in use or newly loaded are planned for. They get no new requests (see the router), and go when their last one has
been answered; their turn comes again like everyone's.
"""

from __future__ import annotations

import msgspec
from cortex_core.catalogue import ModelProfile, may_displace

from cortex_gateway.fleet.snapshot import HOST, LoadFailure, NodeSnapshot
from cortex_gateway.placement.state import PlacementState

MOVING = ("fetching", "loading", "recovering", "poisoned", "unloading")
"""On their way somewhere: what they hold is about to change."""


MAX_CONTRADICTIONS = 3
"""How often a neuron's refusal is not believed because its polls say that there is room: there may be in a moment."""


class Room(msgspec.Struct, frozen=True):
    """How a model fits on a node.

    `victims` have to go first. `devices` are the best ones to load on (None: no accelerators, or nothing is
    known of them). `fits` is False where all that may go now would not make enough room; `fits_later` tells that
    what `may_yield` would, and `settles_at` when a model that is in the way only because it is new may go. free_mb is
    what the best devices have free now, 0 = unknown.
    """

    fits: bool
    victims: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = None
    fits_later: bool = False
    settles_at: float | None = None
    free_mb: int = 0

    @property
    def is_awaited(self) -> bool:
        """Whether it has to be made, and can be: by displacing models, now or when they may go."""
        return bool(self.victims) or self.fits_later


def plan_room(profile: ModelProfile, node: NodeSnapshot, state: PlacementState, *, claim: bool = False) -> Room:
    """Room for `profile` on `node`, with the fewest victims that the strategy's order allows.

    claim: plan also with models that are in use or newly loaded. Without an estimate (`vram_mb`) everything fits: the
    neuron knows better and refuses by itself.
    """
    free = free_by_device(node, state, incoming=profile.id)
    need = profile.vram_mb
    free_now = _best_sum(free, profile, node)
    if need is None or not free or free_now >= need:
        return Room(fits=True, devices=_pick(free, profile, node), free_mb=free_now)

    def fits_without(models: list[str]) -> bool:
        return _best_sum(_freed(free, models, node, state), profile, node) >= need

    chosen: list[str] = []
    for model in eviction_order(node, profile.id, state, claim=claim):
        chosen.append(model)
        if fits_without(chosen):
            break
    else:
        later = may_yield(node, profile.id, state)
        settling = [state.stays_until(node, model) for model in later if node.status(model) == "loaded"]
        return Room(
            fits=False,
            devices=_pick(free, profile, node),
            fits_later=fits_without(later),
            settles_at=min((until for until in settling if until > state.now), default=None),
            free_mb=free_now,
        )
    # The last one made it fit; earlier ones may turn out not to be needed. Spare the most recently used first.
    for model in reversed(chosen[:-1]):
        rest = [other for other in chosen if other != model]
        if fits_without(rest):
            chosen = rest
    after = _freed(free, chosen, node, state)
    return Room(fits=True, victims=tuple(chosen), devices=_pick(after, profile, node), free_mb=free_now)


def eviction_order(node: NodeSnapshot, incoming: str, state: PlacementState, *, claim: bool = False) -> list[str]:
    """All models of `node` that may go for `incoming`, the first to go first. Ties are broken by name.

    With a claim, models that are in use, waited for or newly loaded come too, after all others; but not one whose own
    requests have waited longer.
    """
    catalogue = state.catalogue
    since = state.waiting.since(incoming)
    candidates = []
    for model in node.models:
        if model == incoming or node.status(model) != "loaded" or node.is_pinned(model):
            continue
        if not may_displace(catalogue, incoming, model):
            continue
        is_spared = is_in_use(node, model, state) or state.stays_until(node, model) > state.now
        if is_spared and (not claim or _waits_longer(model, incoming, since, state)):
            continue
        residency = catalogue.residency(model) if state.policy.strategy == "priority" else 0
        candidates.append((is_spared, residency, state.last_used(node, model), model))
    return [model for *_, model in sorted(candidates)]


def may_yield(node: NodeSnapshot, incoming: str, state: PlacementState) -> list[str]:
    """Models of `node` whose memory may come free for `incoming` sooner or later: those that may be displaced, once
    they are loaded, idle and have been here for a while, and those that are being unloaded."""
    found = []
    for model in node.models.keys() | node.operations.keys():
        status = node.status(model)
        if model == incoming or status in (None, "failed", "unloaded"):
            continue
        if status == "unloading" or (not node.is_pinned(model) and may_displace(state.catalogue, incoming, model)):
            found.append(model)
    return sorted(found)


def may_come_free(node: NodeSnapshot, incoming: str, failure: LoadFailure, state: PlacementState) -> bool:
    """Whether the memory that a load lacked may come free without anybody's doing: then waiting makes sense."""
    shortage = failure.shortage
    if shortage is not None and shortage.is_passing:
        models = node.models.keys() | node.operations.keys()
        if any(model != incoming and node.status(model) in MOVING for model in models):
            return True
    if failure.count <= MAX_CONTRADICTIONS and _is_free_by_polls(node, incoming, failure, state):
        return True
    return _covers(may_yield(node, incoming, state), node, incoming, failure, state)


def _is_free_by_polls(node: NodeSnapshot, incoming: str, failure: LoadFailure, state: PlacementState) -> bool:
    """Whether there is room although the neuron said that there was none: what was in the way has gone meanwhile."""
    missing = _missing_mb(node, incoming, failure, state)
    return bool(missing) and all(amount <= 0 for amount in missing.values())


def has_come_free(node: NodeSnapshot, incoming: str, failure: LoadFailure, state: PlacementState) -> bool:
    """Whether as much has come free on the node as the load lacked when it failed, whoever freed it."""
    shortage, free = failure.shortage, free_by_device(node, state, incoming=incoming)
    if shortage is None or not shortage.required_mb:
        return False
    return all(
        index in free
        and free[index] - failure.free_mb.get(index, free[index]) >= required - shortage.available_mb[index]
        for index, required in shortage.required_mb.items()
    )


def next_victim(node: NodeSnapshot, incoming: str, failure: LoadFailure, state: PlacementState) -> str | None:
    """Whom to unload after a neuron refused `incoming` for lack of memory; None where that would not help."""
    order = eviction_order(node, incoming, state)
    if not _covers(order, node, incoming, failure, state):
        return None
    free = free_by_device(node, state, incoming=incoming)
    missing = _missing_mb(node, incoming, failure, state)
    if not free or not missing:
        return order[0]
    for model in order:
        shares = dict(_shares(model, free, node, state))
        if any(missing.get(index, 0) > 0 or not share for index, share in shares.items()):
            return model
    return order[0]


def _covers(models: list[str], node: NodeSnapshot, incoming: str, failure: LoadFailure, state: PlacementState) -> bool:
    """Whether the end of `models` would free what the load lacked. Where a size is not known it may: one has to try."""
    if not models:
        return False
    free = free_by_device(node, state, incoming=incoming)
    if not free or any(not estimate_mb(model, node, state) for model in models):
        return True
    missing = _missing_mb(node, incoming, failure, state)
    if missing:
        # What a model holds of its host beside accelerators is in no figure of ours.
        return all(
            amount <= sum(dict(_shares(model, free, node, state)).get(index, 0) for model in models)
            for index, amount in missing.items()
            if index in free
        )
    profile = state.catalogue.profile(incoming)
    if profile is None or profile.vram_mb is None:
        return True
    return _best_sum(_freed(free, models, node, state), profile, node) >= profile.vram_mb


def _missing_mb(node: NodeSnapshot, incoming: str, failure: LoadFailure, state: PlacementState) -> dict[int, int]:
    """What the load would lack now, by device. Empty where the neuron gave no numbers."""
    free = free_by_device(node, state, incoming=incoming)
    required = failure.shortage.required_mb if failure.shortage is not None else {}
    return {index: amount - free.get(index, 0) for index, amount in required.items()}


class Account(msgspec.Struct, frozen=True):
    """The memory of the devices that a model would get, MB: what it needs, what is free, what models hold that may be
    displaced, and those that may not (pinned, of a higher class); the rest is held by others."""

    needed_mb: int
    free_mb: int
    displaceable_mb: int
    kept_mb: int
    others_mb: int
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = f" ({', '.join(self.kept)})" if self.kept else ""
        return (
            f"{self.needed_mb} MB are needed, {self.free_mb} MB are free, {self.displaceable_mb} MB are held by models "
            f"that may be displaced, {self.kept_mb} MB by models that may not{kept}, {self.others_mb} MB by others"
        )


def account(model: str, node: NodeSnapshot, state: PlacementState, *, needed_mb: int = 0) -> Account | None:
    """None where nothing is known of the node's memory, or of the model's. needed_mb: by the neuron's own word."""
    profile = state.catalogue.profile(model) or ModelProfile(id=model)
    free = free_by_device(node, state, incoming=profile.id)
    needed = max(needed_mb, profile.vram_mb or 0)
    if not free or not needed:
        return None
    later = may_yield(node, profile.id, state)
    after = _freed(free, later, node, state)
    devices = _ranked(after, profile, node)
    kept = {
        other: sum(share for index, share in _shares(other, free, node, state) if index in devices)
        for other in sorted(node.models.keys() | node.operations.keys())
        if other not in later and other != model and node.status(other) not in (None, "failed", "unloaded")
    }
    kept = {other: share for other, share in kept.items() if share}
    free_now, total = sum(free[index] for index in devices), sum(_total_mb(node).get(index, 0) for index in devices)
    displaceable = sum(after[index] for index in devices) - free_now
    return Account(
        needed_mb=needed,
        free_mb=free_now,
        displaceable_mb=displaceable,
        kept_mb=sum(kept.values()),
        others_mb=max(0, total - free_now - displaceable - sum(kept.values())),
        kept=tuple(kept),
    )


def _waits_longer(model: str, incoming: str, since: float | None, state: PlacementState) -> bool:
    own = state.waiting.since(model)
    return own is not None and (since is None or (own, model) < (since, incoming))


def is_in_use(node: NodeSnapshot, model: str, state: PlacementState) -> bool:
    """Whether a request is on the model, or about to be sent to it."""
    return state.load_of(node, model) > 0 or model in state.waiting


def estimate_mb(model: str, node: NodeSnapshot, state: PlacementState) -> int:
    """What a model occupies: the neuron's figure, else the catalogue's (G2), else 0 = unknown."""
    info = node.models.get(model)
    if info is not None and info.vram_used_mb:
        return info.vram_used_mb
    profile = state.catalogue.profile(model)
    return (profile.vram_mb or 0) if profile is not None else 0


def never_fits(profile: ModelProfile, node: NodeSnapshot) -> bool:
    """Whether the model is larger than the devices it would get, empty."""
    capacity = capacity_mb(node, profile)
    return profile.vram_mb is not None and 0 < capacity < profile.vram_mb


def capacity_mb(node: NodeSnapshot, profile: ModelProfile) -> int:
    """What the devices the model would get hold when they are empty; 0 = unknown."""
    if node.discovery is None:
        return 0
    return _best_sum(_total_mb(node), profile, node)


def _total_mb(node: NodeSnapshot) -> dict[int, int]:
    """What each device holds when it is empty."""
    if node.discovery is None:
        return {}
    if not node.discovery.devices:
        return {HOST: node.discovery.memory_total_mb}
    return {device.index: device.vram_total_mb for device in node.discovery.devices}


def free_by_device(node: NodeSnapshot, state: PlacementState, *, incoming: str) -> dict[int, int]:
    """Free memory per device as polled, less what loads since then and those under way take, other than that of
    `incoming`. Empty = unknown."""
    if node.devices:
        free = {device.index: device.vram_free_mb for device in node.devices}
    elif node.memory_free_mb > 0 and node.discovery is not None and not node.discovery.devices:
        free = {HOST: node.memory_free_mb}
    else:
        return {}
    arriving = sorted(
        model
        for model in node.models.keys() | node.operations.keys()
        if model != incoming and (node.status(model) in ("fetching", "loading") or _came_since_the_poll(node, model))
    )
    for model in arriving:
        for index, share in _shares(model, free, node, state):
            free[index] = max(0, free[index] - share)
    return free


def _came_since_the_poll(node: NodeSnapshot, model: str) -> bool:
    if node.status(model) in ("failed", "unloaded"):
        return False
    residence = node.residences.get(model)
    return residence is not None and residence.since is not None and residence.since > node.polled_at


def _shares(model: str, free: dict[int, int], node: NodeSnapshot, state: PlacementState) -> list[tuple[int, int]]:
    """(device, MB) of what a model takes: evenly over its devices, or on the first where it does not say."""
    info = node.models.get(model)
    devices = [index for index in (info.devices if info is not None else ()) if index in free] or sorted(free)[:1]
    share = estimate_mb(model, node, state) // len(devices)
    return [(index, share) for index in devices]


def _freed(free: dict[int, int], models: list[str], node: NodeSnapshot, state: PlacementState) -> dict[int, int]:
    after, total = dict(free), _total_mb(node)
    for model in models:
        for index, share in _shares(model, after, node, state):
            # What a model held that is recovering may be free already: there is no more than the device has.
            after[index] = max(after[index], min(after[index] + share, total.get(index) or after[index] + share))
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
    if not free or HOST in free:
        return None
    return tuple(sorted(_ranked(free, profile, node)))
