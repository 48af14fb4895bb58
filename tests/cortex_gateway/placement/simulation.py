"""One node, a virtual clock and the real decisions: what placement does over time, without a socket or a sleep."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import DeviceHealth, HealthResponse, ModelInfo, ModelLoad
from cortex_gateway.configuration.policy import Policy
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import FleetSnapshot, LoadFailure, Shortage
from cortex_gateway.fleet.transitions import FleetEvent, OperationEnded, OperationStarted, Polled, reduce
from cortex_gateway.placement.decision import Forward, Hold, Load, Refuse
from cortex_gateway.placement.queue import WaitingQueue
from cortex_gateway.placement.router import decide
from cortex_gateway.placement.state import PlacementState

from .fleets import fleet, node

TOTAL_MB = 24_000


class Arrival(NamedTuple):
    at: float
    model: str
    service_s: float


class Served(NamedTuple):
    model: str
    arrived: float
    began: float


class Refused(NamedTuple):
    model: str
    arrived: float
    at: float


class Node:
    """A node whose loads take `load_s` and where others hold `others_mb`, and a gateway that polls it every second."""

    def __init__(
        self, sizes_mb: dict[str, int], *, load_s: float, others_mb: int = 0, **policy: float | str | None
    ) -> None:
        self.catalogue = Catalogue(models=tuple(ModelProfile(id=name, vram_mb=mb) for name, mb in sizes_mb.items()))
        self.sizes_mb = sizes_mb
        self.load_s = load_s
        self.policy = Policy(**policy)  # type: ignore[arg-type]
        self.others_mb = others_mb
        self.snapshot: FleetSnapshot = fleet(node(free_mb=[TOTAL_MB - others_mb], total_mb=[TOTAL_MB], residences={}))
        self.activity = Activity()
        self.waiting = WaitingQueue()
        self.resident: set[str] = set()
        self.arriving: set[str] = set()
        self.loads: list[str] = []
        self.evicted_in_use: list[str] = []
        self.served: list[Served] = []
        self.refused: list[Refused] = []
        self.now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._alarms: set[float] = set()
        self._queue: list[tuple[Arrival, ExitStack]] = []

    def run(self, arrivals: list[Arrival]) -> None:
        """Until every request has been served, or refused for lack of memory. Raises if that never happens."""
        for arrival in arrivals:
            self._at(arrival.at, lambda arrival=arrival: self._arrive(arrival))  # type: ignore[misc]
        while len(self.served) + len(self.refused) < len(arrivals):
            assert self._agenda, f"nothing will ever happen, and these wait: {[a.model for a, _ in self._queue]}"
            self.now, _, happen = heapq.heappop(self._agenda)
            happen()
            self._serve_waiting()

    # ------------------------------------------------------------------------------------------ events

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        assert self._num_events < 20_000, "it goes in circles"
        heapq.heappush(self._agenda, (when, self._num_events, happen))

    def _arrive(self, arrival: Arrival) -> None:
        stack = ExitStack()
        stack.enter_context(self.waiting.joined(arrival.model, self.now))
        self._queue.append((arrival, stack))

    def _apply(self, event: FleetEvent) -> None:
        self.snapshot = reduce(self.snapshot, event)

    def _poll(self) -> None:
        used = sum(self.sizes_mb[model] for model in self.resident) + self.others_mb
        models = {model: ModelInfo(id=model, status="loaded", devices=(0,)) for model in self.resident}
        loads = {
            model: ModelLoad(id=model, in_flight=self.activity.in_flight("alpha", model)) for model in self.resident
        }
        health = HealthResponse(devices=(DeviceHealth(index=0, vram_free_mb=TOTAL_MB - used),))
        self.activity.begin_poll("alpha")
        self._apply(Polled(node="alpha", started_at=self.now, models=models, loads=loads, health=health))

    def _load(self, decision: Load, model: str) -> None:
        self._apply(OperationStarted(node="alpha", model=model, kind="load", at=self.now))
        for victim in decision.victims:
            if self.activity.in_flight("alpha", victim):
                self.evicted_in_use.append(victim)
            self._apply(OperationStarted(node="alpha", model=victim, kind="unload", at=self.now))
            self._apply(OperationEnded(node="alpha", model=victim, kind="unload", at=self.now, succeeded=True))
            self.resident.discard(victim)
        free_mb = TOTAL_MB - self.others_mb - sum(self.sizes_mb[name] for name in self.resident | self.arriving)
        if self.sizes_mb[model] > free_mb:
            self._at(self.now + 0.01, lambda: self._no_room(model, free_mb))
            return
        self.arriving.add(model)
        self.loads.append(model)
        self._at(self.now + self.load_s, lambda: self._loaded(model))

    def _no_room(self, model: str, free_mb: int) -> None:
        """The neuron's preflight: it knows its numbers."""
        assert self.others_mb, "what is ours alone always makes room in the end"
        needed_mb = self.sizes_mb[model]
        failure = LoadFailure(
            message="no room",
            code="insufficient_vram",
            lacks_memory=True,
            shortage=Shortage(
                needed_mb=needed_mb, free_mb=free_mb, required_mb={0: needed_mb}, available_mb={0: free_mb}
            ),
            free_mb={0: self.snapshot.nodes["alpha"].devices[0].vram_free_mb},
        )
        self._apply(
            OperationEnded(node="alpha", model=model, kind="load", at=self.now, succeeded=False, failure=failure)
        )
        self._at(self.now + 0.01, self._poll)

    def _loaded(self, model: str) -> None:
        self.arriving.discard(model)
        self.resident.add(model)
        assert sum(self.sizes_mb[name] for name in self.resident) + self.others_mb <= TOTAL_MB
        self.activity.mark("alpha", model, self.now)
        self._apply(OperationEnded(node="alpha", model=model, kind="load", at=self.now, succeeded=True))
        self._poll()

    def _end(self, model: str) -> None:
        self.activity.end("alpha", model)
        self._poll()

    # ------------------------------------------------------------------------------------------ decisions

    def _situation(self) -> PlacementState:
        return PlacementState(
            snapshot=self.snapshot,
            catalogue=self.catalogue,
            activity=self.activity,
            policy=self.policy,
            now=self.now,
            waiting=self.waiting,
        )

    def _serve_waiting(self) -> None:
        """Every waiting request looks at the new picture once, in any order that a gateway might wake them in."""
        for request in list(self._queue):
            arrival, stack = request
            decision = decide(arrival.model, self._situation())
            match decision:
                case Forward():
                    stack.close()
                    self._queue.remove(request)
                    self.activity.begin("alpha", arrival.model, self.now)
                    self.served.append(Served(arrival.model, arrival.at, self.now))
                    self._at(self.now + arrival.service_s, lambda model=arrival.model: self._end(model))  # type: ignore[misc]
                case Load():
                    self._load(decision, arrival.model)
                case Hold():
                    if decision.until is not None and decision.until not in self._alarms:
                        assert decision.until > self.now
                        self._alarms.add(decision.until)
                        self._at(decision.until, lambda: None)
                case Refuse():
                    assert decision.code == "insufficient_vram" and self.others_mb, decision.message
                    stack.close()
                    self._queue.remove(request)
                    self.refused.append(Refused(arrival.model, arrival.at, self.now))
