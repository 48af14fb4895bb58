"""Bring a request to a node that serves its model: at once where one does, else by waiting or by loading."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Container, Mapping
from types import TracebackType

from cortex_core.errors import ApiError, invalid
from cortex_core.fleet import LoadProgress

from cortex_gateway.configuration.current import Current
from cortex_gateway.fleet.activity import Answer
from cortex_gateway.fleet.neuron import NeuronClient
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.fleet.snapshot import NodeSnapshot
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.observability.metrics import Metrics
from cortex_gateway.placement.affinity import UNKNOWN, Affinity, Hints, Shares
from cortex_gateway.placement.decision import Decision, Forward, Hold, Load, Refuse, RouteReason
from cortex_gateway.placement.explanation import Wait, explain, in_figures
from cortex_gateway.placement.loads import LoadImpossible, Loads, RoomLost, Withdrawn, joined
from cortex_gateway.placement.queue import WaitingQueue
from cortex_gateway.placement.router import NOWHERE, decide, decide_by_hand, failure_on, has_other
from cortex_gateway.placement.state import PlacementState, Standing

logger = logging.getLogger(__name__)

MAX_CACHED_NAMES = 4096
RETRY_WAITING_S = 10
MAX_RETRY_WAITING_S = 60
"""SDKs give up where they are told to wait longer than two minutes."""
FRESH_S = 0.1
"""Before a load, nodes whose last poll is older than this are asked again: another gateway may have begun it."""

OnWait = Callable[[Hold | Load, RouteReason], None]
"""Told what a request waits for, and what its route will be."""


class Lease:
    """A place for one request: counted in flight while it is held.

    How it went is told to the breaker of its node and model when it ends: by the status of the answer, or as failed
    where there was none. A client that hung up says nothing about the node.
    """

    __slots__ = (
        "_answer",
        "_clock",
        "_fleet",
        "_is_judged",
        "_is_try",
        "_neurons",
        "_status",
        "generation",
        "model",
        "neuron",
        "neuron_model",
        "on_lost",
        "route",
    )

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        node: str,
        model: str,
        neuron_model: str,
        route: str,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self._clock = clock
        self.neuron = neuron = neurons[node]
        self.generation = fleet.snapshot.nodes[node].generation
        self.model = model
        self.neuron_model = neuron_model
        self.route = route
        self._answer: Answer | None = None
        self._status: int | None = None
        self._is_judged = False
        self._is_try = (node, model) in fleet.breakers.by_place and fleet.breakers.begun(node, model)
        self.on_lost: Callable[[], None] | None = None
        neuron.num_requests += 1
        fleet.under_way.setdefault(node, set()).add(self)
        fleet.activity.begin(node, model, clock())

    @property
    def _is_of_a_node(self) -> bool:
        """Whether the node still is this neuron, or the configuration says otherwise by now: then this lease runs to
        its end, and tells nobody."""
        return self._neurons.get(self.neuron.name) is self.neuron

    def answered(self, status: int, answer: Answer) -> None:
        """The status line came. What follows of the answer counts as a sign of life of the node."""
        self._status = status
        self._answer = answer
        if not self._is_of_a_node:
            return
        self._fleet.activity.listen(self.neuron.name, answer)
        if self._is_try and status < 400:
            self._fleet.breakers.answering(self.neuron.name, self.model)

    def node_is_lost(self) -> None:
        """The node does not answer any more: whoever asks it is told, while the node still is that neuron."""
        if self.on_lost is not None and self._is_of_a_node:
            self.on_lost()

    def rest(self, seconds: float) -> None:
        """The node wants to be asked again only then."""
        if self._is_of_a_node:
            self._fleet.breakers.rest(self.neuron.name, self.model, self._clock() + seconds)

    def failed(self) -> None:
        """The node did not answer, or broke off."""
        if not self._is_judged and self._is_of_a_node:
            self._is_judged = True
            self._fleet.breakers.failed(self.neuron.name, self.model, self._clock())

    def discard(self) -> None:
        """The model was not where it was thought to be: nobody's failure."""
        self._status = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        fleet, node = self._fleet, self.neuron.name
        if self._answer is not None:
            fleet.activity.unlisten(node, self._answer)
        fleet.under_way[node].discard(self)
        fleet.activity.end(node, self.model)
        self.neuron.num_requests -= 1
        if self._is_of_a_node:
            self._judge(kind)
        elif self._is_try:
            # The client was replaced, perhaps for a new key alone: the node's breaker must not wait for this try.
            fleet.breakers.abandoned(node, self.model, self._clock())
        if fleet.has_waiters:
            fleet.wake()

    def _judge(self, kind: type[BaseException] | None) -> None:
        fleet, node, status = self._fleet, self.neuron.name, self._status
        if not self._is_judged and status is not None and status >= 500:
            self.failed()
        elif not self._is_judged and status is not None and status != 429 and kind is None:
            self._is_judged = True
            if (node, self.model) in fleet.breakers.by_place:
                fleet.breakers.succeeded(node, self.model)
        if self._is_try and not self._is_judged:
            fleet.breakers.abandoned(node, self.model, self._clock())


