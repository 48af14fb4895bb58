"""Keys and budgets in PostgreSQL, for several gateways that share them. Needs the extra `postgres` (asyncpg).

Decisions about one key take an advisory lock for their transaction: they happen one after another, whichever gateway
asks, and those about different keys do not wait for each other. The date is the database's, whatever the gateways'
hosts believe; where it jumps, decisions wait for the one who carries use over the jump (`store_time`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from cortex_core.entitlements import KeyEntry

from cortex_gateway.identity.clock import SYSTEM_CLOCK, Clock
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
from cortex_gateway.identity.store_time import Kept, Moment, Reading, Timekeeper, Told, carried

T = TypeVar("T")

COMMAND_TIMEOUT_S = 5.0
LOCK_SPACE = 0x636F7274
"""First half of our advisory locks' keys ("cort"), so that they meet nobody else's in the same database."""
MIGRATION_LOCK = 0
TIME_SPACE = LOCK_SPACE + 1
"""Of the lock on the store's time: shared by decisions, taken alone by whoever changes it."""

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
CREATE TABLE IF NOT EXISTS cortex_clock (
    one int PRIMARY KEY CHECK (one = 1),
    steady_ms bigint NOT NULL,
    calendar_ms bigint NOT NULL,
    elapsed_ms bigint NOT NULL,
    boot text NOT NULL
);
"""

LOCK_KEY = "SELECT pg_advisory_xact_lock($1::int, hashtext($2::text))"
ADD_KEY = "INSERT INTO cortex_keys VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING RETURNING key_id"
KEYS = "SELECT entry, created_ms, expires_ms, revoked_ms FROM cortex_keys ORDER BY created_ms, key_id"
REVOKE = "UPDATE cortex_keys SET revoked_ms = $1 WHERE key_id = $2 AND revoked_ms IS NULL RETURNING key_id"
CHANGED = "UPDATE cortex_changes SET num_changes = num_changes + 1"
VERSION = "SELECT num_changes FROM cortex_changes"
BOOKED = "SELECT budget, slot, amount FROM cortex_booked WHERE key_id = $1"
RESERVED = (
    "SELECT budget, sum(amount)::bigint FROM cortex_holds "
    "WHERE key_id = $1 AND (expires_ms > $2 OR owner = $3) GROUP BY budget"
)
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
UNBOOK = "DELETE FROM cortex_booked WHERE key_id = $1 AND budget = $2 AND slot = $3"
USAGE = "SELECT key_id, budget, slot, amount FROM cortex_booked"
LOCK_TIME_SHARED = f"SELECT pg_advisory_xact_lock_shared({TIME_SPACE}, 0)"
LOCK_TIME = f"SELECT pg_advisory_xact_lock({TIME_SPACE}, 0)"
WALL = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
LOOK = "SELECT {wall}, steady_ms, calendar_ms, elapsed_ms, boot FROM (SELECT) AS now LEFT JOIN cortex_clock ON true"
KEEP = (
    "INSERT INTO cortex_clock VALUES (1, $1, $2, $3, $4) ON CONFLICT (one) DO UPDATE SET "
    "steady_ms = excluded.steady_ms, calendar_ms = excluded.calendar_ms, "
    "elapsed_ms = excluded.elapsed_ms, boot = excluded.boot"
)
MAX_JUMPS = 4
"""In the middle of one decision; then the database's clock is not fit to decide by."""


