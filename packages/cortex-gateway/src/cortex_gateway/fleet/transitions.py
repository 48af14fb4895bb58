"""Transitions of the snapshot: events in, the next snapshot out. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from cortex_core.fleet import DiscoveryResponse, HealthResponse, ModelInfo, ModelLoad
from cortex_core.gateway_config import NeuronEntry

from cortex_gateway.fleet.snapshot import (
    FleetSnapshot,
    LoadFailure,
    NodeSnapshot,
    Operation,
    OperationKind,
    Residence,
)

FIRST_LOAD_BACKOFF_S = 2.0
MAX_LOAD_BACKOFF_S = 300.0
"""How long a node is left alone with a model that failed to load there: twice as long after each failure."""


class Polled(msgspec.Struct, frozen=True):
    """A neuron answered. `health` is None where that one call failed: it never costs a node its health.

    Models and loads are keyed by catalogue id; `ModelInfo.id` stays what the neuron calls the model.
    """

    node: str
    started_at: float
    models: dict[str, ModelInfo]
    loads: dict[str, ModelLoad] = {}
    health: HealthResponse | None = None
    discovery: DiscoveryResponse | None = None
    features: frozenset[str] | None = None


class PollMissed(msgspec.Struct, frozen=True):
    """No answer to a poll. is_alive: bytes of an answer arrived from the node meanwhile, so it is busy and not dead.
    is_gone: its host is there, and nothing listens."""

    node: str
    error: str
    unhealthy_after: int = 3
    is_alive: bool = False
    is_gone: bool = False


class PollRefused(msgspec.Struct, frozen=True):
    """The node does not answer this gateway. code: why, in one word."""

    node: str
    error: str
    code: str


class OperationStarted(msgspec.Struct, frozen=True):
    """A load or an unload that this gateway has begun. at: seconds of its clock."""

    node: str
    model: str
    kind: OperationKind
    at: float


class OperationEnded(msgspec.Struct, frozen=True):
    """`succeeded` writes the outcome into the model list at once; the next poll replaces it by the neuron's word.

    failure: why a load is not to be repeated at once (`at`, `until` and `count` are set here). is_eviction: whether an
    unload counts towards the next defragmentation.
    """

    node: str
    model: str
    kind: OperationKind
    at: float
    succeeded: bool
    failure: LoadFailure | None = None
    is_eviction: bool = True


class Pinned(msgspec.Struct, frozen=True):
    """An operator pinned a model or took the pin away. is_kept_here: the neuron is too old to keep it."""

    node: str
    model: str
    pinned: bool
    is_kept_here: bool = False


class DefragDue(msgspec.Struct, frozen=True):
    """From now on, every model that was here at `at` is to be recycled once it is idle."""

    node: str
    at: float


class DefragDone(msgspec.Struct, frozen=True):
    """A node has been swapped into order and takes loads again."""

    node: str


FleetEvent = Polled | PollMissed | PollRefused | OperationStarted | OperationEnded | Pinned | DefragDue | DefragDone


def with_neurons(snapshot: FleetSnapshot, neurons: Iterable[NeuronEntry]) -> FleetSnapshot:
    """The snapshot with these nodes: those it has at the same place stay as they are, all others are unknown yet."""
    nodes = {}
    for neuron in neurons:
        known, endpoint = snapshot.nodes.get(neuron.name), neuron.endpoint.rstrip("/")
        is_same = known is not None and (known.endpoint, known.kind) == (endpoint, neuron.kind)
        fresh = NodeSnapshot(name=neuron.name, endpoint=endpoint, kind=neuron.kind)
        nodes[neuron.name] = known if known is not None and is_same else fresh
    return FleetSnapshot(nodes=nodes, version=snapshot.version + 1)


def reduce(snapshot: FleetSnapshot, event: FleetEvent) -> FleetSnapshot:
    """The snapshot after `event`; the same object if nothing changed (an unknown node, an outdated poll)."""
    node = snapshot.nodes.get(event.node)
    if node is None:
        return snapshot
    match event:
        case Polled():
            after = _polled(node, event)
        case PollMissed():
            after = _missed(node, event)
        case PollRefused():
            after = msgspec.structs.replace(
                node, health="refusing", misses=node.misses + 1, last_error=event.error, refusal=event.code
            )
        case OperationStarted():
            operations = {**node.operations, event.model: Operation(kind=event.kind, since=event.at)}
            after = msgspec.structs.replace(node, operations=operations)
        case OperationEnded():
            after = _operation_ended(node, event)
        case Pinned():
            after = _pinned(node, event)
        case DefragDue():
            after = msgspec.structs.replace(node, defrag_since=event.at, defragged_cycles=node.lifecycle_cycles)
        case DefragDone():
            after = msgspec.structs.replace(node, defrag_since=None)
    if after is node:
        return snapshot
    return FleetSnapshot(nodes={**snapshot.nodes, node.name: after}, version=snapshot.version + 1)


def _missed(node: NodeSnapshot, event: PollMissed) -> NodeSnapshot:
    """healthy → suspect, which is still routable → unhealthy. Tokens that flow count as life: they make a node that
    misses polls suspect and no more."""
    if event.is_gone:
        node = msgspec.structs.replace(node, is_gone=True)
    if event.is_alive and node.is_routable:
        return msgspec.structs.replace(node, health="suspect", misses=0, last_error=event.error, refusal=None)
    misses = node.misses + 1
    is_away = not node.is_routable or misses >= event.unhealthy_after
    return msgspec.structs.replace(
        node, misses=misses, health="unhealthy" if is_away else "suspect", last_error=event.error, refusal=None
    )


def _polled(node: NodeSnapshot, event: Polled) -> NodeSnapshot:
    if event.started_at < node.operated_at:
        return node
    after = msgspec.structs.replace(
        node,
        health="healthy",
        misses=0,
        last_error=None,
        refusal=None,
        models=event.models,
        unloaded={model: info for model, info in node.unloaded.items() if model not in event.models},
        residences=_residences(node, event),
        load_failures=_failures_still_true(node, event),
        features=event.features,
        polled_at=event.started_at,
    )
    if event.discovery is not None:
        after = msgspec.structs.replace(after, discovery=event.discovery)
    if event.health is not None:
        health = event.health
        after = msgspec.structs.replace(
            after,
            loads=event.loads,
            devices=health.devices,
            memory_free_mb=health.memory_free_mb,
            uptime_secs=health.uptime_secs,
            instance=health.instance,
            generation=node.generation + is_another(node, health),
            is_gone=False,
            is_draining=health.draining,
            activation=health.activation,
        )
    return after


def _residences(node: NodeSnapshot, event: Polled) -> dict[str, Residence]:
    found = {}
    for model, info in event.models.items():
        known = node.residences.get(model)
        if info.status in ("loading", "fetching"):
            found[model] = known if known is not None and known.since is None else Residence(begun=event.started_at)
        elif known is None:
            found[model] = Residence(begun=event.started_at, since=event.started_at)
        elif known.since is None:
            found[model] = msgspec.structs.replace(known, since=event.started_at)
        else:
            found[model] = known
    return found


def _failures_still_true(node: NodeSnapshot, event: Polled) -> dict[str, LoadFailure]:
    """A model that someone else got loaded has not failed."""
    if not node.load_failures:
        return node.load_failures
    return {
        model: failure
        for model, failure in node.load_failures.items()
        if model not in event.models or event.models[model].status == "failed"
    }


def _pinned(node: NodeSnapshot, event: Pinned) -> NodeSnapshot:
    pins = node.pins - {event.model}
    if event.is_kept_here and event.pinned:
        pins |= {event.model}
    info = node.models.get(event.model)
    models = node.models
    if info is not None and not event.is_kept_here:
        models = {**models, event.model: msgspec.structs.replace(info, pinned=event.pinned)}
    return msgspec.structs.replace(node, pins=pins, models=models)


def is_another(node: NodeSnapshot, health: HealthResponse) -> bool:
    """Whether another process answers than the last time."""
    if node.is_gone:
        return True
    if node.instance and health.instance:
        return node.instance != health.instance
    return health.uptime_secs < node.uptime_secs


def _failed(node: NodeSnapshot, event: OperationEnded, failure: LoadFailure) -> NodeSnapshot:
    before = node.load_failures.get(event.model)
    count = 1 if before is None else before.count + 1
    backoff_s = min(FIRST_LOAD_BACKOFF_S * 2.0 ** min(count - 1, 30), MAX_LOAD_BACKOFF_S)
    failed = msgspec.structs.replace(failure, at=event.at, until=event.at + backoff_s, count=count)
    return msgspec.structs.replace(node, load_failures={**node.load_failures, event.model: failed})


def _operation_ended(node: NodeSnapshot, event: OperationEnded) -> NodeSnapshot:
    model = event.model
    operation = node.operations.get(model)
    after = msgspec.structs.replace(
        node, operations={name: other for name, other in node.operations.items() if name != model}, operated_at=event.at
    )
    if not event.succeeded:
        return after if event.failure is None else _failed(after, event, event.failure)
    info = node.models.get(model)
    others = {name: other for name, other in node.models.items() if name != model}
    residences = {name: other for name, other in node.residences.items() if name != model}
    if event.kind == "load":
        info = info or node.unloaded.get(model) or ModelInfo(id=model)
        info = msgspec.structs.replace(info, status="loaded", progress=None, error=None)
        begun = event.at if operation is None else operation.since
        return msgspec.structs.replace(
            after,
            models={**others, model: info},
            unloaded={name: other for name, other in node.unloaded.items() if name != model},
            residences={**residences, model: Residence(begun=begun, since=event.at)},
            load_failures={name: other for name, other in node.load_failures.items() if name != model},
        )
    unloaded = node.unloaded
    if info is not None and info.status != "failed":  # what never served here is not kept to come back
        unloaded = {**unloaded, model: msgspec.structs.replace(info, pinned=False)}
    return msgspec.structs.replace(
        after,
        models=others,
        unloaded=unloaded,
        residences=residences,
        pins=after.pins - {model},
        lifecycle_cycles=node.lifecycle_cycles + event.is_eviction,
    )
