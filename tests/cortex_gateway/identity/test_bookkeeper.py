"""Reservations in a store: renewed while they live, settled behind the request's back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from cortex_core.entitlements import EntitlementsSection, Window
from cortex_core.errors import ApiError
from cortex_core.fleet import ContextLimit
from cortex_gateway.identity.bookkeeper import Bookkeeper
from cortex_gateway.identity.estimate import MeteredTokens
from cortex_gateway.identity.identity import Identity
from cortex_gateway.identity.store import Hold, MemoryStore, Refused, Settlement, Share, StoreError
from cortex_gateway.identity.windows import Slots

from tests.cortex_gateway.identity.harness import BODY, CAP, ENTRY, WINDOW

from .fake_clock import FakeClock


async def test_a_live_reservation_is_renewed_and_expires_with_its_gateway() -> None:
    renewed = asyncio.Event()

    class Watched(MemoryStore):
        async def renew(self, owner: str, ttl_ms: int) -> None:
            await super().renew(owner, ttl_ms)
            renewed.set()

    store = Watched()

    def gateway() -> Identity:
        section = EntitlementsSection(store="sqlite:unused", keys=(ENTRY,), reservation_ttl_s=0.6)
        limit = ContextLimit(context=CAP)
        return Identity(section, store, limit_of=lambda model: limit, cost_of=lambda model: None)

    body = json.dumps({"model": "m", "max_tokens": CAP}).encode()
    first, second = gateway(), gateway()
    for each in (first, second):
        await each.start()
    principal = await first.authenticate([(b"authorization", b"Bearer secret")])
    other = await second.authenticate([(b"authorization", b"Bearer secret")])
    assert principal is not None and other is not None
    await first.admit(principal, "m", "m", body, is_metered=True)
    for _ in range(4):  # longer than the reservation would live by itself
        renewed.clear()
        await renewed.wait()
    with pytest.raises(ApiError) as refused:
        await second.admit(other, "m", "m", body, is_metered=True)
    assert refused.value.code == "rate_limit_exceeded"
    for task in first.bookkeeper._tasks:
        task.cancel()  # as a kill -9 does: nothing is given back, and nobody renews
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(ApiError):
                grant = await second.admit(other, "m", "m", body, is_metered=True)
                break
            await asyncio.sleep(0.05)  # time itself is what is waited for
    grant.settle(MeteredTokens(1, 1))
    await second.stop()
    await first.stop()


async def test_settlements_that_cannot_be_written_are_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex_gateway.identity.bookkeeper.RETRY_S", 0.01)
    tried = asyncio.Event()

    class Broken(MemoryStore):
        is_broken = True

        async def settle(self, *arguments: Any) -> None:
            tried.set()
            if self.is_broken:
                raise StoreError("disk full")
            await super().settle(*arguments)

    store = Broken()
    identity = Identity(
        EntitlementsSection(store="sqlite:unused", keys=(ENTRY,)),
        store,
        limit_of=lambda model: ContextLimit(context=WINDOW),
        cost_of=lambda model: None,
    )
    await identity.start()
    principal = await identity.authenticate([(b"x-api-key", b"secret")])
    assert principal is not None
    (await identity.admit(principal, "m", "m", BODY, is_metered=True)).settle(MeteredTokens(10, 20))
    await tried.wait()
    assert identity.bookkeeper.num_live == 1 and await store.usage() == []
    store.is_broken = False
    await identity.bookkeeper.written()
    assert [used.amount for used in await store.usage()] == [30]
    await identity.stop()


class Slow(MemoryStore):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(FakeClock())
        self.asked, self.gate = asyncio.Event(), asyncio.Event()
        self.is_broken = False

    async def reserve(self, hold: Hold) -> Refused | None:
        self.asked.set()
        await self.gate.wait()
        refused = await super().reserve(hold)
        if self.is_broken:
            raise StoreError("the answer was lost")
        return refused


SHARES = (Share("b", Slots.of(Window()), CAP, 30),)


async def open_books(store: Slow) -> Bookkeeper:
    books = Bookkeeper(store, ttl_s=60)
    books.start()
    return books


async def test_who_is_cancelled_while_a_reservation_is_made_leaves_nothing_behind() -> None:
    store = Slow()
    books = await open_books(store)
    asking = asyncio.create_task(books.reserve("ci", SHARES))
    await store.asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert books.num_live == 1, "it may be written any moment"
    store.gate.set()
    await books.stop()
    assert books.num_live == 0 and not store._holds
    assert sum(used.amount for used in await store.usage()) == 0


async def test_where_the_answer_was_lost_what_may_have_been_written_is_given_back() -> None:
    store = Slow()
    store.gate.set()
    store.is_broken = True
    books = await open_books(store)
    with pytest.raises(StoreError):
        await books.reserve("ci", SHARES)
    await books.written()
    assert books.num_live == 0 and not store._holds
    await books.stop()


async def test_what_is_refused_holds_nothing_and_what_is_taken_is_live_until_it_is_settled() -> None:
    store = Slow()
    store.gate.set()
    books = await open_books(store)
    refused = await books.reserve("ci", (SHARES[0]._replace(amount=CAP + 1),))
    assert isinstance(refused, Refused) and books.num_live == 0
    hold = await books.reserve("ci", SHARES)
    assert isinstance(hold, Hold) and books.num_live == 1
    books.settle(Settlement(hold.hold_id, "ci", (SHARES[0]._replace(amount=12),)))
    await books.written()
    assert books.num_live == 0 and [used.amount for used in await store.usage()] == [12]
    await books.stop()
