"""Every store keeps the same promises: budgets are never overshot, no reservation outlives its request for good."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from cortex_core.entitlements import Budget, KeyEntry, Window
from cortex_gateway.identity.credentials import hash_text, new_key
from cortex_gateway.identity.postgres_store import PostgresStore
from cortex_gateway.identity.sqlite_store import SqliteStore
from cortex_gateway.identity.store import (
    FORGET_HOLDS_AFTER_MS,
    Hold,
    KeyExists,
    KeyRecord,
    MemoryStore,
    Refused,
    Settlement,
    Share,
    Store,
    StoreError,
)
from cortex_gateway.identity.windows import Slots
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fake_clock import NOW, FakeClock
from .postgres_server import PostgresServer

T = TypeVar("T")

TTL = 60_000
BUDGETS = (
    (Budget(tokens=100), 100),
    (Budget(tokens=60, window=Window("fixed", 3600)), 60),
    (Budget(tokens=40, window=Window("rolling", 600)), 40),
)


def shares(*amounts: int) -> tuple[Share, ...]:
    return tuple(
        Share(budget.name, Slots.of(budget.window), cap, amount)
        for (budget, cap), amount in zip(BUDGETS, amounts, strict=False)
    )


def hold(hold_id: str, *amounts: int, key: str = "ci", owner: str = "gw", ttl_ms: int = TTL) -> Hold:
    return Hold(hold_id, key, owner, ttl_ms, shares(*amounts))


def settlement(hold_id: str, *amounts: int, key: str = "ci") -> Settlement:
    return Settlement(hold_id, key, shares(*amounts))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> AsyncIterator[Store]:
    if request.param == "memory":
        opened: Store = MemoryStore(clock)
    elif request.param == "sqlite":
        opened = SqliteStore(tmp_path / "cortex.db", clock)
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        opened = server.new_store(clock)
    await opened.open()
    yield opened
    await opened.close()


# ---------------------------------------------------------------------------------------------- budgets


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


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "settle", "wait", "die", "set"]), st.integers(0, 60), st.integers(0, 400_000)
    ),
    max_size=40,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(STEPS)
def test_sqlite_decides_as_memory_does_and_neither_overshoots(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory(prefix="cortex-store-") as folder:
        asyncio.run(_compare(steps, Path(folder) / "cortex.db"))


async def _compare(steps: list[tuple[str, int, int]], path: Path) -> None:
    clock = FakeClock()
    memory, sqlite = MemoryStore(clock), SqliteStore(path, clock)
    await memory.open()
    await sqlite.open()
    try:
        held: dict[str, tuple[int, int]] = {}  # amount, until when it counts
        used: list[tuple[int, int]] = []
        for number, (what, amount, milliseconds) in enumerate(steps):
            name, now = str(number), clock.elapsed_ms()
            if what == "wait":
                clock.pass_ms(milliseconds)
            elif what == "set":
                clock.set_ms(10 * (milliseconds - 200_000))
            elif what == "reserve":
                asked = hold(name, amount, amount, amount, owner=name)
                first, second = await memory.reserve(asked), await sqlite.reserve(asked)
                assert first == second
                if first is None:
                    held[name] = (amount, now + TTL)
            elif held:
                name = sorted(held)[amount % len(held)]
                reserved, until = held.pop(name)
                if what == "settle":
                    real = min(amount, reserved)
                    for each in (memory, sqlite):
                        await each.settle([settlement(name, real, real, real)])
                    # An expired reservation was given away; only what lived is promised to fit.
                    used.append((now, real if until > now else 0))
            now = clock.elapsed_ms()
            live = sum(reserved for reserved, until in held.values() if until > now)
            assert sum(real for _, real in used) + live <= 100
            assert sum(real for when, real in used if when > now - 600_000) + live <= 40
        for name in held:
            for each in (memory, sqlite):
                await each.settle([settlement(name, 0, 0, 0)])
        everything = hold("last", 0, 0, 0)
        assert await sqlite.reserve(everything) == await memory.reserve(everything)
    finally:
        await sqlite.close()


def _spend(path: str, owner: str, taken: multiprocessing.Queue[int]) -> None:
    async def spend() -> int:
        store = SqliteStore(path)
        await store.open()
        count = 0
        for number in range(60):
            name = f"{owner}-{number}"
            if await store.reserve(hold(name, 3, owner=owner)) is None:
                await store.settle([settlement(name, 1 if number % 2 else 3)])
                count += 1 if number % 2 else 3
        await store.close()
        return count

    taken.put(asyncio.run(spend()))


async def test_two_processes_share_one_file_and_cannot_overshoot(tmp_path: Path) -> None:
    path = str(tmp_path / "cortex.db")
    context = multiprocessing.get_context("spawn")
    taken: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_spend, args=(path, owner, taken)) for owner in ("a", "b")]
    for process in processes:
        process.start()
    total = sum([await asyncio.to_thread(taken.get, True, 120) for _ in processes])
    for process in processes:
        await asyncio.to_thread(process.join)
        assert process.exitcode == 0
    store = SqliteStore(path)
    await store.open()
    assert total == sum(used.amount for used in await store.usage())
    assert 98 <= total <= 100, "spent to the last request that fits"
    await store.close()


async def test_gateways_that_share_a_postgres_cannot_overshoot_together(postgres: PostgresServer) -> None:
    url = postgres.new_url()
    gateways = [PostgresStore(url) for _ in range(3)]
    await asyncio.gather(*(gateway.open() for gateway in gateways))  # all create the tables at once

    async def spend(gateway: PostgresStore, owner: str) -> int:
        count = 0
        for number in range(30):
            name = f"{owner}-{number}"
            if await gateway.reserve(hold(name, 3, owner=owner)) is None:
                real = 1 if number % 2 else 3
                await gateway.settle([settlement(name, real)])
                count += real
        return count

    spent = sum(await asyncio.gather(*(spend(gateway, str(number)) for number, gateway in enumerate(gateways))))
    assert spent == sum(used.amount for used in await gateways[0].usage())
    assert 98 <= spent <= 100, "spent to the last request that fits"
    for gateway in gateways:
        await gateway.close()


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """As the gateway does: what failed on a dead connection is tried on the next. A pool has four."""
    for _ in range(8):
        try:
            return await work()
        except StoreError:
            continue
    return await work()


async def test_a_postgres_that_restarts_is_found_again(postgres: PostgresServer) -> None:
    store = postgres.new_store()
    await store.open()
    await store.reserve(hold("a", 60))
    await asyncio.to_thread(postgres.restart)
    refused = await again(lambda: store.reserve(hold("b", 41)))
    assert refused is not None and refused.shortfall.reserved == 60, "it kept what it was told"
    await again(lambda: store.settle([settlement("a", 5)]))
    assert [used.amount for used in await again(store.usage)] == [5]
    await store.close()


async def test_a_postgres_that_is_not_there_says_so_without_its_password() -> None:
    pytest.importorskip("asyncpg", reason="the extra `postgres` (asyncpg) is not installed")
    with pytest.raises(StoreError) as raised:
        await PostgresStore("postgresql://cortex:hunter2@127.0.0.1:1/cortex").open()
    assert "hunter2" not in str(raised.value)


# ---------------------------------------------------------------------------------------------- keys


def record(name: str, secret: str, created_ms: int = NOW) -> KeyRecord:
    return KeyRecord(KeyEntry(key_id=name, hash=hash_text(secret), models=("a*",)), created_ms)


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


async def test_the_file_is_for_its_owner_only_and_holds_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "cortex.db"
    store = SqliteStore(path)
    await store.open()
    secret = new_key()
    await store.add_key(record("ci", secret))
    files = list(tmp_path.iterdir())
    assert {file.name for file in files} >= {"cortex.db", "cortex.db-wal"}
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert secret.encode() not in file.read_bytes()
    await store.close()
    assert secret.encode() not in path.read_bytes()


async def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        await SqliteStore(tmp_path / "missing" / "cortex.db").open()
    noise = tmp_path / "noise.db"
    noise.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        await SqliteStore(noise).open()
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer"):
        await SqliteStore(newer).open()
