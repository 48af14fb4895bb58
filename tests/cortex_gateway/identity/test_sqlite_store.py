"""A store in a file: decisions equal to those of memory, and what the file shows."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
import stat
import tempfile
from pathlib import Path

import pytest
from cortex_gateway.identity.credentials import new_key
from cortex_gateway.identity.sqlite_store import SqliteStore
from cortex_gateway.identity.store import MemoryStore, StoreError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cortex_gateway.identity.harness import TTL, hold, record, settlement

from .fake_clock import FakeClock

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
