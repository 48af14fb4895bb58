"""Ask every neuron how it is: on an interval, at once when nudged, and often while somebody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from cortex_core.fleet import DiscoveryResponse, HealthResponse
from cortex_core.gateway_config import PollSection

from cortex_gateway.fleet.neuron import NeuronClient, NeuronError
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.fleet.transitions import Polled, PollMissed

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.25
"""How often a node is asked while a request or an operator waits for something to change there."""


class Poller:
    """One task per node, so that a slow node delays nobody else.

    `canonical` maps what a neuron may call a model (`scheme:org/name`) to its id in the catalogue.
    """

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        settings: PollSection,
        canonical: Mapping[str, str] | None = None,
    ) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self._settings = settings
        self._canonical = canonical or {}
        self._wakes = {name: asyncio.Event() for name in neurons}
        self._due_at = dict.fromkeys(neurons, 0.0)
        self._locks = {name: asyncio.Lock() for name in neurons}
        self._num_watchers = dict.fromkeys(neurons, 0)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(name), name=f"poll-{name}") for name in self._neurons]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def nudge(self, node: str) -> None:
        """Poll soon: something was seen that the snapshot does not show."""
        self._due_at[node] = 0.0
        self._wakes[node].set()

    @contextmanager
    def watching(self, node: str) -> Iterator[None]:
        """While held, the node is polled every quarter of a second, however many hold it."""
        self._num_watchers[node] += 1
        self._wakes[node].set()
        try:
            yield
        finally:
            self._num_watchers[node] -= 1

    def answered_at(self, node: str) -> float:
        """When the node last began to answer a poll, on the loop's clock."""
        return self._fleet.snapshot.nodes[node].polled_at

    async def refresh(self, node: str) -> bool:
        """Poll now and apply the answer; False if the node did not answer."""
        async with self._locks[node]:
            return await self._poll(self._neurons[node])

    async def refresh_stale(self, max_age_s: float) -> None:
        """Poll every healthy node whose last answer is older than that; however many ask, each is polled once."""

        async def refresh(node: str) -> None:
            async with self._locks[node]:
                if asyncio.get_running_loop().time() - self.answered_at(node) > max_age_s:
                    await self._poll(self._neurons[node])

        nodes = [node.name for node in self._fleet.snapshot.nodes.values() if node.health == "healthy"]
        await asyncio.gather(*(refresh(node) for node in nodes))

    async def refresh_all(self) -> None:
        await asyncio.gather(*(self.refresh(name) for name in self._neurons))

    async def _run(self, node: str) -> None:
        wake, now = self._wakes[node], asyncio.get_running_loop().time
        while True:
            started_at = now()
            self._due_at[node] = started_at + self._settings.interval_s
            try:
                await self.refresh(node)
            except Exception:
                log.exception("polling node %s failed", node)
            while (remaining := self._next_poll_at(node, started_at) - now()) > 0:
                wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(remaining):
                        await wake.wait()

    def _next_poll_at(self, node: str, last_started_at: float) -> float:
        due_at = self._due_at[node]
        return min(due_at, last_started_at + WATCH_INTERVAL_S) if self._num_watchers[node] else due_at

    async def _poll(self, neuron: NeuronClient) -> bool:
        fleet, timeout_s = self._fleet, self._settings.timeout_s
        node = fleet.snapshot.nodes[neuron.name]
        started_at = asyncio.get_running_loop().time()
        fleet.activity.begin_poll(neuron.name)
        try:
            models, health = await asyncio.gather(neuron.models(timeout_s), self._health(neuron))
        except NeuronError as error:
            fleet.apply(
                PollMissed(
                    node=neuron.name,
                    error=error.message,
                    unhealthy_after=self._settings.unhealthy_after,
                    is_alive=fleet.activity.is_heard_since(neuron.name, started_at),
                )
            )
            return False
        discovery = node.discovery
        if discovery is None or (health is not None and health.uptime_secs < node.uptime_secs):
            discovery = await self._discovery(neuron)
        canonical = self._canonical
        by_id = {canonical.get(info.id, info.id): info for info in models}
        loads = {} if health is None else {canonical.get(load.id, load.id): load for load in health.models}
        fleet.apply(
            Polled(
                node=neuron.name,
                started_at=started_at,
                models=by_id,
                loads=loads,
                health=health,
                discovery=discovery,
            )
        )
        present = frozenset(by_id)
        fleet.activity.forget_absent(neuron.name, present)
        fleet.breakers.forget_absent(neuron.name, present)
        return True

    async def _health(self, neuron: NeuronClient) -> HealthResponse | None:
        try:
            return await neuron.health(self._settings.timeout_s)
        except NeuronError as error:
            log.debug("health of node %s: %s", neuron.name, error.message)
            return None

    async def _discovery(self, neuron: NeuronClient) -> DiscoveryResponse | None:
        try:
            return await neuron.discovery(self._settings.timeout_s)
        except NeuronError as error:
            log.warning("discovery of node %s: %s", neuron.name, error.message)
            return None