class PostgresStore:
    """A `Store` in the database that `url` names."""

    _look = LOOK.format(wall=WALL)

    def __init__(self, url: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._url = url
        self._clock = clock
        self._time = Timekeeper()
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
        await self._set_time()

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

    async def moment(self) -> Moment:
        async def none(connection: Any, now: Moment) -> Moment:
            return now

        return await self._timed(none)

    async def reserve(self, hold: Hold) -> Refused | None:
        async def reserve(connection: Any, now: Moment) -> Refused | None:
            booked = [tuple(row) for row in await connection.fetch(BOOKED, hold.key_id)]
            rows = await connection.fetch(RESERVED, hold.key_id, now.steady_ms, hold.owner)
            refused = decide(hold.shares, booked, {row[0]: row[1] for row in rows}, now)
            if refused is None:
                expires_ms = now.steady_ms + hold.ttl_ms
                for share in hold.shares:
                    await connection.execute(
                        RESERVE, hold.hold_id, share.budget, hold.key_id, hold.owner, share.amount, expires_ms
                    )
            return refused

        return await self._timed(reserve, hold.key_id)

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        async def settle(connection: Any, now: Moment) -> None:
            for settlement in settlements:
                key_id = settlement.key_id
                for share in settlement.shares:
                    was_held = await connection.fetchval(RELEASE, settlement.hold_id, share.budget)
                    if was_held is None or not share.amount:
                        continue
                    slots, now_ms = share.slots, now.of(share.slots)
                    await connection.execute(BOOK, key_id, share.budget, slots.at(now_ms), share.amount)
                    await connection.execute(FORGET_BOOKED, key_id, share.budget, slots.oldest(now_ms))

        # The locks keep a reservation from being decided between a release and the booking that replaces it.
        await self._timed(settle, *(settlement.key_id for settlement in settlements))

    async def renew(self, owner: str, ttl_ms: int) -> None:
        async def renew(connection: Any, now: Moment) -> None:
            await connection.execute(RENEW, now.steady_ms + ttl_ms, owner)
            await connection.execute(FORGET_HOLDS, now.steady_ms - FORGET_HOLDS_AFTER_MS)

        await self._timed(renew)

    async def usage(self) -> list[BookedUse]:
        async with self._transaction() as connection:
            return [BookedUse(*row) for row in await connection.fetch(USAGE)]

    # ------------------------------------------------------------------------------------------ time

    async def _timed(self, work: Callable[[Any, Moment], Awaitable[T]], *keys: str) -> T:
        """`work` in a transaction of its own with the locks of `keys`, during which nobody changes the time."""
        for _ in range(MAX_JUMPS):
            async with self._transaction(*keys) as connection:
                await connection.execute(LOCK_TIME_SHARED)
                told = await self._told(connection)
                if told.carried_from is None and not told.is_due:
                    found = await work(connection, told.moment)
                    self._time.agree(told)
                    return found
            await self._set_time()
        raise StoreError("PostgreSQL: the database's clock does not stay as it is")

    async def _set_time(self) -> None:
        """Write down what time it is, and carry use over a jump. Alone: no decision is under way meanwhile."""
        async with self._transaction() as connection:
            await connection.execute(LOCK_TIME)
            told = await self._told(connection)
            if told.carried_from is not None:
                await _carry(connection, told)
            await connection.execute(KEEP, *told.kept)
        self._time.agree(told)

    async def _told(self, connection: Any) -> Told:
        # How long the answer took is less than `JUMP_MS`: the command would have timed out.
        wall_ms, *row = await connection.fetchrow(self._look)
        kept = None if row[0] is None else Kept(*row)
        return self._time.tell(kept, Reading(wall_ms, self._clock.elapsed_ms(), self._clock.boot))


async def _carry(connection: Any, told: Told) -> None:
    """After a jump of the calendar: every use into the slot where it counts now."""
    rows = [tuple(row) for row in await connection.fetch(USAGE)]
    moves = [(key, budget, slot, carried(budget, slot, told), amount) for key, budget, slot, amount in rows]
    moves = [move for move in moves if move[2] != move[3]]
    # All are taken out before any is put back: a slot may be left by one and entered by another.
    await connection.executemany(UNBOOK, [(key, budget, slot) for key, budget, slot, _, _ in moves])
    booked = [(key, budget, now, amount) for key, budget, _, now, amount in moves if now is not None]
    await connection.executemany(BOOK, booked)
