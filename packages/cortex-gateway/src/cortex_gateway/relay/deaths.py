"""Ends of processes under requests: `blame` decides who is suspected, this looks and tells."""

from __future__ import annotations

import logging
import time
from typing import NoReturn

from cortex_core.errors import ApiError

from cortex_gateway.fleet.poller import Poller
from cortex_gateway.observability.metrics import Metrics
from cortex_gateway.placement.placement import Lease
from cortex_gateway.relay.blame import Blame, Body, Life, Trial
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.retries import BrokenStream, StaleRoute, Unanswered

logger = logging.getLogger(__name__)


class Deaths:
    """One gateway's watch over the processes that end under its requests. suspects: bodies under which some have ended;
    while there are none, only `ended` and `found` have anything to do."""

    def __init__(self, poller: Poller, metrics: Metrics) -> None:
        self._poller = poller
        self._metrics = metrics
        self._blame = Blame(time.monotonic)
        self.suspects = self._blame.records

    async def check(self, request: RequestState) -> None:
        """Raises `ApiError` for a body that has ended processes."""
        body = _body(request)
        if self._blame.needs_digest(body):
            body.digest = await request.payload.digest()
        try:
            self._blame.check(body)
        except ApiError:
            self._metrics.blamed.labels(body.model, "again").inc()
            raise

    def is_taken(self, request: RequestState, node: str) -> bool:
        """Whether a suspect has to wait there for another one's turn to end; `freed` waits for it."""
        return self._blame.is_taken(_body(request), node, self._waited_s(request))

    async def freed(self, request: RequestState) -> None:
        """Wait until a turn is over, or the request has waited for long enough."""
        if request.waits_since is None:
            request.waits_since = request.loop.time()
        await self._blame.freed(self._waited_s(request))

    @staticmethod
    def _waited_s(request: RequestState) -> float:
        return 0.0 if request.waits_since is None else request.loop.time() - request.waits_since

    def begin(self, request: RequestState, lease: Lease) -> None:
        """A suspect is tried on a node: `request.trial`, if it is one."""
        request.waits_since = None
        trial = request.trial = self._blame.begin(_body(request), _life(lease))
        if trial is not None and trial.turn_s is not None:
            trial.turn = request.loop.call_later(trial.turn_s, trial.turn_is_over)

    def end(self, request: RequestState) -> None:
        """The try has ended, however; the process it was tried on goes on."""
        trial, request.trial = request.trial, None
        if trial is not None:
            trial.leave()

    async def found(self, request: RequestState, lease: Lease) -> None:
        """A neuron has found out by itself that the request ends its engine."""
        lease.discard()
        body = await self._digested(request)
        self._blame.remember(body)
        self._metrics.blamed.labels(body.model, "engine").inc()

    async def ended(self, request: RequestState, lease: Lease, how: Unanswered, lived_s: float) -> NoReturn:
        """A try has ended without anything of an answer. Raises where the request goes, or what ends it."""
        life = _life(lease)
        if how.settle is not None and not await self._poller.has_ended(life.node, life.generation):
            how.settle()
        lease.discard()  # whatever it answered
        what = "node" if how.engine is None else "the engine of node"
        logger.warning("request %s: %s %s ended under it after %.1f s", request.request_id, what, life.node, lived_s)
        body = await self._digested(request)
        trial = self._give_up(request)
        if self._blame.died(body, trial, life._replace(engine=how.engine), lived_s):
            self._metrics.blamed.labels(body.model, "died").inc()
            raise self._blame.error(body) from how.__cause__
        raise (StaleRoute if request.stream is None else BrokenStream) from how.__cause__

    @staticmethod
    def _give_up(request: RequestState) -> Trial | None:
        """The trial that a process ended under: it stays in that one's path, for those who ended with it."""
        trial, request.trial = request.trial, None
        if trial is not None and trial.turn is not None:
            trial.turn.cancel()
        return trial

    @staticmethod
    async def _digested(request: RequestState) -> Body:
        body = _body(request)
        if body.digest is None:
            body.digest = await request.payload.digest()
        return body


def _body(request: RequestState) -> Body:
    if request.known_as is None:
        assert request.resolved is not None
        request.known_as = Body(request.resolved, request.payload.num_bytes)
    return request.known_as


def _life(lease: Lease) -> Life:
    return Life(lease.neuron.name, lease.generation)
