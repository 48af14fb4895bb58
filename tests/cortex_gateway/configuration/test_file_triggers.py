"""A file that changes by itself never takes protection away, however it is cut, emptied, swapped or lost (H3).

A gateway on sockets with the watcher it really has, and files that are really written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cortex_core.catalogue import load_catalogue
from cortex_core.entitlements import KeyEntry
from cortex_core.gateway_config import load_gateway_config
from cortex_gateway.configuration import reload as reloading
from cortex_gateway.configuration.watch import Prints
from cortex_gateway.identity.credentials import digest_of
from cortex_gateway.server import running

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, until

OTHER = "org/other"
CHAT = "/v1/chat/completions"


def config_text(neuron: FakeNeuron, *, keys_last: bool = True) -> str:
    """Every kind of limit, with a comment and a blank line between."""
    keys = """
[[entitlements.keys]]
key_id = "ann"
account_id = "team"
key = "secret-ann"
models = ["org/model"]
requests_per_minute = 500
max_concurrent_requests = 2

# of the build
[[entitlements.keys]]
key_id = "bob"
key = "secret-bob"
tokens_per_minute = 40000
models = [
    "org/model",
    "org/small*",
]

[[entitlements.keys.budgets]]
tokens = 100000
window = { kind = "rolling", seconds = 3600 }

[[entitlements.keys.budgets]]
cost_usd = 2.5

[[entitlements.keys]]
key_id = "root"
key = "secret-root"
admin = true
hard_cap = 200000
window.kind = "fixed"
"""
    neurons = f"""
[[neurons]]
name = "alpha"
endpoint = "{neuron.url}"
"""
    return """models_config = "models.toml"

[gateway]
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
config_watch_s = 0.005
stream_hold_s = 30
max_body_bytes = 4000
body_timeout_s = 20

[poll]
interval_s = 600

[entitlements]
require_auth = true
admin_from_loopback = false
store = "sqlite:keys.db"
min_bytes_per_token = 1
""" + (neurons + keys if keys_last else keys + neurons)


MODELS_TEXT = f"""
[[models]]
id = "{MODEL}"
cost = {{ input = 1.0, output = 2.0 }}

[[models]]
id = "{OTHER}"

[models.cost]
input = 3.0
output = 4.0

