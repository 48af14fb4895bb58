"""Routing of a request for a model: a state in, a decision out. Pure, and deterministic in ties.

The order of preference (its steps are numbered in docs/explanation/placement.md): a node that has the model loaded and
can serve it; else wait for one that is loading or recovering it (a second copy is never started); else a cold load on
the best feasible node, making room if that is needed; else a refusal that says whether trying again makes sense.

Models that displace each other take turns. Whose oldest request has waited longest comes first; the requests of one
model go together; a model that was just loaded stays for a while; and after the configured patience a model that is
in use gets no new requests until the waiting one has had its turn. So swaps are few and nobody starves.
"""

from __future__ import annotations

import math
from collections.abc import Container

import msgspec
from cortex_core.catalogue import ModelProfile, is_feasible, load_spec
from cortex_core.fleet import ModelInfo, ModelSpec, needed_features

from cortex_gateway.fleet.neuron import UNSUPPORTED_LOAD_FIELD, too_old
from cortex_gateway.fleet.snapshot import FleetSnapshot, LoadFailure, NodeSnapshot
from cortex_gateway.placement.affinity import UNKNOWN, Shares
from cortex_gateway.placement.decision import Decision, Forward, Hold, HoldReason, Load, Refuse
from cortex_gateway.placement.evictor import (
    Room,
    capacity_mb,
    has_come_free,
    may_come_free,
    never_fits,
    plan_room,
)
from cortex_gateway.placement.explanation import in_figures, in_words, numbers_of
from cortex_gateway.placement.replicas import Replica, choose
from cortex_gateway.placement.state import PlacementState, Standing

NOWHERE: frozenset[str] = frozenset()

RETRY_NO_NODE_S = 5
RETRY_UNHEALTHY_S = 3
RETRY_FAILED_S = 10
MIN_PAUSE_S = 2.0
"""After a load that failed, also where what it lacked has come free: others may be about to take it."""
FREE_STEP_MB = 1024
"""Free memory is compared in steps of this: two gateways that polled at different moments choose the same node."""


def decide(model: str, state: PlacementState, shares: Shares = UNKNOWN, avoid: Container[str] = NOWHERE) -> Decision:
    """Decide for a concrete model id (aliases are resolved before). shares: which nodes know the request's prompt.
    avoid: nodes that have failed the request, to be asked again only where no other can be."""
    snapshot, breakers, now = state.snapshot, state.breakers.by_place, state.now
    standing = state.standings.get(model) or standing_of(model, state)
    serving: list[NodeSnapshot] = []
    yielding: Hold | None = None
    broken: float | None = None
    for node in standing.serving:
        breaker = breakers.get((node.name, model))
        if breaker is not None and not breaker.admits(now):
            broken = max(breaker.until, now) if broken is None else min(max(breaker.until, now), broken)
        elif state.waiting.queues and has_to_yield(model, node, state):
            yielding = yielding or Hold(node=node.name, reason="yielding")
        else:
            serving.append(node)
    if len(serving) > 1:
        serving = _preferred(model, serving, state, avoid)
    if len(serving) == 1:
        return Forward(node=serving[0].name, reason="loaded")
    if serving:
        best, reason = choose([_replica(model, node, state) for node in serving], shares, state.policy.beta)
        return Forward(node=best.node, reason=reason)
    if yielding is not None:
        return yielding
    if standing.coming is not None:
        return Hold(node=standing.coming[0], reason=standing.coming[1])
    profile = state.catalogue.profile(model)
    routable = [node for node in snapshot.nodes.values() if node.is_routable]
    if broken is not None:
        # Only here a second copy is started, where the first one keeps failing and another node has room.
        elsewhere = None if profile is None else _cold_load(profile, routable, state)
        if isinstance(elsewhere, Load):
            return elsewhere
        return Refuse(
            kind="overloaded",
            message=f"The neuron that serves `{model}` keeps failing; it gets a pause.",
            code="circuit_open",
            retry_after=max(1, math.ceil(broken - now)),
        )
    for node in snapshot.nodes.values():
        # It may have the model: a request of the first second must not end in a 404 or in a second copy.
        if node.health == "unknown":
            return Hold(node=node.name, reason="unpolled")
    if not routable:
        return Refuse(
            kind="overloaded",
            message="No neuron of this fleet is reachable at the moment.",
            code="service_unavailable",
            retry_after=RETRY_NO_NODE_S,
        )
    if profile is None:
        return _outside_catalogue(model, state)
    return _cold_load(profile, routable, state)


