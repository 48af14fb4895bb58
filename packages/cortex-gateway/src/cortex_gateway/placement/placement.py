"""Bring a request to a node that serves its model: at once where one does, else by waiting or by loading."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

from cortex_core.catalogue import Catalogue
from cortex_core.errors import ApiError

from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.neuron import NeuronClient
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.placement.decision import Decision, Forward, Hold, Load, Refuse
from cortex_gateway.placement.evictor import Strategy
from cortex_gateway.placement.loads import Loads, RoomLost
from cortex_gateway.placement.router import decide

MAX_CACHED_NAMES = 4096
RETRY_WAITING_S = 10


class Lease:
    """A place for one request: counted in flight while it is held."""

    __slots__ = ("_activity", "_fleet", "model", "neuron", "neuron_model", "route")

    def __init__(
        self, fleet: Fleet, neuron: NeuronClient, model: str, neuron_model: str, route: str, now: float
    ) -> None:
        self._fleet = fleet
        self._activity: Activity = fleet.activity
        self.neuron = neuron
        self.model = model
        self.neuron_model = neuron_model
        self.route = route
        self._activity.begin(neuron.name, model, now)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._activity.end(self.neuron.name, self.model)
        if self._fleet.has_waiters:
            self._fleet.wake()


class Placement:
    """The router with its hands: what it decides is carried out here, and decided again after each change."""

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        poller: Poller,
        loads: Loads,
        *,
        catalogue: Catalogue,
        strategy: Strategy,
        wait_s: float,
    ) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self._poller = poller
        self._loads = loads
        self._catalogue = catalogue
        self._strategy: Strategy = strategy
        self._wait_s = wait_s
        self._resolved: dict[str, str] = {}
        self._resolved_version = -1

    def resolve(self, name: str) -> str:
        """The concrete model id behind what a client asked for."""
        snapshot = self._fleet.snapshot
        if snapshot.version != self._resolved_version or len(self._resolved) > MAX_CACHED_NAMES:
            self._resolved.clear()
            self._resolved_version = snapshot.version
        resolved = self._resolved.get(name)
        if resolved is None:
            served = {name} if snapshot.has_model(name) else ()
            resolved = self._resolved[name] = self._catalogue.resolve(name, served)
        return resolved

    def decide(self, model: str) -> Decision:
        return decide(model, self._fleet.snapshot, self._fleet.activity, self._catalogue, self._strategy)

    def try_now(self, model: str, now: float) -> Lease | None:
        """A lease if the model is served somewhere at this moment. Raises `ApiError` if it never will be."""
        decision = self.decide(model)
        if type(decision) is Forward:
            return self._lease(decision.node, model, "loaded", now)
        if type(decision) is Refuse:
            raise refused(decision, model)
        return None

    async def wait(self, model: str) -> Lease:
        """As `try_now`, but wait for whatever it takes, up to the configured budget.

        Raises `ApiError`: the refusal, the failure of the load waited for, or 503 with `Retry-After` once the
        budget is spent (the load goes on).
        """
        loop = asyncio.get_running_loop()
        route = "held"
        try:
            async with asyncio.timeout(self._wait_s):
                while True:
                    decision = self.decide(model)
                    match decision:
                        case Forward():
                            return self._lease(decision.node, model, route, loop.time())
                        case Refuse():
                            raise refused(decision, model)
                        case Load():
                            route = "cold"
                            self._loads.start(decision.node, model, decision.spec, decision.victims)
                            await self._join(decision.node, model)
                        case Hold():
                            if self._loads.running(decision.node, model) is not None:
                                route = "cold"
                            await self._join(decision.node, model)
        except TimeoutError:
            raise self._still_waiting(model) from None

    async def _join(self, node: str, model: str) -> None:
        """Wait for the load under way there, or for any change."""
        load = self._loads.running(node, model)
        try:
            if load is not None:
                await asyncio.shield(load)
                return
        except RoomLost:
            pass
        with self._poller.watching(node):
            await self._fleet.changed()

    def neuron_model(self, node: str, model: str) -> str:
        """What the node itself calls the model."""
        info = self._fleet.snapshot.nodes[node].models.get(model)
        return info.id if info is not None else model

    def _lease(self, node: str, model: str, route: str, now: float) -> Lease:
        return Lease(self._fleet, self._neurons[node], model, self.neuron_model(node, model), route, now)

    def _still_waiting(self, model: str) -> ApiError:
        extras: dict[str, object] = {"model_id": model}
        for node in self._fleet.snapshot.nodes.values():
            info = node.models.get(model)
            if info is not None and info.progress is not None:
                extras |= {
                    "node": node.name,
                    "phase": info.progress.phase,
                    "bytes_done": info.progress.bytes_done,
                    "bytes_total": info.progress.bytes_total,
                }
        return ApiError(
            "overloaded",
            f"The model `{model}` is still being loaded; ask again.",
            code="model_loading",
            retry_after=RETRY_WAITING_S,
            extras=extras,
        )


def refused(decision: Refuse, model: str) -> ApiError:
    return ApiError(
        decision.kind,
        decision.message,
        code=decision.code,
        param="model" if decision.code == "model_not_found" else None,
        retry_after=decision.retry_after,
        extras={"model_id": model},
        status=decision.status,
    )
