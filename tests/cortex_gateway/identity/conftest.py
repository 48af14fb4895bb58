"""A real PostgreSQL for the tests that want one, where this machine has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