def decide_by_hand(model: str, state: PlacementState, node: NodeSnapshot | None = None) -> Decision:
    """What comes of a load that an operator asks for: on `node` if one is named, else where it is best. No catalogue
    entry is needed."""
    if node is None:
        decision = decide(model, state)
        if not isinstance(decision, Refuse) or decision.code != "model_not_found":
            return decision
        node = _roomiest(state)
        if node is None:
            return decision
    if node.status(model) == "loaded":
        return Forward(node=node.name)
    profile = state.catalogue.profile(model)
    if profile is not None and node.discovery is not None:
        return _load(profile, node, plan_room(profile, node, state))
    known = node.unloaded.get(model)
    return Load(node=node.name, spec=ModelSpec(model_id=model) if known is None else spec_of(known))


def _roomiest(state: PlacementState) -> NodeSnapshot | None:
    nodes = (node for node in state.snapshot.nodes.values() if node.is_routable and node.can_load)
    return min((node for node in nodes if not node.is_draining), key=_free_first, default=None)


def _free_first(node: NodeSnapshot) -> tuple[int, str]:
    return -max((device.vram_free_mb for device in node.devices), default=node.memory_free_mb), node.name


def _preferred(
    model: str, serving: list[NodeSnapshot], state: PlacementState, avoid: Container[str]
) -> list[NodeSnapshot]:
    """Without those that have failed the request or asked for a pause, where others are left."""
    rests = state.breakers.rests
    serving = [node for node in serving if node.name not in avoid] or serving
    return [node for node in serving if rests.get((node.name, model), 0.0) <= state.now] or serving


def has_other(model: str, state: PlacementState, avoid: Container[str]) -> bool:
    """Whether a node that is not to be avoided, and has not asked for a pause, serves the model now."""
    breakers, rests = state.breakers, state.breakers.rests
    return any(
        node.name not in avoid
        and rests.get((node.name, model), 0.0) <= state.now
        and breakers.get(node.name, model).admits(state.now)
        for node in (state.standings.get(model) or standing_of(model, state)).serving
    )


def standing_of(model: str, state: PlacementState) -> Standing:
    """Where the model stands in the state's snapshot, found out once for all requests."""
    serving: list[NodeSnapshot] = []
    coming: tuple[str, HoldReason] | None = None
    for node in state.snapshot.nodes.values():
        status = node.status(model) if node.is_routable else None
        if status in ("loaded", "reloading") and not node.is_draining:
            if node.is_servable(model):
                serving.append(node)
        elif status in ("recovering", "poisoned"):
            coming = coming or (node.name, "recovering")
        elif status in ("loading", "fetching"):
            coming = coming or (node.name, "loading")
    standing = state.standings[model] = Standing(tuple(serving), coming)
    return standing


def _replica(model: str, node: NodeSnapshot, state: PlacementState) -> Replica:
    load = node.loads.get(model)
    failures = state.breakers.get(node.name, model).failures
    return Replica(
        node=node.name,
        load=state.activity.load_of(node.name, model, load) + failures,
        last_used=state.activity.last_used(node.name, model),
        capacity=load.max_in_flight if load is not None else 0,
        is_suspect=node.health == "suspect",
    )


# ---------------------------------------------------------------------------------------------- taking turns