[aliases]
fast = "{MODEL}"
slow = "{OTHER}"
"""


class Fleet:
    """A gateway that watches its files, and what may never become more than it was."""

    def __init__(self, client: Client, folder: Path, looks: Callable[[], int]) -> None:
        self.client = client
        self.config = folder / "cortex.toml"
        self.models = folder / "models.toml"
        self._looks = looks
        self._entries = {entry.name: entry for entry in self.section.keys}
        self._max_body_bytes = client.started.gateway.current.config.gateway.max_body_bytes

    @property
    def section(self) -> Any:
        return self.client.started.gateway.current.config.entitlements

    async def looked(self, count: int = reloading.UNFINISHED_LOOKS + 3) -> None:
        """The files have been looked at so often since: whatever they hold has been decided about."""
        before = self._looks()
        async with asyncio.timeout(30):
            while self._looks() < before + count:
                await asyncio.sleep(0.005)
            async with self.client.started.gateway.reloader._reading:  # type: ignore[union-attr]
                pass

    async def status(self, key: str | None, model: str = MODEL, path: str = CHAT) -> int:
        headers = {} if key is None else {"x-api-key": f"secret-{key}"}
        request = (
            self.client.get(path, headers=headers)
            if path.startswith("/admin")
            else self.client.post(path, {"model": model, "messages": [], "max_tokens": 1}, headers=headers)
        )
        async with request as response:
            await response.read()
            return int(response.status)

    async def holds(self) -> None:
        """Nobody gets what the first configuration did not give."""
        assert await self.status(None) == 401
        assert await self.status("unknown") == 401
        assert await self.status(None, path="/admin/fleet") == 403
        assert await self.status("ann", path="/admin/fleet") in (401, 403)
        assert await self.status("ann", OTHER) in (401, 403)
        assert await self.status("bob", OTHER) in (401, 403)
        gateway = self.client.started.gateway
        assert gateway.current.config.gateway.max_body_bytes <= self._max_body_bytes
        assert gateway.current.config.neurons and gateway.current.catalogue.models
        for name, first in self._entries.items():
            principal = gateway.identity._keyring.get(digest_of(f"secret-{name}".encode()))
            if principal is None:
                continue  # refused
            assert principal.key_id == name and principal.account_id == first.account
            assert principal.is_admin <= first.admin
            self._has_no_more(principal, first)

    @staticmethod
    def _has_no_more(principal: Any, first: KeyEntry) -> None:
        for limit, cap in (
            (first.requests_per_minute, principal.meters.requests and principal.meters.requests.cap),
            (first.tokens_per_minute, principal.meters.tokens and principal.meters.tokens.cap),
            (first.max_concurrent_requests, principal.max_concurrent),
        ):
            assert limit is None or (cap is not None and cap <= limit)
        budgets = {budget.name: cap for budget, _, cap in principal.budgets}
        for budget in first.all_budgets:
            assert budgets[budget.name] <= (budget.tokens or (budget.cost_usd or 0) * 1_000_000_000)

    async def is_valid(self) -> bool:
        metric = await self.client.metric("cortex_config_valid")
        async with self.client.get("/health") as response:
            said = json.loads(await response.read()).get("configuration")
        assert (metric == 0) == (said == "refused")
        return metric == 1

    async def reload(self) -> tuple[int, dict[str, Any]]:
        headers = {"x-api-key": "secret-root"}
        async with self.client.post("/admin/reload", {}, headers=headers) as response:
            return response.status, json.loads(await response.read())


Opening = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def fleet_of(
    stack: AsyncExitStack, neuron: FakeNeuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Opening]:
    num_looks = 0
    real = reloading.prints_of

    def counted(paths: Any) -> Prints:
        nonlocal num_looks
        num_looks += 1
        return real(paths)

    monkeypatch.setattr(reloading, "prints_of", counted)

    async def open_fleet(text: str | None = None, folder: Path = tmp_path) -> Fleet:
        neuron.have(MODEL)
        neuron.have(OTHER)
        if text is not None:
            (folder / "cortex.toml").write_text(text)
            (folder / "models.toml").write_text(MODELS_TEXT)
        path = folder / "cortex.toml"
        config = load_gateway_config(path, environ={})
        gateway = running(config, load_catalogue(config.models_config), grace_s=0, config_path=path)
        started = await stack.enter_async_context(gateway)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)))
        client = Client(session, started)
        nodes = started.gateway.fleet
        await until(lambda: all(node.health != "unknown" for node in nodes.snapshot.nodes.values()), client)
        return Fleet(client, folder, lambda: num_looks)

    yield open_fleet


@pytest.mark.parametrize("keys_last", [True, False])
async def test_H3_cortex_toml_cut_at_every_line(neuron: FakeNeuron, fleet_of: Opening, keys_last: bool) -> None:
    text = config_text(neuron, keys_last=keys_last)
    fleet = await fleet_of(text)
    lines = text.splitlines(keepends=True)
    for count in range(len(lines) - 1, -1, -1):
        fleet.config.write_text("".join(lines[:count]))
        await fleet.looked()
        await fleet.holds()
    assert not await fleet.is_valid()
    # And slowly written again.
    for count in range(len(lines)):
        fleet.config.write_text("".join(lines[:count]))
        await fleet.looked()
        await fleet.holds()
    fleet.config.write_text(text)
    await fleet.looked()
    await fleet.holds()
    assert await fleet.is_valid()
    assert await fleet.status("ann") == 200 and await fleet.status("root", path="/admin/fleet") == 200


@pytest.mark.parametrize(
    "line", ["requests_per_minute", "models = [", '    "org/small*",', "admin_from_loopback", "cost_usd", "endpoint"]
)
async def test_H3_cortex_toml_cut_at_every_byte_of_a_line(neuron: FakeNeuron, fleet_of: Opening, line: str) -> None:
    text = config_text(neuron)
    fleet = await fleet_of(text)
    start = text.index(line)
    for end in range(text.index("\n", start), start - 1, -1):
        fleet.config.write_text(text[:end])
        await fleet.looked()
        await fleet.holds()
    fleet.config.write_text(text)
    await fleet.looked()
    assert await fleet.is_valid() and await fleet.status("ann") == 200


async def test_H3_models_toml_cut_at_every_line(neuron: FakeNeuron, fleet_of: Opening) -> None:
    """Budgets in money count at its prices, and an empty one is no catalogue."""
    fleet = await fleet_of(config_text(neuron))
    lines = MODELS_TEXT.splitlines(keepends=True)

    def prices() -> list[float]:
        catalogue = fleet.client.started.gateway.current.catalogue
        found = [catalogue.profile(model) for model in (MODEL, OTHER)]
        return [rate for each in found if each and each.cost for rate in (each.cost.input, each.cost.output)]

    for count in [*range(len(lines) - 1, -1, -1), *range(len(lines))]:
        fleet.models.write_text("".join(lines[:count]))
        await fleet.looked()
        await fleet.holds()
        assert prices() == [1.0, 2.0, 3.0, 4.0]
    fleet.models.write_text(MODELS_TEXT)
    await fleet.looked()
    assert await fleet.is_valid() and fleet.client.started.gateway.current.catalogue.aliases["slow"] == OTHER


async def test_H3_half_a_file_and_none_are_refused_with_one_warning_until_they_are_asked_for(
    neuron: FakeNeuron, fleet_of: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    text = config_text(neuron)
    fleet = await fleet_of(text)
    for half in (text[: text.index("[entitlements]")], ""):
        caplog.clear()
        fleet.config.write_text(half)
        with caplog.at_level(logging.WARNING):
            await fleet.looked()
            fleet.config.touch()  # which is no news
            await fleet.looked()
        warnings = [record for record in caplog.records if record.name.startswith("cortex_gateway.configuration")]
        assert len(warnings) == 1 and warnings[0].levelno == logging.WARNING
        said = warnings[0].getMessage()
        for named in (
            "require_auth: true would become false",
            "all keys of the file",
            "all of them",
            "`cortex reload`",
        ):
            assert named in said
        assert "secret" not in said
        await fleet.holds()
        assert not await fleet.is_valid()
        assert await fleet.status("ann") == 200
        async with fleet.client.get("/admin/fleet", headers={"x-api-key": "secret-root"}) as response:
            shown = json.loads(await response.read())["configuration"]
        assert shown["valid"] is False and shown["faults"] == []
        assert "entitlements.require_auth: true would become false" in shown["weaker"]
    fleet.config.write_text(text)
    await fleet.looked()
    assert await fleet.is_valid()
    # Whoever asks for it gets it.
    fleet.config.write_text(text.replace("require_auth = true", "require_auth = false"))
    await fleet.looked()
    assert await fleet.status(None) == 401 and not await fleet.is_valid()
    assert (await fleet.reload())[0] == 200
    assert await fleet.status(None) == 200 and await fleet.is_valid()


async def test_H3_a_signal_asks_for_it_too(neuron: FakeNeuron, fleet_of: Opening) -> None:
    text = config_text(neuron)
    fleet = await fleet_of(text)
    fleet.config.write_text(text.replace("admin_from_loopback = false", "admin_from_loopback = true"))
    await fleet.looked()
    await fleet.holds()
    reloader = fleet.client.started.gateway.reloader
    assert reloader is not None
    await reloader.try_reload("signal")
    assert await fleet.status(None, path="/admin/fleet") == 200 and await fleet.is_valid()


async def test_H3_a_key_is_revoked_and_limits_are_tightened_by_the_file_alone(
    neuron: FakeNeuron, fleet_of: Opening
) -> None:
    text = config_text(neuron)
    fleet = await fleet_of(text)
    bob = text[text.index("# of the build") : text.index('[[entitlements.keys]]\nkey_id = "root"')]
    assert await fleet.status("bob") == 200
    fleet.config.write_text(text.replace(bob, "").replace("requests_per_minute = 500", "requests_per_minute = 1"))
    await fleet.looked()
    assert await fleet.is_valid()
    assert [await fleet.status("bob"), await fleet.status("ann"), await fleet.status("ann")] == [401, 200, 429]
    # Another one, and the last of the file at that: the rest of it is a beginning of what it was.
    whole = fleet.config.read_text()
    fleet.config.write_text(whole[: whole.index('[[entitlements.keys]]\nkey_id = "root"')])
    await fleet.looked()
    assert await fleet.is_valid() and await fleet.status("root", path="/admin/fleet") == 403
    # The last one of all leaves no key: that has to be asked for.
    fleet.config.write_text(whole[: whole.index("[[entitlements.keys]]")])
    await fleet.looked()
    assert not await fleet.is_valid() and await fleet.status("ann") == 429


async def test_H3_a_limited_key_that_is_gone_where_none_is_required_is_refused(
    neuron: FakeNeuron, fleet_of: Opening
) -> None:
    """Its holder would be anonymous, and ask as much as anybody."""
    text = config_text(neuron).replace("require_auth = true", "require_auth = false")
    fleet = await fleet_of(text)
    assert await fleet.status("ann", OTHER) == 403
    ann = text[text.index('[[entitlements.keys]]\nkey_id = "ann"') : text.index("# of the build")]
    fleet.config.write_text(text.replace(ann, ""))
    await fleet.looked()
    assert await fleet.status("ann", OTHER) == 403 and not await fleet.is_valid()


async def test_H3_a_file_that_vanishes_or_cannot_be_read_changes_nothing(
    neuron: FakeNeuron, fleet_of: Opening, tmp_path: Path
) -> None:
    text = config_text(neuron)
    fleet = await fleet_of(text)

    def unreadable(path: Path) -> None:
        path.chmod(0)
        if os.access(path, os.R_OK):  # whoever runs the tests may read anything
            path.unlink()
            path.mkdir()

    def zeroed(path: Path) -> None:
        path.write_bytes(bytes(path.stat().st_size))  # what a crash of the host may leave

    def replaced(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)  # whoever read it would hold every later reload

    def readable(path: Path, content: str) -> None:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_text(content)

    for path, content in ((fleet.config, text), (fleet.models, MODELS_TEXT)):
        for lose in (Path.unlink, unreadable, partial(Path.write_bytes, data=b"\xff\xfe\0"), zeroed, replaced):
            lose(path)
            await fleet.looked()
            await fleet.holds()
            assert not await fleet.is_valid() and await fleet.status("ann") == 200
            readable(path, content)
            await fleet.looked()
            assert await fleet.is_valid()


async def test_H3_files_that_are_swapped_by_their_folder_are_one_change(
    neuron: FakeNeuron, fleet_of: Opening, tmp_path: Path
) -> None:
    """As Kubernetes mounts them: links to files in a folder that a link leads to, which is replaced in one step."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()

    def publish(version: str, text: str, models: str = MODELS_TEXT) -> None:
        folder = mounted / version
        folder.mkdir()
        (folder / "cortex.toml").write_text(text)
        (folder / "models.toml").write_text(models)
        before = (mounted / "..data").resolve() if (mounted / "..data").exists() else None
        (mounted / "..tmp").symlink_to(version)
        (mounted / "..tmp").replace(mounted / "..data")
        if before is not None:
            shutil.rmtree(before)

    text = config_text(neuron).replace("sqlite:keys.db", f"sqlite:{tmp_path}/keys.db")
    publish("..1", text)
    for name in ("cortex.toml", "models.toml"):
        (mounted / name).symlink_to(f"..data/{name}")
    fleet = await fleet_of(folder=mounted)
    publish("..2", text.replace("requests_per_minute = 500", "requests_per_minute = 400"))
    await fleet.looked()
    await fleet.holds()
    entries = {entry.name: entry for entry in fleet.section.keys}
    assert entries["ann"].requests_per_minute == 400 and await fleet.is_valid()
    for number, broken in enumerate((text[:300], "", text.replace("requests_per_minute = 500", "")), 3):
        publish(f"..{number}", broken)
        await fleet.looked()
        await fleet.holds()
        assert not await fleet.is_valid()
    publish("..9", text.replace("requests_per_minute = 500", "requests_per_minute = 300"), MODELS_TEXT + 'new = "x"\n')
    await fleet.looked()
    await fleet.holds()
    assert await fleet.is_valid() and fleet.client.started.gateway.current.catalogue.aliases["new"] == "x"


