"""How the snapshot changes: events in, the next snapshot out. Pure."""

from __future__ import annotations

import msgspec
from cortex_core.fleet import DiscoveryResponse, HealthResponse, ModelInfo, ModelLoad

from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot, Operation, OperationKind


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


class PollMissed(msgspec.Struct, frozen=True):
    node: str
    error: str
    unhealthy_after: int = 3


class OperationStarted(msgspec.Struct, frozen=True):
    node: str
    model: str
    kind: OperationKind
    at: float


class OperationEnded(msgspec.Struct, frozen=True):
    """`succeeded` writes the outcome into the model list at once; the next poll replaces it by the neuron's word."""

    node: str
    model: str
    kind: OperationKind
    at: float
    succeeded: bool


FleetEvent = Polled | PollMissed | OperationStarted | OperationEnded


def reduce(snapshot: FleetSnapshot, event: FleetEvent) -> FleetSnapshot:
    """The snapshot after `event`; the same object if nothing changed (an unknown node, an outdated poll)."""
    node = snapshot.nodes.get(event.node)
    if node is None:
        return snapshot
    match event:
        case Polled():
            after = _polled(node, event)
        case PollMissed():
            misses = node.misses + 1
            health = "unhealthy" if node.health == "unhealthy" or misses >= event.unhealthy_after else "suspect"
            if node.health == "unknown":
                health = "unhealthy"
            after = msgspec.structs.replace(node, misses=misses, health=health, last_error=event.error)
        case OperationStarted():
            operations = {**node.operations, event.model: Operation(kind=event.kind, since=event.at)}
            after = msgspec.structs.replace(node, operations=operations)
        case OperationEnded():
            after = _operation_ended(node, event)
    if after is node:
        return snapshot
    return FleetSnapshot(nodes={**snapshot.nodes, node.name: after}, version=snapshot.version + 1)


def _polled(node: NodeSnapshot, event: Polled) -> NodeSnapshot:
    if event.started_at < node.operated_at:
        return node
    after = msgspec.structs.replace(
        node,
        health="healthy",
        misses=0,
        last_error=None,
        models=event.models,
        unloaded={model: info for model, info in node.unloaded.items() if model not in event.models},
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
            is_draining=health.draining,
            activation=health.activation,
        )
    return after


def _operation_ended(node: NodeSnapshot, event: OperationEnded) -> NodeSnapshot:
    after = msgspec.structs.replace(
        node,
        operations={model: operation for model, operation in node.operations.items() if model != event.model},
        operated_at=event.at,
    )
    if not event.succeeded:
        return after
    info = node.models.get(event.model)
    others = {model: other for model, other in node.models.items() if model != event.model}
    if event.kind == "load":
        info = info or node.unloaded.get(event.model) or ModelInfo(id=event.model)
        info = msgspec.structs.replace(info, status="loaded", progress=None, error=None)
        unloaded = {model: other for model, other in node.unloaded.items() if model != event.model}
        return msgspec.structs.replace(after, models={**others, event.model: info}, unloaded=unloaded)
    unloaded = node.unloaded if info is None else {**node.unloaded, event.model: info}
    return msgspec.structs.replace(after, models=others, unloaded=unloaded, lifecycle_cycles=node.lifecycle_cycles + 1)
