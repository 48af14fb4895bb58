"""Carries out the chores, one round every few seconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from cortex_gateway.fleet.state import Fleet
from cortex_gateway.fleet.transitions import DefragDone, DefragDue
from cortex_gateway.placement.loads import Loads
from cortex_gateway.placement.maintenance import BeginDefrag, EndDefrag, Recycle, UnloadIdle, plan_maintenance
from cortex_gateway.placement.state import PlacementState

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0


class MaintenanceLoop:
    """Does the chores, one round every `INTERVAL_S`."""

    def __init__(
        self, fleet: Fleet, loads: Loads, state: Callable[[], PlacementState], *, interval_s: float = INTERVAL_S
    ) -> None:
        self._fleet = fleet
        self._loads = loads
        self._state = state
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="upkeep")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def do_chores(self) -> list[asyncio.Task[None]]:
        """Start what is due; the operations belong to `Loads`."""
        state = self._state()
        started = []
        for chore in plan_maintenance(state):
            match chore:
                case BeginDefrag():
                    logger.info("node %s: recycling its models after many evictions, each once it is idle", chore.node)
                    self._fleet.apply(DefragDue(node=chore.node, at=state.now))
                case EndDefrag():
                    logger.info("node %s: all models recycled", chore.node)
                    self._fleet.apply(DefragDone(node=chore.node))
                case UnloadIdle():
                    logger.info("%s on %s has been idle for %.0f s", chore.model, chore.node, chore.idle_s)
                    started.append(self._loads.unload(chore.node, chore.model, reason="idle"))
                case Recycle():
                    logger.info("recycling %s on %s", chore.model, chore.node)
                    started.append(self._loads.recycle(chore.node, chore.model, chore.spec))
        return started

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self.do_chores()
