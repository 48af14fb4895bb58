"""A real PostgreSQL for the tests that want one, where this machine has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cortex_gateway.identity.sqlite_store import SqliteStore
from cortex_gateway.identity.store import MemoryStore, Store

from .fake_clock import FakeClock
from .postgres_server import PostgresMissing, PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    pytest.importorskip("asyncpg", reason="the extra `postgres` (asyncpg) is not installed")
    try:
        server = PostgresServer()
    except PostgresMissing as missing:
        pytest.skip(str(missing))
    yield server
    server.stop()


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
