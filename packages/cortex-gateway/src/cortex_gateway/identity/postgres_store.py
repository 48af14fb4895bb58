"""Keys and budgets in PostgreSQL, for several gateways that share them. Needs the extra `postgres` (asyncpg).

Decisions about one key take an advisory lock for their transaction: they happen one after another, whichever gateway
asks, and those about different keys do not wait for each other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from cortex_core.entitlements import KeyEntry

from cortex_gateway.identity.store import (
    FORGET_HOLDS_AFTER_MS,
    BookedUse,
    Hold,
    KeyExists,
    KeyRecord,
    Refused,
    Settlement,
    StoreError,
    decide,
)

COMMAND_TIMEOUT_S = 5.0
LOCK_SPACE = 0x636F7274
"""First half of our advisory locks' keys ("cort"), so that they meet nobody else's in the same database."""
MIGRATION_LOCK = 0

SCHEMA = """
CREATE TABLE IF NOT EXISTS cortex_keys (
    key_id text PRIMARY KEY,
    digest bytea NOT NULL UNIQUE,
    entry text NOT NULL,
    created_ms bigint NOT NULL,
    expires_ms bigint,
    revoked_ms bigint
);
CREATE TABLE IF NOT EXISTS cortex_holds (
    hold_id text NOT NULL,
    budget text NOT NULL,
    key_id text NOT NULL,
    owner text NOT NULL,
    amount bigint NOT NULL,
    expires_ms bigint NOT NULL,
    PRIMARY KEY (hold_id, budget)
);
CREATE INDEX IF NOT EXISTS cortex_holds_by_key ON cortex_holds (key_id);
CREATE INDEX IF NOT EXISTS cortex_holds_by_owner ON cortex_holds (owner);
CREATE TABLE IF NOT EXISTS cortex_booked (
    key_id text NOT NULL,
    budget text NOT NULL,
    slot bigint NOT NULL,
    amount bigint NOT NULL,
    PRIMARY KEY (key_id, budget, slot)
);
CREATE TABLE IF NOT EXISTS cortex_changes (num_changes bigint NOT NULL);
INSERT INTO cortex_changes SELECT 0 WHERE NOT EXISTS (SELECT FROM cortex_changes);
"""

LOCK_KEY = "SELECT pg_advisory_xact_lock($1::int, hashtext($2::text))"
ADD_KEY = "INSERT INTO cortex_keys VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING RETURNING key_id"
KEYS = "SELECT entry, created_ms, expires_ms, revoked_ms FROM cortex_keys ORDER BY created_ms, key_id"
REVOKE = "UPDATE cortex_keys SET revoked_ms = $1 WHERE key_id = $2 AND revoked_ms IS NULL RETURNING key_id"
CHANGED = "UPDATE cortex_changes SET num_changes = num_changes + 1"
VERSION = "SELECT num_changes FROM cortex_changes"
BOOKED = "SELECT budget, slot, amount FROM cortex_booked WHERE key_id = $1"
RESERVED = "SELECT budget, sum(amount)::bigint FROM cortex_holds WHERE key_id = $1 AND expires_ms > $2 GROUP BY budget"
RESERVE = (
    "INSERT INTO cortex_holds (hold_id, budget, key_id, owner, amount, expires_ms) VALUES ($1, $2, $3, $4, $5, $6)"
)
RELEASE = "DELETE FROM cortex_holds WHERE hold_id = $1 AND budget = $2 RETURNING amount"
BOOK = (
    "INSERT INTO cortex_booked AS was VALUES ($1, $2, $3, $4) "
    "ON CONFLICT (key_id, budget, slot) DO UPDATE SET amount = was.amount + excluded.amount"
)
FORGET_BOOKED = "DELETE FROM cortex_booked WHERE key_id = $1 AND budget = $2 AND slot < $3"
RENEW = "UPDATE cortex_holds SET expires_ms = $1 WHERE owner = $2"
FORGET_HOLDS = "DELETE FROM cortex_holds WHERE expires_ms < $1"
USAGE = "SELECT key_id, budget, slot, amount FROM cortex_booked"


class PostgresStore:
    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: Any = None

    async def open(self) -> None:
        try:
            import asyncpg
        except ImportError as exc:
            raise StoreError("PostgreSQL needs the extra: pip install 'helexa-cortex-gateway[postgres]'") from exc
        # `asyncpg.InterfaceError` is what it raises for misuse and for a closed pool; the others are the server's.
        self._errors = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
        async with self._reported():
            self._pool = await asyncpg.create_pool(
                self._url, min_size=1, max_size=4, command_timeout=COMMAND_TIMEOUT_S, timeout=COMMAND_TIMEOUT_S
            )
        async with self._transaction() as connection:
            # Gateways that start together: `IF NOT EXISTS` alone can still collide.
            await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {MIGRATION_LOCK})")
            await connection.execute(SCHEMA)

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    @asynccontextmanager
    async def _reported(self) -> AsyncIterator[None]:
        """Its messages name no password: only the class and what the server said are passed on."""
        try:
            yield
        except self._errors as exc:
            raise StoreError(f"PostgreSQL: {type(exc).__name__}: {exc}") from exc

    @asynccontextmanager
    async def _transaction(self, *keys: str) -> AsyncIterator[Any]:
        """One connection, one transaction, with the locks of `keys` taken in one order everywhere."""
        if self._pool is None:
            raise StoreError("PostgreSQL: not connected")
        async with (
            self._reported(),
            self._pool.acquire(timeout=COMMAND_TIMEOUT_S) as connection,
            connection.transaction(),
        ):
            for key_id in sorted(set(keys)):
                await connection.execute(LOCK_KEY, LOCK_SPACE, key_id)
            yield connection

    # ------------------------------------------------------------------------------------------ keys

    async def version(self) -> int:
        async with self._transaction() as connection:
            return int(await connection.fetchval(VERSION))

    async def keys(self) -> list[KeyRecord]:
        async with self._transaction() as connection:
            rows = await connection.fetch(KEYS)
        return [KeyRecord(msgspec.json.decode(entry, type=KeyEntry), *times) for entry, *times in map(tuple, rows)]

    async def add_key(self, record: KeyRecord) -> None:
        entry = record.entry
        document = msgspec.json.encode(entry).decode()
        times = (record.created_ms, record.expires_ms, record.revoked_ms)
        async with self._transaction() as connection:
            if await connection.fetchval(ADD_KEY, entry.name, entry.digest, document, *times) is None:
                raise KeyExists(entry.name)
            await connection.execute(CHANGED)

    async def revoke_key(self, key_id: str, now_ms: int) -> bool:
        async with self._transaction() as connection:
            is_revoked = await connection.fetchval(REVOKE, now_ms, key_id) is not None
            if is_revoked:
                await connection.execute(CHANGED)
        return is_revoked

    # ------------------------------------------------------------------------------------------ budgets

    async def reserve(self, hold: Hold, now_ms: int) -> Refused | None:
        async with self._transaction(hold.key_id) as connection:
            booked = [tuple(row) for row in await connection.fetch(BOOKED, hold.key_id)]
            reserved = {row[0]: row[1] for row in await connection.fetch(RESERVED, hold.key_id, now_ms)}
            refused = decide(hold.shares, booked, reserved, now_ms)
            if refused is None:
                for share in hold.shares:
                    await connection.execute(
                        RESERVE, hold.hold_id, share.budget, hold.key_id, hold.owner, share.amount, hold.expires_ms
                    )
        return refused

    async def settle(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        # The locks keep a reservation from being decided between a release and the booking that replaces it.
        async with self._transaction(*(settlement.key_id for settlement in settlements)) as connection:
            for settlement in settlements:
                key_id = settlement.key_id
                for share in settlement.shares:
                    was_held = await connection.fetchval(RELEASE, settlement.hold_id, share.budget)
                    if was_held is None or not share.amount:
                        continue
                    await connection.execute(BOOK, key_id, share.budget, share.slots.at(now_ms), share.amount)
                    await connection.execute(FORGET_BOOKED, key_id, share.budget, share.slots.oldest(now_ms))

    async def renew(self, owner: str, expires_ms: int, now_ms: int) -> None:
        async with self._transaction() as connection:
            await connection.execute(RENEW, expires_ms, owner)
            await connection.execute(FORGET_HOLDS, now_ms - FORGET_HOLDS_AFTER_MS)

    async def usage(self) -> list[BookedUse]:
        async with self._transaction() as connection:
            return [BookedUse(*row) for row in await connection.fetch(USAGE)]
