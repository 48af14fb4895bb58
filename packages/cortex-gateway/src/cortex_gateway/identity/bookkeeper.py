"""Reservations in the store on behalf of requests: taken while they wait, settled behind their back.

Whoever is cancelled while a reservation is being made gives it back; what was used is written by one task in batches,
so that no request waits for it; reservations are renewed while they live, and expire by themselves if this process
does not.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from contextlib import suppress
from functools import partial

from cortex_gateway.identity.store import Hold, Refused, Settlement, Share, Store, StoreError

logger = logging.getLogger(__name__)

RETRY_S = 1.0
FLUSH_S = 5.0
"""How long the last settlements may take when the gateway ends; what is left expires unbooked."""


class Bookkeeper:
    """Reservations of one gateway. ttl_s: how long one stays in the store without being renewed."""

    def __init__(self, store: Store, *, ttl_s: float) -> None:
        self._store = store
        self.ttl_s = ttl_s
        self._owner = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._live: set[str] = set()
        self._reserving: set[asyncio.Future[Refused | None]] = set()
        self._unsettled: list[Settlement] = []
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._renew())]

    async def stop(self) -> None:
        """Write what is settled, within `FLUSH_S`."""
        if self._reserving:
            await asyncio.wait(self._reserving, timeout=FLUSH_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self.written()
        if self._unsettled:
            logger.error("%d settlements could not be written; their reservations expire", len(self._unsettled))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []

    async def written(self) -> None:
        """Everything settled so far is in the store."""
        await self._written.wait()

    @property
    def _ttl_ms(self) -> int:
        return int(self.ttl_s * 1000)

    @property
    def num_live(self) -> int:
        """Reservations that are not settled yet."""
        return len(self._live)

    # ------------------------------------------------------------------------------------------ requests

    async def reserve(self, key_id: str, shares: tuple[Share, ...]) -> Hold | Refused:
        """All shares or none. Raises `StoreError`. Cancelled at any moment, it leaves nothing behind."""
        hold = Hold(f"{self._owner}-{next(self._numbers)}", key_id, self._owner, self._ttl_ms, shares)
        self._live.add(hold.hold_id)
        asking = asyncio.ensure_future(self._store.reserve(hold))
        self._reserving.add(asking)
        asking.add_done_callback(self._reserving.discard)
        try:
            refused = await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(partial(self._give_back, hold))
            raise
        except StoreError:
            # It may have been written all the same: the answer may be what got lost.
            self._release(hold)
            raise
        if refused is not None:
            self._live.discard(hold.hold_id)
            return refused
        return hold

    def settle(self, settlement: Settlement) -> None:
        self._unsettled.append(settlement)
        self._written.clear()
        self._wake.set()

    def _release(self, hold: Hold) -> None:
        shares = tuple(share._replace(amount=0) for share in hold.shares)
        self.settle(Settlement(hold.hold_id, hold.key_id, shares))

    def _give_back(self, hold: Hold, asked: asyncio.Future[Refused | None]) -> None:
        if not asked.cancelled() and asked.exception() is None and asked.result() is not None:
            self._live.discard(hold.hold_id)
            return
        self._release(hold)

    # ------------------------------------------------------------------------------------------ background

    async def _write(self) -> None:
        is_failing = False
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch = list(self._unsettled)
            if not batch:
                continue
            try:
                await self._store.settle(batch)
            except StoreError as error:
                if not is_failing:
                    logger.error("budgets cannot be settled, trying on: %s", error)
                is_failing = True
                self._wake.set()
                await asyncio.sleep(RETRY_S)
                continue
            is_failing = False
            del self._unsettled[: len(batch)]
            self._live.difference_update(settlement.hold_id for settlement in batch)
            if not self._unsettled:
                self._written.set()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_ms / 3000)
            if not self._live:
                continue
            try:
                await self._store.renew(self._owner, self._ttl_ms)
            except StoreError as error:
                logger.warning("reservations cannot be renewed: %s", error)
