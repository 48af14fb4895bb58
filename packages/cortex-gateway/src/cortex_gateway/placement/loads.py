"""Loads and unloads: exactly one of each per (node, model) at a time, however many clients wait for it.

A load belongs to the gateway, not to the request that started it: a client that leaves takes its waiting with it
and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Coroutine, Mapping
from typing import Any, Literal

import msgspec
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec

from cortex_gateway.fleet.neuron import NeuronClient, NeuronError
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.fleet.snapshot import LoadFailure, OperationKind
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.fleet.transitions import OperationEnded, OperationStarted, Pinned
from cortex_gateway.observability.metrics import Metrics
from cortex_gateway.placement.evictor import free_by_device, may_come_free, next_victim
from cortex_gateway.placement.explanation import in_figures, in_words, numbers_of
from cortex_gateway.placement.state import PlacementState

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 1800.0
UNLOAD_TIMEOUT_S = 120.0
PIN_TIMEOUT_S = 10.0
MAX_EVICTION_ROUNDS = 3
"""How often a neuron's refusal for lack of memory is answered by evicting one more model."""

Key = tuple[str, str]

LoadReason = Literal["request", "admin", "defrag"]
UnloadReason = Literal["room", "refused", "idle", "defrag", "admin"]
"""`room`: the router made room; `refused`: the neuron had refused a load for lack of it."""


class RoomLost(Exception):
    """A victim turned out to be busy: nothing was loaded, and the decision has to be made anew."""


class Withdrawn(RoomLost):
    """The node was taken out of the configuration meanwhile, or another server has its name now."""


async def joined(operation: asyncio.Task[None]) -> None:
    """Wait for an operation without owning it. Raises what it raised, and `Withdrawn`."""
    try:
        await asyncio.shield(operation)
    except asyncio.CancelledError:
        waiter = asyncio.current_task()
        if operation.cancelled() and not (waiter is not None and waiter.cancelling()):
            raise Withdrawn from None
        raise


