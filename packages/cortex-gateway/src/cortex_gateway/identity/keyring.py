"""The keys that are valid now: those of the configuration and those of the store, by digest."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
from cortex_core.entitlements import HASH_PREFIX, KeyEntry

from cortex_gateway.identity.principal import KeyMeters, Principal
from cortex_gateway.identity.store import KeyRecord, Store, StoreError

logger = logging.getLogger(__name__)

MIN_REFRESH_INTERVAL_S = 0.2
"""A key nobody knows makes us look once more; clients with placeholder keys must not turn that into a flood."""


class Keyring:
    """Looked at for each request, refreshed in the background. The configuration's keys win over the store's."""

    def __init__(
        self,
        configured: Sequence[KeyEntry],
        store: Store,
        *,
        now_ms: Callable[[], int],
        refresh_s: float,
        on_change: Callable[[Mapping[bytes, Principal]], None] = lambda principals: None,
    ) -> None:
        """on_change: told who is known, by digest, whenever that may have changed."""
        self._configured = tuple(configured)
        self._store = store
        self._now_ms = now_ms
        self._refresh_s = refresh_s
        self._on_change = on_change
        self._version: int | None = None
        self._looked_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._meters: dict[str, KeyMeters] = {}
        self._by_digest: dict[bytes, Principal] = {}
        self.is_stale = False
        """The store could not be asked last time: a key we do not know may be valid all the same."""
        self._records: Sequence[KeyRecord] = ()
        self._adopt()

    def adopt(self, configured: Sequence[KeyEntry], *, refresh_s: float) -> None:
        """The configuration has these keys now."""
        self._configured = tuple(configured)
        self._refresh_s = refresh_s
        self._adopt()

    def get(self, digest: bytes) -> Principal | None:
        principal = self._by_digest.get(digest)
        if principal is None or (principal.expires_ms is not None and principal.expires_ms <= self._now_ms()):
            return None
        return principal

    async def start(self) -> None:
        """Reads all keys. Raises `StoreError`."""
        await self._look()
        self._refreshing = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        for task in (self._refreshing, self._looking):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    async def look_again(self) -> None:
        """Before a key is called unknown: it may be new. All who ask at once share one look."""
        if time.monotonic() - self._looked_at < MIN_REFRESH_INTERVAL_S:
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._try_look())
        await asyncio.shield(self._looking)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            await self._try_look()

    async def _try_look(self) -> None:
        try:
            await self._look()
        except StoreError as error:
            if not self.is_stale:
                logger.warning("keys cannot be refreshed, using those known: %s", error)
            self.is_stale = True
            self._looked_at = time.monotonic()

    async def _look(self) -> None:
        version = await self._store.version()
        if version != self._version:
            self._records = await self._store.keys()
            self._version = version
            self._adopt()
        if self.is_stale:
            logger.info("the key store answers again")
        self.is_stale = False
        self._looked_at = time.monotonic()

    def _adopt(self) -> None:
        # Those that have expired stay, and `get` refuses them: a clock that was wrong for a while takes no key away.
        valid = {
            record.entry.name: (record.entry, record.expires_ms)
            for record in self._records
            if record.revoked_ms is None
        }
        valid |= {entry.name: (entry, None) for entry in self._configured}
        self._by_digest = {
            entry.digest: Principal(entry, self._meters.setdefault(name, KeyMeters()), expires_ms)
            for name, (entry, expires_ms) in valid.items()
        }
        for name in self._meters.keys() - valid.keys():
            del self._meters[name]
        self._on_change(self._by_digest)


def warn_of_plain_keys(entries: Sequence[KeyEntry]) -> None:
    """Keys in clear work, as files of the reference system have them, but whoever reads the file has the key."""
    for entry in entries:
        if entry.key is not None:
            logger.warning(
                "entitlements.keys: `%s` is written in clear; replace `key` by `hash`, see `cortex keys hash`",
                entry.name,
            )


def kept(entry: KeyEntry) -> KeyEntry:
    """The entry as a store may have it: the digest in place of the secret."""
    return msgspec.structs.replace(entry, key=None, hash=HASH_PREFIX + entry.digest.hex())
