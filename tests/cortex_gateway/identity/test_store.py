"""What every store promises: budgets that are never overshot, and keys."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from cortex_gateway.identity.credentials import new_key
from cortex_gateway.identity.store import FORGET_HOLDS_AFTER_MS, KeyExists, MemoryStore, Refused, Store

from tests.cortex_gateway.identity.harness import TTL, hold, record, settlement

from .fake_clock import NOW, FakeClock


async def test_reservations_and_use_together_stay_within_the_cap(store: Store) -> None:
    assert await store.reserve(hold("a", 60)) is None
    refused = await store.reserve(hold("b", 41))
    assert refused is not None and refused.budget == "tokens/balance"
    assert refused.shortfall[:4] == (100, 0, 60, 41)
    assert await store.reserve(hold("c", 40)) is None
    await store.settle([settlement("a", 25)])
    assert await store.reserve(hold("d", 35)) is None
    refused = await store.reserve(hold("e", 1))
    assert refused is not None and (refused.shortfall.used, refused.shortfall.reserved) == (25, 75)
    assert await store.reserve(hold("other", 100, key="dev")) is None


async def test_all_budgets_are_taken_or_none(store: Store) -> None:
    refused = await store.reserve(hold("a", 50, 50, 50))
    assert refused is not None and refused.budget == "tokens/rolling/600"
    assert await store.reserve(hold("b", 100)) is None, "nothing of the refused one was kept"


async def test_settling_twice_books_once(store: Store) -> None:
    await store.reserve(hold("a", 60))
    for _ in range(2):
        await store.settle([settlement("a", 30)])
    await store.settle([settlement("never-held", 99)])
    assert [(used.key_id, used.budget, used.amount) for used in await store.usage()] == [("ci", "tokens/balance", 30)]


async def test_use_may_turn_out_larger_than_what_was_reserved_and_is_booked_as_it_was(store: Store) -> None:
    await store.reserve(hold("a", 10))
    await store.settle([settlement("a", 130)])
    refused = await store.reserve(hold("b", 1))
    assert refused is not None and (refused.shortfall.used, refused.shortfall.wait_ms) == (130, None)


async def test_a_reservation_left_by_a_dead_gateway_expires(store: Store, clock: FakeClock) -> None:
    await store.reserve(hold("dead", 100, owner="dead"))
    clock.pass_ms(TTL - 1)
    assert isinstance(await store.reserve(hold("a", 1)), Refused)
    clock.pass_ms(1)
    assert await store.reserve(hold("b", 100)) is None


async def test_renewed_reservations_live_on_and_only_their_owners(store: Store, clock: FakeClock) -> None:
    await store.reserve(hold("mine", 50, owner="me"))
    await store.reserve(hold("theirs", 50, owner="them"))
    clock.pass_ms(TTL // 2)
    await store.renew("me", TTL + TTL // 2)
    clock.pass_ms(TTL // 2)
    refused = await store.reserve(hold("a", 100))
    assert refused is not None and refused.shortfall.reserved == 50
    clock.pass_ms(TTL)
    assert await store.reserve(hold("b", 100)) is None


async def test_a_slow_gateway_still_books_what_an_expired_reservation_used(store: Store, clock: FakeClock) -> None:
    await store.reserve(hold("slow", 60))
    clock.pass_ms(TTL + 1)
    await store.renew("other", TTL)
    await store.settle([settlement("slow", 42)])
    assert [used.amount for used in await store.usage()] == [42]
    await store.reserve(hold("lost", 50))
    clock.pass_ms(TTL + FORGET_HOLDS_AFTER_MS + 1)
    await store.renew("other", TTL)
    await store.settle([settlement("lost", 42)])
    assert [used.amount for used in await store.usage()] == [42], "after a day it is forgotten"


async def test_a_gateway_that_stood_still_counts_its_own_reservations_and_brings_them_back(
    store: Store, clock: FakeClock
) -> None:
    """SIGSTOP, or a laptop that slept: its requests may have gone on at the neuron."""
    await store.reserve(hold("mine", 100, owner="me"))
    clock.pass_ms(10 * TTL)
    assert isinstance(await store.reserve(hold("more", 1, owner="me")), Refused)
    await store.renew("me", TTL)
    assert isinstance(await store.reserve(hold("theirs", 1, owner="them")), Refused)


async def test_windows_roll_and_old_slots_are_forgotten(store: Store, clock: FakeClock) -> None:
    for step in range(3):
        assert await store.reserve(hold(f"a{step}", 0, 0, 40)) is None
        assert isinstance(await store.reserve(hold(f"b{step}", 0, 0, 1)), Refused)
        await store.settle([settlement(f"a{step}", 0, 0, 40)])
        refused = await store.reserve(hold(f"c{step}", 0, 0, 1))
        assert refused is not None and refused.shortfall.wait_ms is not None
        assert 600_000 <= refused.shortfall.wait_ms <= 610_000
        clock.pass_ms(700_000)
    if not isinstance(store, MemoryStore):
        assert len(await store.usage()) == 1


async def test_requests_that_race_cannot_overshoot_together(store: Store) -> None:
    results = await asyncio.gather(*(store.reserve(hold(str(number), 7)) for number in range(40)))
    assert sum(result is None for result in results) == 100 // 7


async def test_keys_are_added_listed_and_revoked(store: Store) -> None:
    version = await store.version()
    secret = new_key()
    await store.add_key(record("ci", secret))
    assert (after := await store.version()) != version
    for twin in (record("ci", "another"), record("dev", secret)):
        with pytest.raises(KeyExists):
            await store.add_key(twin)
    await store.add_key(msgspec.structs.replace(record("dev", "x", NOW + 1), expires_ms=NOW + 5))
    assert [kept.entry.name for kept in await store.keys()] == ["ci", "dev"]
    assert await store.keys() == [
        record("ci", secret),
        msgspec.structs.replace(record("dev", "x", NOW + 1), expires_ms=NOW + 5),
    ]
    assert await store.revoke_key("ci", NOW + 2)
    assert not await store.revoke_key("ci", NOW + 3)
    assert not await store.revoke_key("nobody", NOW)
    ci, dev = await store.keys()
    assert (ci.revoked_ms, ci.is_valid(NOW), dev.is_valid(NOW), dev.is_valid(NOW + 5)) == (NOW + 2, False, True, False)
    assert await store.version() != after
