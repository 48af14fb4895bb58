"""Ask every neuron how it is: on an interval, at once when nudged, and often while somebody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from cortex_core.fleet import DiscoveryResponse, HealthResponse

from cortex_gateway.configuration.current import Current
from cortex_gateway.fleet.neuron import NeuronClient, NeuronError
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.fleet.transitions import Polled, PollMissed, PollRefused, is_another

logger = logging.getLogger(__name__)

MAX_LOOKS, LOOK_AGAIN_S, SILENCE_S = 10, 0.1, 1.0
"""Whether a process has ended: so many looks, so far apart, none after one that was not answered for so long."""
MIN_TIMEOUT_S = 0.5
"""Of a poll that is to say whether a node is lost."""
WATCH_INTERVAL_S = 0.25
"""How often a node is asked while a request or an operator waits for something to change there."""


class _Polling:
    """One neuron's polls. is_due: at once, whatever the interval; started_at: of the last one, on the loop's clock.
    coming: one that is wanted now and has not begun, because another goes on."""

    __slots__ = ("coming", "is_due", "lock", "num_watchers", "started_at", "task", "wake")

    def __init__(self) -> None:
        self.coming: asyncio.Task[bool] | None = None
        self.is_due = False
        self.lock = asyncio.Lock()
        self.num_watchers = 0
        self.started_at = 0.0
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Poller:
    """One task per node, so that a slow node delays nobody else.

    `neurons` are those of the configuration, by name; it changes when that does, and `follow` is to be called then.
    """

    def __init__(self, fleet: Fleet, neurons: Mapping[str, NeuronClient], current: Current) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self._current = current
        self._polled: dict[NeuronClient, _Polling] = {}
        self._looks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        self.follow()

    def follow(self) -> None:
        """Poll who is in the configuration now, whoever is new there at once. Who is not any more is only asked for
        signs of life, as long as it answers requests of ours."""
        for neuron in self._neurons.values():
            if neuron not in self._polled:
                polling = self._polled[neuron] = _Polling()
                polling.task = asyncio.create_task(self._run(neuron, polling), name=f"poll-{neuron.name}")
        for polling in self._polled.values():
            polling.wake.set()

    async def stop(self) -> None:
        tasks: list[asyncio.Task[Any]] = [polling.task for polling in self._polled.values() if polling.task is not None]
        tasks += [polling.coming for polling in self._polled.values() if polling.coming is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._looks.values(), return_exceptions=True)

    def nudge(self, node: str) -> None:
        """Poll soon: something was seen that the snapshot does not show."""
        polling = self._polling(node)
        if polling is not None:
            polling.is_due = True
            polling.wake.set()

    def nudge_all(self) -> None:
        for node in self._neurons:
            self.nudge(node)

    @contextmanager
    def watching(self, node: str) -> Iterator[None]:
        """While held, the node is polled every quarter of a second, however many hold it."""
        polling = self._polling(node)
        if polling is None:
            yield
            return
        polling.num_watchers += 1
        polling.wake.set()
        try:
            yield
        finally:
            polling.num_watchers -= 1

    async def refresh(self, node: str) -> bool:
        """Poll now and apply the answer; False if the node did not answer, or is not in the configuration any more.

        All who ask before it has begun share one poll, so that a hundred requests that lost a node wait for one.
        """
        neuron = self._neurons.get(node)
        if neuron is None:
            return False
        polling = self._polled[neuron]
        if polling.coming is None:
            polling.coming = asyncio.create_task(self._refresh(neuron, polling), name=f"refresh-{node}")
        return await asyncio.shield(polling.coming)

    async def _refresh(self, neuron: NeuronClient, polling: _Polling) -> bool:
        try:
            async with polling.lock:
                polling.coming = None
                return await self._poll(neuron)
        finally:
            if polling.coming is asyncio.current_task():  # cancelled while it waited; another one's is not ours to drop
                polling.coming = None

    async def has_ended(self, node: str, generation: int) -> bool:
        """Whether that process is gone: nothing listens there, or another one does. However many ask, one looks.

        Silence is no end: it may be a cut, a stop, or a host that is away with all it has. Nor is it one that the node
        had announced: who drains is being stopped.
        """
        if (told := self._fleet.snapshot.nodes.get(node)) is not None and told.is_draining:
            return False
        loop = asyncio.get_running_loop()
        for _ in range(MAX_LOOKS):
            asked_at = loop.time()
            look = self._looks.get(node)
            if look is None:
                look = self._looks[node] = asyncio.create_task(self._look(node), name=f"look-{node}")
                look.add_done_callback(lambda _: self._looks.pop(node, None))
            await asyncio.shield(look)
            known = self._fleet.snapshot.nodes.get(node)
            if known is None:
                return False
            if known.is_gone or known.generation != generation:
                return True
            if known.polled_at >= asked_at or loop.time() - asked_at > SILENCE_S:
                return False
            await asyncio.sleep(LOOK_AGAIN_S)  # a process that is ending may accept a last connection
        return False

    async def _look(self, node: str) -> None:
        """A poll where the node answers. Where it does not, that is no missed poll: several looks are no patience."""
        neuron = self._neurons.get(node)
        if neuron is None:
            return
        try:
            await neuron.health(self._current.config.poll.timeout_s)
        except NeuronError as error:
            if error.is_gone and self._is_configured(neuron):
                self._fleet.apply(PollMissed(node=node, error=error.message, unhealthy_after=1, is_gone=True))
            return
        await self.refresh(node)

    async def refresh_stale(self, max_age_s: float) -> None:
        """Poll every healthy node whose last answer is older than that; however many ask, each is polled once."""

        async def refresh(neuron: NeuronClient) -> None:
            async with self._polled[neuron].lock:
                if asyncio.get_running_loop().time() - neuron.answered_at > max_age_s:
                    await self._poll(neuron)

        nodes = self._fleet.snapshot.nodes
        healthy = [neuron for name, neuron in self._neurons.items() if nodes[name].health == "healthy"]
        await asyncio.gather(*(refresh(neuron) for neuron in healthy))

    async def refresh_all(self) -> None:
        await asyncio.gather(*(self.refresh(name) for name in self._neurons))

    def _polling(self, node: str) -> _Polling | None:
        neuron = self._neurons.get(node)
        return None if neuron is None else self._polled.get(neuron)

    def _is_configured(self, neuron: NeuronClient) -> bool:
        return self._neurons.get(neuron.name) is neuron

    async def _run(self, neuron: NeuronClient, polling: _Polling) -> None:
        now = asyncio.get_running_loop().time
        while self._is_configured(neuron) or neuron.num_requests:
            polling.started_at = now()
            polling.is_due = False
            try:
                async with polling.lock:
                    await self._poll(neuron)
            except Exception:
                logger.exception("polling node %s failed", neuron.name)
            while (remaining := self._next_poll_at(neuron, polling) - now()) > 0:
                polling.wake.clear()
                with suppress(TimeoutError):
                    # Whoever begins to wait for an answer there does not say so.
                    async with asyncio.timeout(min(remaining, self._watch_s)):
                        await polling.wake.wait()
        del self._polled[neuron]

    def _next_poll_at(self, neuron: NeuronClient, polling: _Polling) -> float:
        if polling.is_due:
            return 0.0
        interval_s = self._current.config.poll.interval_s
        if neuron.num_requests and self._silence_s:
            # Whoever waits for an answer there wants to know in time that none will come.
            is_in_doubt = (node := self._fleet.snapshot.nodes.get(neuron.name)) is not None and node.misses > 0
            interval_s = min(interval_s, WATCH_INTERVAL_S if is_in_doubt else self._watch_s)
        return polling.started_at + (min(interval_s, WATCH_INTERVAL_S) if polling.num_watchers else interval_s)

    @property
    def _watch_s(self) -> float:
        """How often a node is asked that works for us, so that it is not taken for a silent one."""
        return max(self._silence_s / 3, WATCH_INTERVAL_S) if self._silence_s else float("inf")

    @property
    def _silence_s(self) -> float:
        return self._current.config.gateway.stream_silence_s

    def _silent_at(self, neuron: NeuronClient) -> float:
        """When a node that works for us, and has missed a poll, is taken for lost if nothing comes of it until then: no
        poll answered, no byte of any answer."""
        if not neuron.num_requests or not self._silence_s or not self._fleet.snapshot.nodes[neuron.name].misses:
            return float("inf")
        heard_at = max(neuron.answered_at, self._fleet.activity.heard_at(neuron.name))
        return heard_at + self._silence_s

    async def _poll(self, neuron: NeuronClient) -> bool:
        fleet, settings = self._fleet, self._current.config.poll
        started_at = asyncio.get_running_loop().time()
        if not self._is_configured(neuron):
            return await self._look_for_life(neuron, started_at)
        node = fleet.snapshot.nodes[neuron.name]
        fleet.activity.begin_poll(neuron.name)
        timeout_s = min(settings.timeout_s, max(self._silent_at(neuron) - started_at, MIN_TIMEOUT_S))
        try:
            models, health = await asyncio.gather(neuron.models(timeout_s), self._health(neuron, timeout_s))
        except NeuronError as error:
            if not self._is_configured(neuron):
                return False
            if error.refuses_gateway:
                fleet.apply(PollRefused(node=neuron.name, error=error.message, code=error.kind or ""))
                return False
            is_silent = asyncio.get_running_loop().time() >= self._silent_at(neuron)
            fleet.apply(
                PollMissed(
                    node=neuron.name,
                    error=error.message,
                    unhealthy_after=1 if is_silent else settings.unhealthy_after,
                    is_alive=fleet.activity.is_heard_since(neuron.name, started_at),
                    is_gone=error.is_gone,
                )
            )
            return False
        discovery, features = node.discovery, node.features
        if discovery is None or features is None or (health is not None and is_another(node, health)):
            discovery, features = await asyncio.gather(self._discovery(neuron), self._features(neuron))
        neuron.answered_at = started_at
        if not self._is_configured(neuron):
            return False  # Taken out meanwhile: what it says is about no node any more.
        canonical = self._current.value.canonical
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
                features=features,
            )
        )
        present = frozenset(by_id)
        fleet.activity.forget_absent(neuron.name, present)
        fleet.breakers.forget_absent(neuron.name, present)
        return True

    async def _look_for_life(self, neuron: NeuronClient, started_at: float) -> bool:
        try:
            await neuron.models(self._current.config.poll.timeout_s)
        except NeuronError as error:
            logger.info("node %s, taken out of the configuration, does not answer: %s", neuron.name, error.message)
            return False
        neuron.answered_at = started_at
        return False

    async def _health(self, neuron: NeuronClient, timeout_s: float) -> HealthResponse | None:
        try:
            return await neuron.health(timeout_s)
        except NeuronError as error:
            logger.debug("health of node %s: %s", neuron.name, error.message)
            return None

    async def _discovery(self, neuron: NeuronClient) -> DiscoveryResponse | None:
        try:
            return await neuron.discovery(self._current.config.poll.timeout_s)
        except NeuronError as error:
            logger.warning("discovery of node %s: %s", neuron.name, error.message)
            return None

    async def _features(self, neuron: NeuronClient) -> frozenset[str] | None:
        try:
            return await neuron.features(self._current.config.poll.timeout_s)
        except NeuronError as error:
            logger.debug("version of node %s: %s", neuron.name, error.message)
            return None
