"""Keys and budgets in one SQLite file: the default where something is to be kept.

All of it runs in one thread of its own: SQLite blocks, and an event loop must not. Several processes may share the
file (gateways of one host, the command line): each decision is one immediate transaction, at the file's own time
(`store_time`). The journal is a write-ahead log that is synchronised at checkpoints, so a crash of the process loses
nothing and a crash of the host at most the last moments.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

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

BUSY_TIMEOUT_S = 5.0
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE keys (
    key_id TEXT PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    entry TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    revoked_ms INTEGER
) STRICT;
CREATE TABLE holds (
    hold_id TEXT NOT NULL,
    budget TEXT NOT NULL,
    key_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    amount INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    PRIMARY KEY (hold_id, budget)
) STRICT, WITHOUT ROWID;
CREATE INDEX holds_by_key ON holds (key_id);
CREATE TABLE booked (
    key_id TEXT NOT NULL,
    budget TEXT NOT NULL,
    slot INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    PRIMARY KEY (key_id, budget, slot)
) STRICT, WITHOUT ROWID;
CREATE TABLE changes (num_changes INTEGER NOT NULL) STRICT;
INSERT INTO changes VALUES (0);
"""
CLOCK_TABLE = """
CREATE TABLE IF NOT EXISTS clock (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    steady_ms INTEGER NOT NULL,
    calendar_ms INTEGER NOT NULL,
    elapsed_ms INTEGER NOT NULL,
    boot TEXT NOT NULL
) STRICT
"""
"""Beside the schema, whose version stays: older gateways do not know the table and need not."""

ADD_KEY = "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)"
KEYS = "SELECT entry, created_ms, expires_ms, revoked_ms FROM keys ORDER BY created_ms, key_id"
REVOKE = "UPDATE keys SET revoked_ms = ? WHERE key_id = ? AND revoked_ms IS NULL"
CHANGED = "UPDATE changes SET num_changes = num_changes + 1"
BOOKED = "SELECT budget, slot, amount FROM booked WHERE key_id = ?"
RESERVED = "SELECT budget, sum(amount) FROM holds WHERE key_id = ? AND (expires_ms > ? OR owner = ?) GROUP BY budget"
RESERVE = "INSERT INTO holds (hold_id, budget, key_id, owner, amount, expires_ms) VALUES (?, ?, ?, ?, ?, ?)"
RELEASE = "DELETE FROM holds WHERE hold_id = ? AND budget = ?"
BOOK = (
    "INSERT INTO booked VALUES (?, ?, ?, ?) "
    "ON CONFLICT (key_id, budget, slot) DO UPDATE SET amount = amount + excluded.amount"
)
FORGET_BOOKED = "DELETE FROM booked WHERE key_id = ? AND budget = ? AND slot < ?"
RENEW = "UPDATE holds SET expires_ms = ? WHERE owner = ?"
FORGET_HOLDS = "DELETE FROM holds WHERE expires_ms < ?"
UNBOOK = "DELETE FROM booked WHERE key_id = ? AND budget = ? AND slot = ?"
KEPT = "SELECT steady_ms, calendar_ms, elapsed_ms, boot FROM clock"
KEEP = "INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?, ?)"
USAGE = "SELECT key_id, budget, slot, amount FROM booked"


