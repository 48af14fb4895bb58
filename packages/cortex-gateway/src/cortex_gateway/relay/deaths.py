"""Tries of requests, watched for the ends of the processes that work on them: `blame` decides, this looks and tells."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cortex_core.errors import ApiError

from cortex_gateway.bodies.payload import Payload
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.observability.metrics import Metrics
from cortex_gateway.placement.placement import Lease
from cortex_gateway.relay.blame import Blame, Body, Life
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.retries import BrokenStream, StaleRoute, Unanswered

log = logging.getLogger(__name__)


class Deaths:
    """One gateway's watch over the processes that end under its requests."""

    def __init__(self, poller: Poller, metrics: Metrics) -> None:
        self._poller = poller
        self._metrics = metrics
        self._blame = Blame(time.monotonic)

    async def check(self, body: Body, payload: Payload) -> None:
        """Raises `ApiError` for a body that has ended processes."""
        if self._blame.needs_digest(body):
            body.digest = await payload.digest()
        try:
            self._blame.check(body)
        except ApiError:
            self._metrics.blamed.labels(body.model, "again").inc()
            raise

    def is_taken(self, body: Body, node: str) -> bool:
        """Whether a suspect has to wait there for another one's turn to end; `freed` waits for it."""
        return self._blame.is_taken(body, node)

    async def freed(self) -> None:
        await self._blame.freed()

    @asynccontextmanager
    async def watched(self, exchange: RequestState, lease: Lease, body: Body, payload: Payload) -> AsyncIterator[None]:
        """One try. Raises what is inside raises, but for `Unanswered`: then where the request goes, or what ends it."""
        loop = asyncio.get_running_loop()
        life = Life(lease.neuron.name, lease.generation)
        exchange.has_answered = False
        trial = exchange.trial = self._blame.begin(body, life)
        turn = None if trial is None or trial.turn_s is None else loop.call_later(trial.turn_s, trial.turn_is_over)
        sent_at = loop.time()
        is_in_path = True
        try:
            yield
            if trial is not None:
                trial.answered()
            if exchange.is_blamed:
                lease.discard()
                await self._digest(body, payload)
                self._blame.remember(body)
                self._metrics.blamed.labels(body.model, "engine").inc()
        except Unanswered as unanswered:
            lived_s = loop.time() - sent_at
            if unanswered.settle is not None and not await self._poller.has_ended(life.node, life.generation):
                unanswered.settle()
            lease.discard()  # whatever it answered
            what = "node" if unanswered.engine is None else "the engine of node"
            log.warning("request %s: %s %s ended under it after %.1f s", exchange.request_id, what, life.node, lived_s)
            await self._digest(body, payload)
            is_in_path = False  # it stays in the path of that process, for those who ended with it
            if self._blame.died(body, trial, life._replace(engine=unanswered.engine), lived_s):
                self._metrics.blamed.labels(body.model, "died").inc()
                raise self._blame.error(body) from unanswered.__cause__
            raise (StaleRoute if exchange.stream is None else BrokenStream) from unanswered.__cause__
        finally:
            exchange.trial = None
            if turn is not None:
                turn.cancel()
            if trial is not None and is_in_path:
                trial.leave()

    @staticmethod
    async def _digest(body: Body, payload: Payload) -> None:
        if body.digest is None:
            body.digest = await payload.digest()