def has_to_yield(model: str, node: NodeSnapshot, state: PlacementState) -> bool:
    """Whether requests for a loaded model are held so that one whose requests lost patience gets its turn here.

    Not those that were waiting when its load ended: a turn is for all of them, or each would cost a load of its own.
    """
    since, residence = state.waiting.since(model), node.residences.get(model)
    if since is not None and residence is not None and residence.since is not None and since <= residence.since:
        return False
    for waiter in state.waiting.in_order():
        if state.now < waiter.since + state.policy.patience_s:
            return False  # in order: those behind have waited less
        if waiter.model == model:
            return False  # its own requests have waited longer than those behind: they are answered first
        if not _is_to_be_placed(waiter.model, state):
            continue
        target = _best(waiter.model, state)
        if target is None or target[0].name != node.name or target[1].fits:
            continue
        profile = state.catalogue.profile(waiter.model)
        assert profile is not None
        if model in plan_room(profile, node, state, claim=True).victims:
            return True
    return False


def _is_ahead_of(model: str, node: NodeSnapshot, state: PlacementState) -> bool:
    """Whether a model whose requests have waited longer wants to make room on the same node."""
    since = state.waiting.since(model)
    for waiter in state.waiting.in_order():
        if waiter.model == model or (since is not None and (waiter.since, waiter.model) > (since, model)):
            break
        if not _is_to_be_placed(waiter.model, state):
            continue
        target = _best(waiter.model, state)
        if target is not None and target[0].name == node.name and target[1].is_awaited:
            return True
    return False


def _is_to_be_placed(model: str, state: PlacementState) -> bool:
    """Whether it is of the catalogue, and nowhere loaded or on its way."""
    return state.catalogue.profile(model) is not None and all(
        node.status(model) in (None, "unloaded", "failed") for node in state.snapshot.nodes.values() if node.is_routable
    )


def _best(model: str, state: PlacementState) -> tuple[NodeSnapshot, Room] | None:
    """Where a model of the catalogue would be loaded if it were alone."""
    profile = state.catalogue.profile(model)
    assert profile is not None
    routable = [node for node in state.snapshot.nodes.values() if node.is_routable]
    candidates = _candidates(profile, routable, state).rooms
    return min(candidates, key=lambda found: _rank(profile, found[0], found[1], state), default=None)


def _fits_now(room: Room) -> bool:
    return room.fits and not room.victims


# ---------------------------------------------------------------------------------------------- cold loads


class _Candidates(msgspec.Struct):
    """The nodes a profile could be loaded on, each with its room; and the first of those that are out of the race."""

    rooms: list[tuple[NodeSnapshot, Room]] = []
    unloading: NodeSnapshot | None = None
    unservable: NodeSnapshot | None = None
    too_small: NodeSnapshot | None = None
    too_old: NodeSnapshot | None = None
    failed: list[tuple[NodeSnapshot, LoadFailure]] = []


def _candidates(profile: ModelProfile, routable: list[NodeSnapshot], state: PlacementState) -> _Candidates:
    found = _Candidates()
    for node in routable:
        if node.is_draining or node.discovery is None or not node.can_load:
            continue
        if profile.pinned_on and node.name not in profile.pinned_on:
            continue
        if never_fits(profile, node):
            if found.too_small is None or capacity_mb(node, profile) > capacity_mb(found.too_small, profile):
                found.too_small = node
            continue
        if not is_feasible(profile, node.name, node.discovery):
            continue
        if not node.reads(load_spec(profile, node.discovery)):
            found.too_old = found.too_old or node
            continue
        status = node.status(profile.id)
        failure = failure_on(node, profile.id, state)
        if status == "unloading":
            found.unloading = found.unloading or node
        elif status in ("loaded", "reloading"):
            found.unservable = found.unservable or node
        elif failure is not None:
            found.failed.append((node, failure))
        else:
            found.rooms.append((node, plan_room(profile, node, state)))
    return found


