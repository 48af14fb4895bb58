"""The one owner of the fleet snapshot. Everything that changes it is an event applied here, in one step."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from cortex_core.gateway_config import BreakerSection, NeuronEntry

from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.breaker import Breaker, Breakers
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex_gateway.fleet.transitions import FleetEvent, reduce, with_neurons

logger = logging.getLogger(__name__)

DEFAULT_BREAKER = BreakerSection()


class UnderWay(Protocol):
    """A request, or whatever else goes on on a node."""

    def node_is_lost(self) -> None:
        """The node does not answer any more."""
        ...


class Fleet:
    """Holds the snapshot and the activity beside it, and wakes whoever waits for a change.

    `apply` runs to its end without yielding, so no two events interleave and no reader sees half of one.
    """

    def __init__(
        self, neurons: tuple[NeuronEntry, ...], activity: Activity, breaker: BreakerSection = DEFAULT_BREAKER
    ) -> None:
        self.snapshot = with_neurons(FleetSnapshot(), neurons)
        self.activity = activity
        self.breakers = Breakers(breaker, self._breaker_changed)
        self._changed: asyncio.Future[None] | None = None
        self.has_waiters = False
        self.under_way: dict[str, set[UnderWay]] = {}
        """What this gateway has under way on each node."""

    def apply(self, event: FleetEvent) -> None:
        before = self.snapshot
        after = reduce(before, event)
        if after is before:
            return
        self.snapshot = after
        _log_health(before.nodes[event.node], after.nodes[event.node])
        _log_models(before.nodes[event.node], after.nodes[event.node])
        if is_lost(before.nodes[event.node], after.nodes[event.node]):
            for each in tuple(self.under_way.get(event.node, ())):
                each.node_is_lost()
        self.wake()

    def reconfigure(self, neurons: tuple[NeuronEntry, ...], breaker: BreakerSection) -> None:
        """Know these neurons from now on. Everyone looks again: the version changes even where the nodes do not."""
        before = self.snapshot
        self.snapshot = after = with_neurons(before, neurons)
        self.breakers.settings = breaker
        for name, node in before.nodes.items():
            if after.nodes.get(name) is not node:
                self.activity.forget(name)
                self.breakers.forget_absent(name, frozenset())
        self.wake()

    def _breaker_changed(self, node: str, model: str, breaker: Breaker) -> None:
        if breaker.state == "open":
            logger.warning("%s on %s failed %d times in a row: no requests for a while", model, node, breaker.failures)
        elif breaker.state == "closed":
            logger.info("%s on %s answers again", model, node)
        self.wake()

    def wake(self) -> None:
        """Let waiters look again: the snapshot changed, or a busy model became free."""
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None
            self.has_waiters = False

    def changed(self) -> asyncio.Future[None]:
        """To be awaited: done at the next change after this call, whenever it is awaited."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
            self.has_waiters = True
        return asyncio.shield(self._changed)


def is_lost(before: NodeSnapshot, after: NodeSnapshot) -> bool:
    """Whether the node has fallen silent, as one that is stopped or cut off does. A process that has ended says so by
    itself, on each of its connections."""
    return before.is_routable and after.health == "unhealthy" and not after.is_gone


def _log_health(before: NodeSnapshot, after: NodeSnapshot) -> None:
    if before.health == after.health:
        return
    if after.health == "healthy":
        logger.info("node %s is healthy (was %s)", after.name, before.health)
    elif after.health == "refusing":
        logger.warning("node %s refuses this gateway (%s): %s", after.name, after.refusal, after.last_error)
    else:
        logger.warning(
            "node %s is %s after %d missed polls: %s", after.name, after.health, after.misses, after.last_error
        )


def _log_models(before: NodeSnapshot, after: NodeSnapshot) -> None:
    """Say once, not per request, that a model turned bad."""
    if before.models is after.models:
        return
    for model, info in after.models.items():
        was = before.models.get(model)
        if info.status == "failed" and (was is None or was.status != "failed"):
            logger.warning("model %s failed on %s: %s", model, after.name, info.error or "no cause given")
        if not after.is_servable(model) and (was is None or before.is_servable(model)):
            servable = info.servable
            assert servable is not None
            logger.warning(
                "model %s on %s cannot be served: %s %s", model, after.name, servable.reason, servable.detail
            )
