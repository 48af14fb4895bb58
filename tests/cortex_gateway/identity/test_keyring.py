"""The keys that are valid now, of the configuration and of the store."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from cortex_core.entitlements import KeyEntry
from cortex_gateway.identity.credentials import hash_text
from cortex_gateway.identity.keyring import Keyring, kept, warn_of_plain_keys
from cortex_gateway.identity.sqlite_store import SqliteStore
from cortex_gateway.identity.store import KeyRecord, MemoryStore, Store, StoreError

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start
from tests.cortex_gateway.identity.harness import SECRET, ask, bearer

from .fake_clock import NOW, FakeClock


async def test_keys_come_and_go_while_the_gateway_runs(neuron: FakeNeuron, start: Start, tmp_path: Path) -> None:
    neuron.have(MODEL)
    path = tmp_path / "cortex.db"
    client = await start(neuron, entitlements={"require_auth": True, "store": f"sqlite:{path}", "key_refresh_s": 0.05})
    assert (await ask(client, bearer()))[0] == 401
    store = SqliteStore(path)
    await store.open()
    await store.add_key(KeyRecord(KeyEntry(key_id="ci", hash=hash_text(SECRET)), 1))
    await store.add_key(KeyRecord(KeyEntry(key_id="old", hash=hash_text("old")), 1, expires_ms=2))
    await _until_status(client, bearer(), 200)
    assert (await ask(client, bearer("old")))[0] == 401
    await store.revoke_key("ci", 2)
    await _until_status(client, bearer(), 401)
    await store.close()


async def _until_status(client: Client, headers: dict[str, str], status: int) -> None:
    async with asyncio.timeout(20):
        while (await ask(client, headers))[0] != status:
            await asyncio.sleep(0.02)  # the keyring looks by itself


class Keys(MemoryStore):
    """Counts how often it is looked at, and fails when told to."""

    def __init__(self) -> None:
        super().__init__(FakeClock())
        self.num_looks = 0
        self.is_broken = False

    async def version(self) -> int:
        self.num_looks += 1
        if self.is_broken:
            raise StoreError("disk full")
        return await super().version()


def entry(name: str, secret: str, **fields: Any) -> KeyEntry:
    return KeyEntry(key_id=name, hash=hash_text(secret), **fields)


def ring(store: Store, *configured: KeyEntry, now_ms: int = NOW, **more: Any) -> Keyring:
    return Keyring(configured, store, now_ms=lambda: now_ms, refresh_s=3600, **more)


def known(keyring: Keyring, secret: str) -> str | None:
    principal = keyring.get(entry("any", secret).digest)
    return None if principal is None else principal.key_id


async def test_a_key_of_the_configuration_wins_over_one_of_its_name_in_the_store() -> None:
    store = Keys()
    await store.add_key(KeyRecord(entry("ci", "from the store"), NOW))
    await store.add_key(KeyRecord(entry("other", "another"), NOW))
    keyring = ring(store, entry("ci", "from the file"))
    await keyring.start()
    assert known(keyring, "from the file") == "ci" and known(keyring, "from the store") is None
    assert known(keyring, "another") == "other"
    await keyring.stop()


@pytest.mark.parametrize(("expires_ms", "name"), [(None, "ci"), (NOW + 1, "ci"), (NOW, None), (NOW - 1, None)])
async def test_a_key_that_has_expired_is_not_known(expires_ms: int | None, name: str | None) -> None:
    store = Keys()
    await store.add_key(KeyRecord(entry("ci", "secret"), NOW, expires_ms=expires_ms))
    keyring = ring(store)
    await keyring.start()
    assert known(keyring, "secret") == name
    await keyring.stop()


async def test_what_was_counted_of_a_key_outlives_a_change_of_its_limits_and_not_its_end() -> None:
    keyring = ring(Keys(), entry("ci", "secret", requests_per_minute=5))
    principal = keyring.get(entry("ci", "secret").digest)
    assert principal is not None
    keyring.adopt([entry("ci", "another secret", requests_per_minute=9)], refresh_s=1)
    again = keyring.get(entry("ci", "another secret").digest)
    assert again is not None and again.meters is principal.meters and known(keyring, "secret") is None
    keyring.adopt([], refresh_s=1)
    keyring.adopt([entry("ci", "secret")], refresh_s=1)
    anew = keyring.get(entry("ci", "secret").digest)
    assert anew is not None and anew.meters is not principal.meters


async def test_unknown_keys_share_one_look_and_cannot_make_it_a_flood() -> None:
    store = Keys()
    keyring = ring(store)
    await asyncio.gather(*(keyring.look_again() for _ in range(50)))
    assert store.num_looks == 1
    await keyring.look_again()
    assert store.num_looks == 1, "so soon nothing can have changed"
    await keyring.stop()


async def test_while_the_store_fails_those_known_stay_known_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex_gateway.identity.keyring.MIN_REFRESH_INTERVAL_S", 0.0)
    store = Keys()
    await store.add_key(KeyRecord(entry("ci", "secret"), NOW))
    keyring = ring(store)
    await keyring.look_again()
    store.is_broken = True
    with caplog.at_level(logging.WARNING, "cortex_gateway.identity.keyring"):
        for _ in range(3):
            await keyring.look_again()
    assert keyring.is_stale and known(keyring, "secret") == "ci" and len(caplog.records) == 1
    store.is_broken = False
    await keyring.look_again()
    assert not keyring.is_stale
    await keyring.stop()


def test_a_key_in_clear_is_warned_of_and_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    plain = KeyEntry(key_id="ci", key="do not show")
    with caplog.at_level(logging.WARNING):
        warn_of_plain_keys([plain, entry("other", "secret")])
    assert len(caplog.records) == 1 and "`ci`" in caplog.text and "do not show" not in caplog.text
    assert kept(plain).key is None and kept(plain).digest == plain.digest
