"""The fleet at one moment, as frozen structs. Decisions are made on a snapshot, never on live objects."""

from __future__ import annotations

from typing import Literal

import msgspec
from cortex_core.fleet import (
    Activation,
    DeviceHealth,
    DiscoveryResponse,
    ModelInfo,
    ModelLoad,
    ModelSpec,
    ModelStatus,
    needed_features,
    status_of,
)
from cortex_core.gateway_config import NeuronKind

NodeHealth = Literal["unknown", "healthy", "suspect", "unhealthy", "refusing"]
"""`unknown` until the first poll has been answered or missed; `suspect` is still routable; `refusing`: the node is well
and answers nothing that this gateway asks, until somebody changes a configuration."""

OperationKind = Literal["load", "unload"]


class Operation(msgspec.Struct, frozen=True):
    """A load or unload this gateway has under way. It outranks what a poll says of the model meanwhile."""

    kind: OperationKind
    since: float


class Residence(msgspec.Struct, frozen=True):
    """Since when a model is here, as far as this gateway saw it. begun: when it began to load; since: when it was
    first seen loaded, None until then. Monotonic seconds."""

    begun: float
    since: float | None = None

    @property
    def load_s(self) -> float:
        return 0.0 if self.since is None else self.since - self.begun


HOST = -1
"""Where memory is by device: the memory of the host, which is all that one without accelerators has."""


class Shortage(msgspec.Struct, frozen=True):
    """What a neuron said of a load that does not fit, MB: needed and free on the worst device; required and available
    on each one where it does not, `HOST` for the host's own memory.

    is_passing: loads and unloads that are going on there may free it.
    """

    needed_mb: int
    free_mb: int
    required_mb: dict[int, int] = {}
    available_mb: dict[int, int] = {}
    is_passing: bool = False


class LoadFailure(msgspec.Struct, frozen=True):
    """A load that failed here `at` a moment, not to be repeated before `until`. count: failures in a row.

    shortage: the numbers, where memory was lacking and the neuron gave them; free_mb: what was free by device, as
    polled, when it failed.
    """

    message: str
    code: str
    at: float = 0.0
    until: float = 0.0
    count: int = 1
    lacks_memory: bool = False
    shortage: Shortage | None = None
    free_mb: dict[int, int] = {}


class NodeSnapshot(msgspec.Struct, frozen=True):
    """One neuron. The mappings are replaced, never changed in place.

    `unloaded` remembers what this gateway unloaded here, so that a model outside the catalogue can come back.
    `pins` are an operator's, on a neuron too old to keep them itself. lifecycle_cycles counts evictions;
    defrag_since is when so many of them had come together that every model older than that is to be recycled.
    refusal: the code of the error with which it refuses this gateway.
    generation counts the processes that were seen here one after the other, by their `instance` or, where they say
    none, by their uptime; is_gone: the last one has ended, for nothing listens there.
    features: those of its build, None while it has not said; a field of a load order that none of them names does not
    go there.
    polled_at and operated_at are monotonic seconds: the start of the last answered poll, and the end of the last
    load or unload. A poll that began before an operation ended describes the past and is not applied.
    """

    name: str
    endpoint: str
    kind: NeuronKind = "neuron"
    health: NodeHealth = "unknown"
    misses: int = 0
    last_error: str | None = None
    refusal: str | None = None
    models: dict[str, ModelInfo] = {}
    loads: dict[str, ModelLoad] = {}
    devices: tuple[DeviceHealth, ...] = ()
    memory_free_mb: int = 0
    uptime_secs: int = 0
    instance: str = ""
    generation: int = 0
    is_gone: bool = False
    is_draining: bool = False
    features: frozenset[str] | None = None
    discovery: DiscoveryResponse | None = None
    activation: Activation = Activation()
    operations: dict[str, Operation] = {}
    unloaded: dict[str, ModelInfo] = {}
    polled_at: float = 0.0
    operated_at: float = 0.0
    lifecycle_cycles: int = 0
    defragged_cycles: int = 0
    defrag_since: float | None = None
    residences: dict[str, Residence] = {}
    load_failures: dict[str, LoadFailure] = {}
    pins: frozenset[str] = frozenset()

    @property
    def is_routable(self) -> bool:
        return self.health in ("healthy", "suspect")

    @property
    def can_load(self) -> bool:
        """Whether models can be loaded and unloaded there; other servers have what they have."""
        return self.kind == "neuron"

    def reads(self, spec: ModelSpec) -> bool:
        """Whether its build is known to know all that the order asks for: it would ignore the rest."""
        return needed_features(spec) <= (self.features or frozenset())

    def status(self, model: str) -> ModelStatus | None:
        """Where the model stands here: own operations, then the neuron's list, then its activation queue."""
        if self.operations:
            operation = self.operations.get(model)
            if operation is not None:
                return "loading" if operation.kind == "load" else "unloading"
        info = self.models.get(model)
        if info is not None:
            return status_of(info.status)
        activation = self.activation
        if activation.state != "ready" and (activation.in_progress == model or model in activation.pending):
            return "loading"
        return None

    def is_pinned(self, model: str) -> bool:
        """Whether an operator asked that nothing displaces it here."""
        info = self.models.get(model)
        return model in self.pins or (info is not None and info.pinned)

    def is_servable(self, model: str) -> bool:
        info = self.models.get(model)
        return info is None or info.servable is None or info.servable.ok


class FleetSnapshot(msgspec.Struct, frozen=True):
    """All nodes by name, in the order of the configuration. `version` changes with every change."""

    nodes: dict[str, NodeSnapshot] = {}
    version: int = 0

    def neurons_only(self) -> FleetSnapshot:
        """Without the servers that are no neurons."""
        nodes = {name: node for name, node in self.nodes.items() if node.kind == "neuron"}
        return FleetSnapshot(nodes=nodes, version=self.version)

    def has_model(self, model: str) -> bool:
        return any(node.status(model) is not None for node in self.nodes.values())