class Loads:
    """Carries out what the router decided. Each operation is a task of its own; joining one is awaiting it."""

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        poller: Poller,
        metrics: Metrics,
        *,
        state: Callable[[], PlacementState],
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self._poller = poller
        self._metrics = metrics
        self._state = state
        self._clock = clock
        self._loads: dict[Key, asyncio.Task[None]] = {}
        self._unloads: dict[Key, asyncio.Task[None]] = {}

    def running(self, node: str, model: str) -> asyncio.Task[None] | None:
        """The load under way there, to be awaited through `joined`. Raises `ApiError`, `RoomLost`."""
        return _alive(self._loads.get((node, model)))

    def start(
        self,
        node: str,
        model: str,
        spec: ModelSpec,
        victims: tuple[str, ...] = (),
        *,
        reason: LoadReason = "request",
    ) -> asyncio.Task[None]:
        """Start a load, or join the one under way.

        The model counts as loading and the victims as unloading before this returns, so that no other request
        is decided on a picture in which they are not.
        """
        task = self.running(node, model)
        if task is None:
            self._begin(node, model, "load")
            unloads = [self.unload(node, victim, reason="room") for victim in victims]
            task = asyncio.create_task(self._load(node, model, spec, unloads, reason), name=f"load-{model}-{node}")
            self._keep(self._loads, (node, model), task)
        return task

    def unload(self, node: str, model: str, *, reason: UnloadReason) -> asyncio.Task[None]:
        """Start an unload, or join the one under way. The task raises `NeuronError`."""
        task = _alive(self._unloads.get((node, model)))
        if task is None:
            self._begin(node, model, "unload")
            task = asyncio.create_task(self._unload(node, model, reason), name=f"unload-{model}-{node}")
            self._keep(self._unloads, (node, model), task)
        return task

    def recycle(self, node: str, model: str, spec: ModelSpec) -> asyncio.Task[None]:
        """Unload and load again, in one go: requests meanwhile wait for the load. Joins a load under way."""
        task = self.running(node, model)
        if task is None:
            self._begin(node, model, "load")
            task = asyncio.create_task(self._recycle(node, model, spec), name=f"recycle-{model}-{node}")
            self._keep(self._loads, (node, model), task)
        return task

    async def stop(self) -> None:
        """Forget what is under way; the neurons finish it without us."""
        tasks = [*self._loads.values(), *self._unloads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def withdraw(self, nodes: Container[str]) -> None:
        """These nodes are no more what they were: what is under way there is left to them, and whoever waits for it
        decides anew."""
        operations: tuple[tuple[OperationKind, dict[Key, asyncio.Task[None]]], ...] = (
            ("load", self._loads),
            ("unload", self._unloads),
        )
        for kind, tasks in operations:
            for (node, model), task in list(tasks.items()):
                if node in nodes:
                    task.cancel()
                    # A node whose client alone was replaced is known as before, and must not seem busy with it.
                    self._fleet.apply(
                        OperationEnded(node=node, model=model, kind=kind, at=self._clock(), succeeded=False)
                    )

    @staticmethod
    def _keep(tasks: dict[Key, asyncio.Task[None]], key: Key, task: asyncio.Task[None]) -> None:
        def forget(done: asyncio.Task[None]) -> None:
            if tasks.get(key) is done:
                del tasks[key]
            if not done.cancelled():
                done.exception()  # seen: nobody may be waiting

        tasks[key] = task
        task.add_done_callback(forget)

    def _begin(self, node: str, model: str, kind: OperationKind) -> None:
        self._fleet.apply(OperationStarted(node=node, model=model, kind=kind, at=self._clock()))

    async def _load(
        self, node: str, model: str, spec: ModelSpec, unloads: list[asyncio.Task[None]], reason: LoadReason
    ) -> None:
        started_at = self._clock()
        outcome = "failed"
        failure: LoadFailure | None = None
        try:
            try:
                await asyncio.gather(*unloads)
            except NeuronError as error:
                outcome = "no_room"
                raise RoomLost from error
            await self._load_making_room(node, model, spec)
            outcome = "loaded"
        except NeuronError as error:
            logger.warning(
                "loading %s on %s failed (status %s, %s): %s", model, node, error.status, error.kind, error.message
            )
            failure, may_wait = await self._failure(model, node, error)
            if may_wait:
                raise RoomLost from error
            raise load_failed(model, node, error, failure, self._state()) from error
        finally:
            if not _is_left():
                loaded = outcome == "loaded"
                if loaded:
                    self._fleet.activity.mark(node, model, self._clock())
                self._fleet.apply(
                    OperationEnded(
                        node=node, model=model, kind="load", at=self._clock(), succeeded=loaded, failure=failure
                    )
                )
                self._metrics.load_finished(model, node, outcome, reason, self._clock() - started_at)
                self._poller.nudge(node)
        logger.info("loaded %s on %s in %.1f s", model, node, self._clock() - started_at)

    async def _load_making_room(self, node: str, model: str, spec: ModelSpec) -> None:
        for round_ in range(MAX_EVICTION_ROUNDS + 1):
            logger.info("loading %s on %s", model, node)
            try:
                await self._while_reachable(node, self._client(node).load(spec, LOAD_TIMEOUT_S))
                return
            except NeuronError as error:
                snapshot = self._fleet.snapshot.nodes.get(node)
                if not error.lacks_memory or snapshot is None or round_ == MAX_EVICTION_ROUNDS:
                    raise
                state = self._state()
                free_mb = free_by_device(snapshot, state, incoming=model)
                victim = next_victim(snapshot, model, _failure(model, node, error, free_mb), state)
                if victim is None:
                    raise
                logger.info("%s does not fit on %s beside %s: %s", model, node, victim, error.message)
            await self.unload(node, victim, reason="refused")

    async def _while_reachable(self, node: str, call: Coroutine[Any, Any, None]) -> None:
        """Wait for a call to a node as long as polls reach it: a host that is gone closes no connection.

        Raises `NeuronError`.
        """
        try:
            async with asyncio.timeout(None) as until:
                watching = asyncio.create_task(self._end_unreachable(node, until))
                try:
                    await call
                finally:
                    watching.cancel()
        except TimeoutError:
            raise NeuronError(f"{node} does not answer any more") from None

    async def _end_unreachable(self, node: str, until: asyncio.Timeout) -> None:
        while True:
            changed = self._fleet.changed()
            snapshot = self._fleet.snapshot.nodes.get(node)
            if snapshot is not None and snapshot.health == "unhealthy":
                until.reschedule(asyncio.get_running_loop().time())
                return
            await changed

    async def _failure(self, model: str, node: str, error: NeuronError) -> tuple[LoadFailure, bool]:
        """What is remembered of a load that failed; and whether what is in the way may go sooner or later by itself:
        it is in use, or new, or on its way."""
        if error.lacks_memory:
            await self._poller.refresh(node)
        state = self._state()
        snapshot = state.snapshot.nodes.get(node)
        if snapshot is None:
            return _failure(model, node, error, {}), False
        failure = _failure(model, node, error, free_by_device(snapshot, state, incoming=model))
        before = snapshot.load_failures.get(model)
        failure = msgspec.structs.replace(failure, count=1 if before is None else before.count + 1)
        return failure, error.lacks_memory and may_come_free(snapshot, model, failure, state)

    async def _unload(self, node: str, model: str, reason: UnloadReason) -> None:
        succeeded = False
        try:
            await self._client(node).unload(self._name_on(node, model), UNLOAD_TIMEOUT_S)
            succeeded = True
        except NeuronError as error:
            logger.warning("unloading %s from %s failed: %s", model, node, error.message)
            raise
        finally:
            if not _is_left():
                self._fleet.apply(
                    OperationEnded(node=node, model=model, kind="unload", at=self._clock(), succeeded=succeeded)
                )
                self._poller.nudge(node)
        self._metrics.evicted(model, node, reason)
        logger.info("unloaded %s from %s (%s)", model, node, reason)

    async def _recycle(self, node: str, model: str, spec: ModelSpec) -> None:
        """One operation, from the outside: the model counts as loading from the first to the last moment."""
        was_pinned = self._fleet.snapshot.nodes[node].is_pinned(model)
        try:
            await self._client(node).unload(self._name_on(node, model), UNLOAD_TIMEOUT_S)
        except NeuronError as error:
            logger.info("not recycling %s on %s now: %s", model, node, error.message)
            self._fleet.apply(OperationEnded(node=node, model=model, kind="load", at=self._clock(), succeeded=False))
            self._poller.nudge(node)
            raise RoomLost from error
        self._metrics.evicted(model, node, "defrag")
        now = self._clock()
        self._fleet.apply(
            OperationEnded(node=node, model=model, kind="unload", at=now, succeeded=True, is_eviction=False)
        )
        self._begin(node, model, "load")
        await self._load(node, model, spec, [], "defrag")
        if was_pinned:
            await self.pin(node, model, pinned=True)

    async def pin(self, node: str, model: str, *, pinned: bool) -> bool:
        """Pin a model or take the pin away; True if the neuron keeps it, False if it is too old and this gateway does.

        Raises `NeuronError`.
        """
        is_kept_here = False
        try:
            await self._client(node).pin(self._name_on(node, model), pinned, PIN_TIMEOUT_S)
        except NeuronError as error:
            if error.status not in (404, 405) or error.kind == "model_not_found":
                raise
            is_kept_here = True
        self._fleet.apply(Pinned(node=node, model=model, pinned=pinned, is_kept_here=is_kept_here))
        return not is_kept_here

    def _client(self, node: str) -> NeuronClient:
        """Raises `NeuronError` for a node that is not in the configuration any more."""
        neuron = self._neurons.get(node)
        if neuron is None:
            raise NeuronError(f"{node} is not in the configuration any more")
        return neuron

    def _name_on(self, node: str, model: str) -> str:
        """What the node itself calls the model."""
        snapshot = self._fleet.snapshot.nodes.get(node)
        info = snapshot.models.get(model) if snapshot is not None else None
        return info.id if info is not None else model


def _alive(task: asyncio.Task[None] | None) -> asyncio.Task[None] | None:
    """None for one that is being withdrawn: it has a moment left, but nothing to give."""
    return None if task is None or task.cancelling() > 0 else task


def _is_left() -> bool:
    """Whether the present operation was left to its node: then it is not ours to say what became of it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class LoadImpossible(ApiError):
    """A neuron said that this can never be loaded there, with `neuron_status` (400, 404, 422).

    Requests that wait for the model read that it cannot be served; who asked for the load, that the load is wrong.
    """

    def __init__(self, message: str, *, code: str, neuron_status: int) -> None:
        super().__init__("overloaded", message, code=code)
        self.neuron_status = neuron_status


def _failure(model: str, node: str, error: NeuronError, free_mb: dict[int, int]) -> LoadFailure:
    can = "could not" if error.is_passing else "cannot"
    return LoadFailure(
        message=f"The model `{model}` {can} be loaded on {node}: {error.message}",
        code=error.kind or "model_load_failed",
        lacks_memory=error.lacks_memory,
        shortage=error.shortage,
        free_mb=free_mb,
    )


def load_failed(model: str, node: str, error: NeuronError, failure: LoadFailure, state: PlacementState) -> ApiError:
    """What a client reads: retryable unless the neuron said that the request itself can never work."""
    if not error.is_passing:
        assert error.status is not None
        return LoadImpossible(failure.message, code=failure.code, neuron_status=error.status)
    snapshot = state.snapshot.nodes.get(node)
    memory = None if snapshot is None else numbers_of(model, snapshot, failure, state)
    return ApiError(
        "overloaded",
        failure.message + in_words(node, memory),
        code=failure.code,
        retry_after=error.retry_after or 10,
        extras={"model_id": model, "node": node, **in_figures(memory)},
    )