def _cold_load(profile: ModelProfile, routable: list[NodeSnapshot], state: PlacementState) -> Decision:
    found = _candidates(profile, routable, state)
    if not found.rooms:
        if found.unloading is not None:
            return Hold(node=found.unloading.name, reason="unloading")
        if found.unservable is not None:
            return _unservable(profile.id, found.unservable)
        if found.failed:
            return _after_failures(profile.id, found.failed, state)
        if found.too_old is not None and found.too_old.discovery is not None:
            return _too_old(profile.id, found.too_old, load_spec(profile, found.too_old.discovery))
        return _nowhere(profile, state.snapshot, found.too_small)
    ranked = sorted(found.rooms, key=lambda candidate: _rank(profile, candidate[0], candidate[1], state))
    if state.waiting:
        free_of_others = [
            (node, room) for node, room in ranked if _fits_now(room) or not _is_ahead_of(profile.id, node, state)
        ]
        if not free_of_others:
            return Hold(node=ranked[0][0].name, reason="queued")
        ranked = free_of_others
    node, room = ranked[0]
    if not room.fits and room.fits_later:
        return _wait_for_room(profile, node, room, state)
    if not room.fits and 0 < node.polled_at <= node.operated_at:
        return Hold(node=node.name, reason="busy")  # the next poll has other figures
    # Nothing of ours would make room. The neuron says so: the figures here are estimates, its preflight is not.
    return _load(profile, node, room)


def _too_old(model: str, node: NodeSnapshot, spec: ModelSpec) -> Refuse:
    return Refuse(
        kind="overloaded",
        message=f"`{model}`: {too_old(node.name, needed_features(spec).difference(node.features or ()))}",
        code=UNSUPPORTED_LOAD_FIELD,
        retry_after=RETRY_FAILED_S,
    )


def _wait_for_room(profile: ModelProfile, node: NodeSnapshot, room: Room, state: PlacementState) -> Decision:
    """Room comes when requests end, when a new model has stayed long enough, or by claim when patience is over."""
    since = state.waiting.since(profile.id)
    claims_at = (state.now if since is None else since) + state.policy.patience_s
    if since is not None and state.now >= claims_at:
        claimed = plan_room(profile, node, state, claim=True)
        # What other gateways have in flight, the neuron knows: it lets it end before it unloads.
        if claimed.fits and not any(state.activity.in_flight(node.name, victim) for victim in claimed.victims):
            return _load(profile, node, claimed)
        return Hold(node=node.name, reason="busy")
    if room.settles_at is None:
        return Hold(node=node.name, reason="busy", until=claims_at)
    return Hold(node=node.name, reason="settling", until=min(room.settles_at, claims_at))


def _load(profile: ModelProfile, node: NodeSnapshot, room: Room) -> Load:
    assert node.discovery is not None
    spec = load_spec(profile, node.discovery)
    if room.devices is not None and len(room.devices) == profile.min_devices:
        spec = msgspec.structs.replace(spec, devices=room.devices)
    return Load(node=node.name, spec=spec, victims=room.victims)


