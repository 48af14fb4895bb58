"""Choice of the store that a configuration names."""

from __future__ import annotations

from cortex_core.entitlements import EntitlementsSection

from cortex_gateway.identity.postgres_store import PostgresStore
from cortex_gateway.identity.sqlite_store import SqliteStore
from cortex_gateway.identity.store import MemoryStore, Store


def store_of(section: EntitlementsSection) -> Store:
    """Not opened yet."""
    if section.store == "memory":
        return MemoryStore()
    scheme, _, rest = section.store.partition(":")
    return SqliteStore(rest) if scheme == "sqlite" else PostgresStore(section.store)