class SqliteStore:
    """A `Store` in the file at `path`, on a thread of its own."""

    def __init__(self, path: Path | str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._path = Path(path)
        self._clock = clock
        self._time = Timekeeper()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._connection: sqlite3.Connection

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(f"{self._path}: {exc}") from exc

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    @contextmanager
    def _timed(self) -> Iterator[tuple[sqlite3.Connection, Moment]]:
        """A transaction, and what time it is in it."""
        clock = self._clock
        with self._transaction() as connection:
            row = connection.execute(KEPT).fetchone()
            reading = Reading(clock.wall_ms(), clock.elapsed_ms(), clock.boot)
            told = self._time.tell(None if row is None else Kept(*row), reading)
            if told.carried_from is not None:
                _carry(connection, told)
            if told.is_due:
                connection.execute(KEEP, told.kept)
            yield connection, told.moment
        self._time.agree(told)

    # ------------------------------------------------------------------------------------------ lifespan

    async def open(self) -> None:
        """Creates the file, readable by its owner only. Raises `StoreError`, also for one of a newer version."""
        await self._run(self._open)

    def _open(self) -> None:
        # SQLite gives its journals the mode of the file, so this is the one place to set it.
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        # The executor has one thread, which is this one: nothing else ever touches the connection.
        self._connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=True
        )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        with self._transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"schema version {version} is newer than {SCHEMA_VERSION}")
            if version == 0:
                for statement in SCHEMA.strip().split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute(CLOCK_TABLE)
        with self._timed():
            pass

    async def close(self) -> None:
        await self._run(self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()

    # ------------------------------------------------------------------------------------------ keys

    async def version(self) -> int:
        return await self._run(self._version)

    def _version(self) -> int:
        (num_changes,) = self._connection.execute("SELECT num_changes FROM changes").fetchone()
        return int(num_changes)

    async def keys(self) -> list[KeyRecord]:
        rows = await self._run(lambda: self._connection.execute(KEYS).fetchall())
        return [KeyRecord(msgspec.json.decode(entry, type=KeyEntry), *times) for entry, *times in rows]

    async def add_key(self, record: KeyRecord) -> None:
        await self._run(lambda: self._add_key(record))

    def _add_key(self, record: KeyRecord) -> None:
        entry = record.entry
        document = msgspec.json.encode(entry).decode()
        times = (record.created_ms, record.expires_ms, record.revoked_ms)
        try:
            with self._transaction() as connection:
                connection.execute(ADD_KEY, (entry.name, entry.digest, document, *times))
                connection.execute(CHANGED)
        except sqlite3.IntegrityError as exc:
            raise KeyExists(entry.name) from exc

    async def revoke_key(self, key_id: str, now_ms: int) -> bool:
        return await self._run(lambda: self._revoke_key(key_id, now_ms))

    def _revoke_key(self, key_id: str, now_ms: int) -> bool:
        with self._transaction() as connection:
            is_revoked = connection.execute(REVOKE, (now_ms, key_id)).rowcount > 0
            if is_revoked:
                connection.execute(CHANGED)
        return is_revoked

    # ------------------------------------------------------------------------------------------ budgets

    async def moment(self) -> Moment:
        return await self._run(self._moment)

    def _moment(self) -> Moment:
        with self._timed() as (_, now):
            return now

    async def reserve(self, hold: Hold) -> Refused | None:
        return await self._run(lambda: self._reserve(hold))

    def _reserve(self, hold: Hold) -> Refused | None:
        with self._timed() as (connection, now):
            booked = connection.execute(BOOKED, (hold.key_id,)).fetchall()
            reserved = dict(connection.execute(RESERVED, (hold.key_id, now.steady_ms, hold.owner)).fetchall())
            refused = decide(hold.shares, booked, reserved, now)
            if refused is None:
                expires_ms = now.steady_ms + hold.ttl_ms
                connection.executemany(
                    RESERVE,
                    [
                        (hold.hold_id, share.budget, hold.key_id, hold.owner, share.amount, expires_ms)
                        for share in hold.shares
                    ],
                )
        return refused

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        await self._run(lambda: self._settle(settlements))

    def _settle(self, settlements: Sequence[Settlement]) -> None:
        with self._timed() as (connection, now):
            for settlement in settlements:
                key_id = settlement.key_id
                for share in settlement.shares:
                    was_held = connection.execute(RELEASE, (settlement.hold_id, share.budget)).rowcount
                    if not was_held or not share.amount:
                        continue
                    slots, now_ms = share.slots, now.of(share.slots)
                    connection.execute(BOOK, (key_id, share.budget, slots.at(now_ms), share.amount))
                    connection.execute(FORGET_BOOKED, (key_id, share.budget, slots.oldest(now_ms)))

    async def renew(self, owner: str, ttl_ms: int) -> None:
        await self._run(lambda: self._renew(owner, ttl_ms))

    def _renew(self, owner: str, ttl_ms: int) -> None:
        with self._timed() as (connection, now):
            connection.execute(RENEW, (now.steady_ms + ttl_ms, owner))
            connection.execute(FORGET_HOLDS, (now.steady_ms - FORGET_HOLDS_AFTER_MS,))

    async def usage(self) -> list[BookedUse]:
        rows = await self._run(lambda: self._connection.execute(USAGE).fetchall())
        return [BookedUse(*row) for row in rows]


def _carry(connection: sqlite3.Connection, told: Told) -> None:
    """After a jump of the calendar: every use into the slot where it counts now."""
    rows = connection.execute(USAGE).fetchall()
    moves = [(key, budget, slot, carried(budget, slot, told), amount) for key, budget, slot, amount in rows]
    moves = [move for move in moves if move[2] != move[3]]
    # All are taken out before any is put back: a slot may be left by one and entered by another.
    connection.executemany(UNBOOK, [(key, budget, slot) for key, budget, slot, _, _ in moves])
    connection.executemany(
        BOOK, [(key, budget, now, amount) for key, budget, _, now, amount in moves if now is not None]
    )