async def test_H3_whatever_its_time_and_size_say_a_file_is_read_when_it_changes(
    neuron: FakeNeuron, fleet_of: Opening
) -> None:
    """The same length and time, older times, and a copy that replaces it: `cp -p`, rsync, a restored backup."""
    text = config_text(neuron)
    fleet = await fleet_of(text)
    stat = fleet.config.stat()
    limits = iter(("499", "498", "497", "496"))

    def tightened() -> str:
        return text.replace("requests_per_minute = 500", f"requests_per_minute = {next(limits)}")

    def in_place(content: str, time_ns: int) -> None:
        fleet.config.write_text(content)
        os.utime(fleet.config, ns=(time_ns, time_ns))

    def by_renaming(content: str, time_ns: int) -> None:
        new = fleet.config.with_suffix(".new")
        new.write_text(content)
        os.utime(new, ns=(time_ns, time_ns))
        new.replace(fleet.config)

    for write in (in_place, by_renaming):
        for time_ns in (stat.st_mtime_ns, 0):
            content = tightened()
            write(content, time_ns)
            await fleet.looked()
            entry = next(entry for entry in fleet.section.keys if entry.name == "ann")
            assert f"requests_per_minute = {entry.requests_per_minute}\n" in content
            write(text[: text.index("max_concurrent_requests")], time_ns)
            await fleet.looked()
            await fleet.holds()
            assert not await fleet.is_valid()


async def test_H3_what_was_cut_between_the_start_and_the_first_look_is_not_taken(
    neuron: FakeNeuron, fleet_of: Opening, tmp_path: Path
) -> None:
    text = config_text(neuron)
    (tmp_path / "cortex.toml").write_text(text)
    (tmp_path / "models.toml").write_text(MODELS_TEXT)
    real = reloading.Reloader.start

    def start(self: reloading.Reloader) -> None:
        (tmp_path / "cortex.toml").write_text("")
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reloading.Reloader, "start", start)
        fleet = await fleet_of()
    await fleet.looked()
    await fleet.holds()
    assert not await fleet.is_valid()
