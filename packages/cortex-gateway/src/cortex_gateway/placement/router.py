"""Where a request for a model goes: snapshot + activity + catalogue -> Decision. Pure, and deterministic in ties.

The order of preference: a node that has the model loaded and can serve it; else wait for one that is loading or
recovering it (a second copy is never started); else a cold load on the best feasible node, making room if that is
needed; else a refusal that says whether trying again makes sense.
"""

from __future__ import annotations

import msgspec
from cortex_core.catalogue import Catalogue, ModelProfile, is_feasible, load_spec
from cortex_core.fleet import ModelInfo, ModelSpec

from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex_gateway.placement.decision import Decision, Forward, Hold, Load, Refuse
from cortex_gateway.placement.evictor import Room, Strategy, never_fits, plan_room

RETRY_NO_NODE_S = 5
RETRY_UNHEALTHY_S = 3
RETRY_FAILED_S = 10


def decide(
    model: str, snapshot: FleetSnapshot, activity: Activity, catalogue: Catalogue, strategy: Strategy
) -> Decision:
    """Decide for a concrete model id (aliases are resolved before)."""
    best: NodeSnapshot | None = None
    best_load = 0
    hold: Hold | None = None
    routable = []
    for node in snapshot.nodes.values():
        if not node.is_routable:
            continue
        routable.append(node)
        status = node.status(model)
        if status is None:
            continue
        if status in ("loaded", "reloading") and not node.is_draining:
            if node.is_servable(model):
                load = activity.load_of(node.name, model, node.loads.get(model))
                if best is None or (load, node.name) < (best_load, best.name):
                    best, best_load = node, load
        elif status in ("recovering", "poisoned"):
            hold = hold or Hold(node=node.name, reason="recovering")
        elif status in ("loading", "fetching"):
            hold = hold or Hold(node=node.name, reason="loading")
    if best is not None:
        return Forward(node=best.name)
    if hold is not None:
        return hold
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
    profile = catalogue.profile(model)
    if profile is None:
        return _outside_catalogue(model, snapshot)
    return _cold_load(profile, routable, snapshot, activity, catalogue, strategy)


def _outside_catalogue(model: str, snapshot: FleetSnapshot) -> Decision:
    """A model only neurons know of: it may be failed, unservable, unloading, unloaded, or on a node that is away."""
    known = [node for node in snapshot.nodes.values() if node.status(model) is not None or model in node.unloaded]
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
            info = node.models.get(model) or node.unloaded[model]
            return Load(node=node.name, spec=_spec_of(info))
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


def _spec_of(info: ModelInfo) -> ModelSpec:
    """Load it as it was. The quantisation is not known: a model that needs one belongs into the catalogue (G4)."""
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


def _cold_load(
    profile: ModelProfile,
    routable: list[NodeSnapshot],
    snapshot: FleetSnapshot,
    activity: Activity,
    catalogue: Catalogue,
    strategy: Strategy,
) -> Decision:
    candidates: list[tuple[NodeSnapshot, Room]] = []
    unloading: NodeSnapshot | None = None
    unservable: NodeSnapshot | None = None
    too_small: NodeSnapshot | None = None
    for node in routable:
        if node.is_draining or node.discovery is None or not is_feasible(profile, node.name, node.discovery):
            continue
        status = node.status(profile.id)
        if status == "unloading":
            unloading = unloading or node
        elif status in ("loaded", "reloading"):
            unservable = unservable or node
        elif never_fits(profile, node):
            too_small = too_small or node
        else:
            candidates.append((node, plan_room(profile, node, catalogue, activity, strategy)))
    if not candidates:
        if unloading is not None:
            return Hold(node=unloading.name, reason="unloading")
        if unservable is not None:
            return _unservable(profile.id, unservable)
        return _nowhere(profile, snapshot, too_small)
    node, room = min(candidates, key=lambda candidate: _rank(profile, candidate[0], candidate[1], activity))
    if not room.fits and room.fits_later:
        return Hold(node=node.name, reason="busy")
    # What still does not fit is the neuron's to refuse: the figures here are estimates, its preflight is not.
    assert node.discovery is not None
    spec = load_spec(profile, node.discovery)
    if room.devices is not None and len(room.devices) == profile.min_devices:
        spec = msgspec.structs.replace(spec, devices=room.devices)
    return Load(node=node.name, spec=spec, victims=room.victims)


def _rank(
    profile: ModelProfile, node: NodeSnapshot, room: Room, activity: Activity
) -> tuple[bool, bool, bool, bool, int, int, str]:
    """Ascending: pinned there, fits as it is, fits after evictions, fits once idle, most free, least busy, name."""
    busy = sum(activity.load_of(node.name, model, node.loads.get(model)) for model in node.models)
    return (
        node.name not in profile.pinned_on,
        not (room.fits and not room.victims),
        not room.fits,
        not room.fits_later,
        -room.free_mb,
        busy,
        node.name,
    )


def _nowhere(profile: ModelProfile, snapshot: FleetSnapshot, too_small: NodeSnapshot | None) -> Decision:
    for node in snapshot.nodes.values():
        admitted = not profile.pinned_on or node.name in profile.pinned_on
        if node.discovery is None:
            if admitted:
                return _away(profile.id)
        elif (not node.is_routable or node.is_draining) and is_feasible(profile, node.name, node.discovery):
            return _away(profile.id)
    if too_small is not None:
        return Refuse(
            kind="overloaded",
            message=f"The model `{profile.id}` needs {profile.vram_mb} MB, more than any node of this fleet has.",
            code="insufficient_vram",
        )
    return Refuse(
        kind="not_found",
        message=f"The model `{profile.id}` is in the catalogue, but no node of this fleet can run it.",
        code="no_feasible_node",
    )