def _rank(
    profile: ModelProfile, node: NodeSnapshot, room: Room, state: PlacementState
) -> tuple[bool, bool, bool, bool, bool, int, int, str]:
    """Ascending: pinned there, fits as it is, fits after evictions, fits once idle, missed no poll, most free, least
    busy, name."""
    return (
        node.name not in profile.pinned_on,
        not _fits_now(room),
        not room.fits,
        not room.fits_later,
        node.health == "suspect",
        -(room.free_mb // FREE_STEP_MB),
        sum(state.load_of(node, model) for model in node.models if node.status(model) not in ("failed", "unloaded")),
        node.name,
    )


def failure_on(node: NodeSnapshot, model: str, state: PlacementState) -> LoadFailure | None:
    """Why the model is not to be loaded there now; None once its pause is over, or what it lacked has come free."""
    failure = None if state.by_hand else node.load_failures.get(model)
    if failure is None or failure.until <= state.now:
        return None
    if state.now >= failure.at + MIN_PAUSE_S and has_come_free(node, model, failure, state):
        return None
    return failure


def _after_failures(model: str, failed: list[tuple[NodeSnapshot, LoadFailure]], state: PlacementState) -> Decision:
    """Every node that could load it has just failed to. Where only memory was lacking, and models of ours may still
    make room, it is tried again; else whoever asks is told at once."""
    failed = sorted(failed, key=lambda found: (found[1].until, found[0].name))
    for node, failure in failed:
        if failure.lacks_memory and may_come_free(node, model, failure, state):
            return Hold(node=node.name, reason="busy", until=failure.until)
    node, failure = failed[0]
    memory = numbers_of(model, node, failure, state)
    return Refuse(
        kind="overloaded",
        message=failure.message + in_words(node.name, memory),
        code=failure.code,
        retry_after=max(1, math.ceil(failure.until - state.now)),
        extras={"node": node.name, **in_figures(memory)},
    )


def _outside_catalogue(model: str, state: PlacementState) -> Decision:
    """A model only neurons know of: it may be failed, unservable, unloading, unloaded, or on a node that is away."""
    nodes = state.snapshot.nodes.values()
    known = [node for node in nodes if node.status(model) is not None or model in node.unloaded]
    if not known:
        return unknown_model(model)
    reachable = [node for node in known if node.is_routable]
    if not reachable:
        return _away(model)
    by_status = {node.status(model): node for node in reversed(reachable)}
    if "unloading" in by_status:
        return Hold(node=by_status["unloading"].name, reason="unloading")
    for node in reachable:
        if node.status(model) in (None, "unloaded"):
            failure = failure_on(node, model, state)
            if failure is not None:
                return _after_failures(model, [(node, failure)], state)
            info = node.models.get(model) or node.unloaded[model]
            return Load(node=node.name, spec=spec_of(info))
    if "failed" in by_status:
        node = by_status["failed"]
        failed = node.models.get(model)
        cause = failed.error if failed is not None and failed.error else "no cause given"
        return Refuse(
            kind="overloaded",
            message=f"The model `{model}` failed to load on {node.name}: {cause}",
            code="model_load_failed",
            retry_after=RETRY_FAILED_S,
        )
    return _unservable(model, reachable[0])


def spec_of(info: ModelInfo) -> ModelSpec:
    """Load it as it was (G4). An older neuron does not say how: then a model that needs a quantisation belongs into
    the catalogue."""
    if info.spec is not None:
        return info.spec
    num_devices = len(info.devices)
    return ModelSpec(
        model_id=info.id,
        harness=info.harness,
        tensor_parallel=num_devices if num_devices > 1 else None,
        devices=info.devices or None,
    )


def unknown_model(model: str) -> Refuse:
    return Refuse(
        kind="not_found",
        message=f"The model `{model}` does not exist or is not available here.",
        code="model_not_found",
    )


def _unservable(model: str, node: NodeSnapshot) -> Refuse:
    info = node.models.get(model)
    servable = info.servable if info is not None else None
    reason = servable.reason if servable is not None and servable.reason else "the node is draining"
    return Refuse(
        kind="overloaded",
        message=f"The model `{model}` is loaded on {node.name} but cannot be served: {reason}",
        code="model_unservable",
        retry_after=RETRY_NO_NODE_S,
    )


def _away(model: str) -> Refuse:
    return Refuse(
        kind="overloaded",
        message=f"The node that serves `{model}` is not reachable at the moment.",
        code="service_unavailable",
        retry_after=RETRY_UNHEALTHY_S,
    )


def _nowhere(profile: ModelProfile, snapshot: FleetSnapshot, too_small: NodeSnapshot | None) -> Decision:
    for node in snapshot.nodes.values():
        admitted = not profile.pinned_on or node.name in profile.pinned_on
        if not node.can_load:
            if node.status(profile.id) is not None:
                return _away(profile.id)
        elif node.discovery is None:
            if admitted:
                return _away(profile.id)
        elif (not node.is_routable or node.is_draining) and is_feasible(profile, node.name, node.discovery):
            return _away(profile.id)
    if too_small is not None:
        largest_mb = capacity_mb(too_small, profile)
        return Refuse(
            kind="overloaded",
            message=(
                f"The model `{profile.id}` needs {profile.vram_mb} MB on {profile.min_devices} device(s); "
                f"the most that any node has there is {largest_mb} MB, on {too_small.name}."
            ),
            code="insufficient_vram",
            extras={"needed_mb": profile.vram_mb, "largest_mb": largest_mb, "node": too_small.name},
        )
    return Refuse(
        kind="not_found",
        message=f"The model `{profile.id}` is in the catalogue, but no node of this fleet can run it.",
        code="no_feasible_node",
    )
