"""Snapshots for placement tests, by hand and by hypothesis."""

from __future__ import annotations

from typing import Any

from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import (
    DeviceHealth,
    DeviceInfo,
    DiscoveryResponse,
    ModelInfo,
    ModelLoad,
)
from cortex_gateway.configuration.policy import Policy, Strategy
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.breaker import Breakers
from cortex_gateway.fleet.snapshot import FleetSnapshot, LoadFailure, NodeSnapshot, Operation, Residence
from cortex_gateway.placement.queue import WaitingQueue
from cortex_gateway.placement.state import NO_BREAKERS, PlacementState
from hypothesis import strategies as st

INCOMING = "org/incoming"


def node(
    name: str = "alpha",
    *,
    having: dict[str, str] | None = None,
    free_mb: list[int] | None = None,
    total_mb: list[int] | None = None,
    **fields: Any,
) -> NodeSnapshot:
    """A healthy node; `having` maps a model's id to its status."""
    free = [20_000] if free_mb is None else free_mb
    total = [24_000] * len(free) if total_mb is None else total_mb
    defaults: dict[str, Any] = {
        "health": "healthy",
        "models": {model: ModelInfo(id=model, status=status, devices=(0,)) for model, status in (having or {}).items()},
        "devices": tuple(DeviceHealth(index=i, vram_free_mb=mb) for i, mb in enumerate(free)),
        "discovery": DiscoveryResponse(
            devices=tuple(DeviceInfo(index=i, name="GPU", vram_total_mb=mb) for i, mb in enumerate(total))
        ),
    }
    return NodeSnapshot(name=name, endpoint=f"http://{name}", **{**defaults, **fields})


def fleet(*nodes: NodeSnapshot) -> FleetSnapshot:
    return FleetSnapshot(nodes={each.name: each for each in nodes})


def state(
    *members: NodeSnapshot,
    catalogue: Catalogue | None = None,
    activity: Activity | None = None,
    strategy: Strategy = "lru",
    now: float = 100.0,
    waiting: dict[str, float] | None = None,
    breakers: Breakers = NO_BREAKERS,
    **policy: Any,
) -> PlacementState:
    """`waiting`: model -> since when its oldest request waits."""
    return PlacementState(
        snapshot=fleet(*members),
        catalogue=catalogue or Catalogue(),
        activity=activity or Activity(),
        policy=Policy(strategy=strategy, **policy),
        now=now,
        waiting=queued(waiting or {}),
        breakers=breakers,
    )


def queued(since: dict[str, float]) -> WaitingQueue:
    waiting = WaitingQueue()
    for model, moment in since.items():
        waiting.join(model, moment)
    return waiting


NAMES = [INCOMING, *(f"org/m{i}" for i in range(6))]


@st.composite
def catalogues(draw: st.DrawFn) -> Catalogue:
    profiles = [
        ModelProfile(
            id=name,
            vram_mb=draw(st.none() | st.integers(0, 30_000)),
            min_devices=draw(st.integers(1, 2)),
            pinned_on=draw(st.sampled_from([(), ("alpha",), ("beta",)])),
            residency_priority=draw(st.none() | st.sampled_from([50, 100, 1000])),
        )
        for name in NAMES
        if name == INCOMING or draw(st.booleans())
    ]
    return Catalogue(models=tuple(profiles))


@st.composite
def nodes(draw: st.DrawFn, name: str) -> NodeSnapshot:
    num_devices = draw(st.integers(0, 2))
    models = {}
    for model in NAMES[1:]:
        if draw(st.booleans()):
            models[model] = ModelInfo(
                id=model,
                status=draw(st.sampled_from(["loaded", "loaded", "loading", "failed", "recovering", "unloading"])),
                devices=tuple(draw(st.sets(st.integers(0, 1), max_size=num_devices))) if num_devices else (),
                vram_used_mb=draw(st.none() | st.integers(0, 12_000)),
            )
    operations = {
        model: Operation(kind=draw(st.sampled_from(["load", "unload"])), since=0.0)
        for model in NAMES[1:]
        if draw(st.integers(0, 9)) == 0
    }
    loads = {
        model: ModelLoad(
            id=model, in_flight=draw(st.integers(0, 1)), idle_s=draw(st.none() | st.floats(0, 100, allow_nan=False))
        )
        for model in models
    }
    residences = {
        model: Residence(begun=0.0, since=draw(st.none() | st.floats(0, 120, allow_nan=False))) for model in models
    }
    failed = {
        model: LoadFailure(message="no", code="x", until=draw(st.floats(90, 110, allow_nan=False)))
        for model in NAMES
        if draw(st.integers(0, 9)) == 0
    }
    return node(
        name,
        free_mb=[draw(st.integers(0, 24_000)) for _ in range(num_devices)],
        health=draw(st.sampled_from(["healthy", "healthy", "suspect", "unhealthy", "unknown"])),
        operations=operations,
        memory_free_mb=draw(st.integers(0, 64_000)),
        loads=loads,
        is_draining=draw(st.integers(0, 9)) == 0,
        models=models,
        residences=residences,
        load_failures=failed,
        pins=frozenset(model for model in models if draw(st.integers(0, 5)) == 0),
    )


@st.composite
def situations(draw: st.DrawFn) -> PlacementState:
    """Two nodes with whatever may be on them, work in flight, and requests that wait."""
    waiting = {
        model: float(draw(st.integers(0, 100))) for model in sorted(draw(st.sets(st.sampled_from(NAMES), max_size=4)))
    }
    return state(
        draw(nodes("alpha")),
        draw(nodes("beta")),
        catalogue=draw(catalogues()),
        activity=draw(activities()),
        strategy=draw(st.sampled_from(["lru", "priority"])),
        waiting=waiting,
        min_residence_s=draw(st.none() | st.sampled_from([0.0, 10.0])),
    )


@st.composite
def activities(draw: st.DrawFn) -> Activity:
    activity = Activity()
    for name in ("alpha", "beta"):
        for model in NAMES[1:]:
            if draw(st.booleans()):
                activity.begin(name, model, float(draw(st.integers(0, 5))))
                if draw(st.booleans()):
                    activity.end(name, model)
    return activity