class Placement:
    """The router with its hands: what it decides is carried out here, and decided again after each change."""

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        poller: Poller,
        metrics: Metrics,
        *,
        current: Current,
        waiting: WaitingQueue,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self._poller = poller
        self._metrics = metrics
        self._current = current
        self._waiting = waiting
        self._affinity = Affinity()
        self._told: dict[str, tuple[str, str]] = {}
        self._clock = clock
        self._resolved: dict[str, str] = {}
        self._standings: dict[str, Standing] = {}
        self._resolved_version = -1
        self.loads = Loads(fleet, neurons, poller, metrics, state=self.state, clock=clock)

    def resolve(self, name: str) -> str:
        """The concrete model id behind what a client asked for."""
        snapshot = self._fleet.snapshot
        self._forget_outdated()
        resolved = self._resolved.get(name)
        if resolved is None:
            served = {name} if snapshot.has_model(name) else ()
            resolved = self._resolved[name] = self._current.catalogue.resolve(name, served)
        return resolved

    def _forget_outdated(self) -> None:
        """What was found out in another snapshot, and more of it than there are names to ask for."""
        version = self._fleet.snapshot.version
        if version != self._resolved_version or len(self._resolved) + len(self._standings) > MAX_CACHED_NAMES:
            self._resolved.clear()
            self._standings = {}
            self._resolved_version = version

    def state(self, *, neurons_only: bool = False, by_hand: bool = False) -> PlacementState:
        """Everything there is to decide on, now."""
        snapshot = self._fleet.snapshot
        self._forget_outdated()
        return PlacementState(
            snapshot=snapshot.neurons_only() if neurons_only else snapshot,
            catalogue=self._current.catalogue,
            activity=self._fleet.activity,
            policy=self._current.policy,
            now=self._clock(),
            waiting=self._waiting,
            breakers=self._fleet.breakers,
            by_hand=by_hand,
            standings={} if neurons_only else self._standings,
        )

    def decide(
        self,
        model: str,
        shares: Shares = UNKNOWN,
        *,
        neurons_only: bool = False,
        by_hand: bool = False,
        avoid: Container[str] = NOWHERE,
    ) -> Decision:
        return decide(model, self.state(neurons_only=neurons_only, by_hand=by_hand), shares, avoid)

    def has_other(self, model: str, avoid: Container[str], *, neurons_only: bool = False) -> bool:
        """Whether, at this moment, a node that is not to be avoided serves the model."""
        return has_other(model, self.state(neurons_only=neurons_only), avoid)

    def try_now(self, model: str, hints: Hints | None = None, avoid: Container[str] = NOWHERE) -> Lease | None:
        """A lease if the model is served somewhere at this moment. Raises `ApiError` if it never will be."""
        shares = self._shares(model, hints)
        decision = self.decide(model, UNKNOWN if shares is None else shares, avoid=avoid)
        if type(decision) is Forward:
            return self._lease(decision, model, decision.reason, hints, shares)
        if type(decision) is Refuse:
            raise refused(decision, model)
        return None

    async def wait(
        self,
        model: str,
        hints: Hints | None = None,
        *,
        wait_s: float | None = None,
        on_wait: OnWait | None = None,
        avoid: Container[str] = NOWHERE,
        is_moving: bool = False,
        neurons_only: bool = False,
    ) -> Lease:
        """As `try_now`, but wait for whatever it takes, up to `wait_s` seconds (the configured budget by default).

        is_moving: the request was under way on a node that was lost; where a new one would be told to come back later,
        this one waits. neurons_only: a stream that has begun is to go on, which only a neuron can.

        Raises `ApiError`: the refusal, the failure of the load waited for, or 503 with `Retry-After` and the load's
        progress once the budget is spent (the load goes on).
        """
        began = self._clock()
        budget_s = self._current.config.gateway.load_wait_s if wait_s is None else wait_s
        try:
            async with asyncio.timeout(budget_s):
                with self._waiting.joined(model, began):
                    return await self._wait(
                        model, hints, on_wait, avoid, is_moving=is_moving, neurons_only=neurons_only
                    )
        except TimeoutError:
            raise self._still_waiting(model, budget_s) from None
        finally:
            if self._is_known(model):
                self._metrics.queue_wait.labels(model).observe(self._clock() - began)
            if model not in self._waiting:
                self._told.pop(model, None)
                if self._waiting:
                    self._fleet.wake()  # whoever queued behind this model may go now

    async def _wait(
        self,
        model: str,
        hints: Hints | None,
        on_wait: OnWait | None,
        avoid: Container[str],
        *,
        is_moving: bool,
        neurons_only: bool,
    ) -> Lease:
        route: RouteReason = "held"
        is_fresh = False
        while True:
            shares = self._shares(model, hints)
            known = UNKNOWN if shares is None else shares
            decision = self.decide(model, known, neurons_only=neurons_only, avoid=avoid)
            match decision:
                case Forward():
                    return self._lease(decision, model, route, hints, shares)
                case Refuse():
                    if not is_moving or decision.retry_after is None:
                        raise refused(decision, model)
                    await self.change(self._clock() + decision.retry_after)
                case Load():
                    route = "cold"
                    if on_wait is not None:
                        on_wait(decision, route)
                    if not is_fresh:
                        await self._poller.refresh_stale(FRESH_S)
                        is_fresh = True
                        continue
                    self.loads.start(decision.node, model, decision.spec, decision.victims)
                    await self._join(decision.node, model, None)
                    is_fresh = False
                case Hold():
                    if decision.reason == "loading" or self.loads.running(decision.node, model) is not None:
                        route = "cold"
                    if on_wait is not None:
                        on_wait(decision, route)
                    self._tell(model, decision)
                    await self._join(decision.node, model, decision.until)

    async def load(self, model: str, node: str | None = None) -> str:
        """Load the model because an operator asks, on `node` or where it is best; returns the node once it is there.

        Raises `ApiError`: the refusal, the failure of the load, or that the node is none where models can be loaded.
        """
        while True:
            named = None if node is None else self.managed(node)
            decision = decide_by_hand(model, self.state(by_hand=True), named)
            match decision:
                case Forward():
                    return decision.node
                case Refuse():
                    raise refused(decision, model)
                case Load():
                    load = self.loads.start(decision.node, model, decision.spec, decision.victims, reason="admin")
                case Hold():
                    running = self.loads.running(decision.node, model)
                    if running is None:
                        with self._poller.watching(decision.node):
                            await self.change(decision.until)
                        continue
                    load = running
            try:
                await joined(load)
                return decision.node
            except Withdrawn:
                continue
            except RoomLost:
                await self.pause(decision.node, model)
            except LoadImpossible as error:
                raise ApiError(
                    "invalid_request", error.message, code=error.code, param="model", status=error.neuron_status
                ) from error

    def managed(self, name: str) -> NodeSnapshot:
        """Raises `ApiError` for a node that is unknown, and for a server that is no neuron."""
        node = self._fleet.snapshot.nodes.get(name)
        if node is None:
            known = ", ".join(self._fleet.snapshot.nodes) or "none"
            raise ApiError(
                "not_found", f"No node is called `{name}`; known: {known}.", code="node_not_found", param="node"
            )
        if not node.can_load:
            raise invalid(
                f"`{name}` is a server of kind {node.kind}: no model can be loaded, unloaded or pinned there.",
                param="node",
                code="node_not_managed",
            )
        return node

    async def _join(self, node: str, model: str, until: float | None) -> None:
        """Wait for the load under way there, or for any change, or until the clock shows `until`."""
        load = self.loads.running(node, model)
        if load is not None:
            try:
                with self._poller.watching(node):  # for its progress
                    await joined(load)
            except Withdrawn:
                return
            except RoomLost:
                pass
            except ApiError:
                # The failure is known to the router by now: if another node can, it says so.
                if isinstance(self.decide(model), Refuse):
                    raise
                return
            else:
                return
        with self._poller.watching(node):
            await self.change(until)

    async def change(self, until: float | None) -> None:
        """Wait until something changes in the fleet, but no longer than until then."""
        changed = self._fleet.changed()
        await asyncio.wait({changed}, timeout=None if until is None else max(0.0, until - self._clock()))
        changed.cancel()

    async def pause(self, node: str, model: str) -> None:
        """After a load that lost its room: wait for a change there, and while it is not to be repeated."""
        with self._poller.watching(node):
            await self.change(None)
            while (snapshot := self._fleet.snapshot.nodes.get(node)) is not None:
                failure = failure_on(snapshot, model, self.state())
                if failure is None:
                    return
                await self.change(failure.until)

    def neuron_model(self, node: str, model: str) -> str:
        """What the node itself calls the model."""
        info = self._fleet.snapshot.nodes[node].models.get(model)
        return info.id if info is not None else model

    def _is_known(self, model: str) -> bool:
        return self._current.catalogue.profile(model) is not None or self._fleet.snapshot.has_model(model)

    def _shares(self, model: str, hints: Hints | None) -> Shares | None:
        """Which nodes know the request; None where there is nothing to choose between."""
        if hints is None or not self._current.config.routing.affinity:
            return None
        if sum(1 for node in self._fleet.snapshot.nodes.values() if model in node.models) < 2:
            return None
        return self._affinity.shares(model, hints)

    def _lease(
        self, decision: Forward, model: str, route: RouteReason, hints: Hints | None, shares: Shares | None
    ) -> Lease:
        node = decision.node
        if shares is not None and hints is not None:
            self._affinity.record(model, hints, node, shares)
            if decision.reason in ("session", "prefix"):
                self._metrics.affinity.labels(model, node, decision.reason).inc()
        return Lease(self._fleet, self._neurons, node, model, self.neuron_model(node, model), route, self._clock)

    # ------------------------------------------------------------------------------------------ what to tell clients

    def progress(self, model: str) -> tuple[str, LoadProgress | None] | None:
        """Where the model is on its way, and how far: (node, progress), or None if it is not."""
        for node in self._fleet.snapshot.nodes.values():
            if node.status(model) in ("fetching", "loading", "recovering"):
                info = node.models.get(model)
                return node.name, info.progress if info is not None else None
        return None

    def wait_of(self, model: str, node: str | None = None) -> Wait | None:
        """What requests for the model are held for at this moment; None where they would not be. node: what a load on
        that one is held for."""
        state = self.state()
        if node is None:
            decision = decide(model, state)
            return explain(model, decision, state) if isinstance(decision, Hold) else None
        snapshot = state.snapshot.nodes.get(node)
        if snapshot is None or failure_on(snapshot, model, state) is None:
            return None
        return explain(model, Hold(node=node, reason="busy"), state)

    def _tell(self, model: str, hold: Hold) -> None:
        """Say in the log what requests wait for, once for each reason: not for each request."""
        told = (hold.node, hold.reason)
        if self._told.get(model) != told and self._is_known(model):
            self._told[model] = told
            logger.info("requests for %s wait for %s", model, explain(model, hold, self.state()).text)

    def waiting_note(self, model: str) -> bytes:
        """What requests for the model wait for, as an SSE comment: how far its load is, or what is in its way. Empty if
        they wait for nothing."""
        if not model.isprintable():
            return b""
        found = self.progress(model)
        if found is None:
            wait = self.wait_of(model)
            return b"" if wait is None else b": %s waits for %s\n\n" % (model.encode(), _printable(wait.text))
        node, progress = found
        text = f"{model} is loading on {node}"
        if progress is not None:
            text += f": {progress.phase}"
            if progress.bytes_total:
                done, total = progress.bytes_done / 1e9, progress.bytes_total / 1e9
                text += f" {100 * progress.bytes_done // progress.bytes_total} % ({done:.1f} of {total:.1f} GB)"
            if progress.eta_s is not None:
                text += f", {math.ceil(progress.eta_s)} s left"
        return b": %s\n\n" % text.encode()

    def _still_waiting(self, model: str, waited_s: float) -> ApiError:
        extras: dict[str, object] = {"model_id": model, "waited_s": waited_s}
        retry_after = RETRY_WAITING_S
        found = self.progress(model)
        if found is None:
            position = [queue.model for queue in self._waiting.in_order()]
            extras |= {"num_waiting": self._waiting.num_requests(model), "models_waiting": position}
            wait = self.wait_of(model)
            if wait is not None:
                extras |= {"node": wait.node, "reason": wait.reason, "behind": wait.behind, **in_figures(wait.memory)}
            waits_for = "its turn" if wait is None else wait.text
            return ApiError(
                "overloaded",
                f"The model `{model}` waits for {waits_for}; ask again.",
                code="model_queued",
                retry_after=retry_after,
                extras=extras,
            )
        node, progress = found
        extras["node"] = node
        if progress is not None:
            extras |= {
                "phase": progress.phase,
                "bytes_done": progress.bytes_done,
                "bytes_total": progress.bytes_total,
                "eta_s": progress.eta_s,
            }
            if progress.eta_s is not None:
                retry_after = max(1, min(math.ceil(progress.eta_s), MAX_RETRY_WAITING_S))
        return ApiError(
            "overloaded",
            f"The model `{model}` is still being loaded; ask again.",
            code="model_loading",
            retry_after=retry_after,
            extras=extras,
        )


def _printable(text: str) -> bytes:
    """On one line: a neuron's words may be in it."""
    return "".join(letter if letter.isprintable() else " " for letter in text).encode()


def refused(decision: Refuse, model: str) -> ApiError:
    return ApiError(
        decision.kind,
        decision.message,
        code=decision.code,
        param="model" if decision.code == "model_not_found" else None,
        retry_after=decision.retry_after,
        extras={"model_id": model, **decision.extras},
        status=decision.status,
    )
