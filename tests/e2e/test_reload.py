"""The configuration of a gateway that serves: real processes, real files, streams in flight through two neurons."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet_of_neurons import FleetOfNeurons
from tests.e2e.fleet_process import MODEL, call, eventually
from tests.e2e.harness import cortex
from tests.e2e.streams import CHAT, comparable, read_all, requests

KEYS = """[entitlements]
require_auth = true
[[entitlements.keys]]
key_id = "ci"
key = "secret"
"""


class Reloadable:
    """A fleet of two whose cortex.toml tests write."""

    def __init__(self, folder: Path) -> None:
        self.fleet = FleetOfNeurons(folder, gateway="stream_silence_s = 60\nconfig_watch_s = 0.2")
        self.config = folder / "cortex.toml"
        self.both = self.config.read_text()
        self.only_n0 = self.both[: self.both.rindex("[[neurons]]")]
        self.url = self.fleet.url
        self.gateway = self.fleet.gateway

    def replace(self, text: str) -> None:
        """As an editor does: a new file under the old name."""
        new = self.config.with_name("new")
        new.write_text(text)
        new.replace(self.config)

    def said(self, text: str) -> None:
        eventually(lambda: any(text in line for line in self.gateway.output), within_s=60, what=text)

    def snapshot(self) -> Any:
        return json.loads(call(self.url, "GET", "/admin/fleet")[2])

    def nodes(self) -> list[str]:
        return [node["name"] for node in self.snapshot()["nodes"] if node["health"] == "healthy"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloadable]:
    reloadable = Reloadable(tmp_path_factory.mktemp("reload"))
    yield reloadable
    reloadable.fleet.stop()


@pytest.mark.timeout(600)
def test_streams_on_a_neuron_that_is_taken_out_on_SIGHUP_end_as_if_nothing_had_been(running: Reloadable) -> None:
    asked = requests(14)
    undisturbed = asyncio.run(read_all(running.url, asked))
    assert running.nodes() == ["n0", "n1"]

    def change() -> None:
        running.fleet.neurons[1].signal(signal.SIGSTOP)  # so that its streams do not end before
        before = running.snapshot()
        running.config.write_text(running.only_n0 + "lod_wait_s = 5\n")
        running.gateway.signal(signal.SIGHUP)
        running.said("the running one stays (signal)")
        running.said(f"{running.config}:")
        assert [node["name"] for node in running.snapshot()["nodes"]] == [node["name"] for node in before["nodes"]]
        running.config.write_text(running.only_n0)
        running.gateway.signal(signal.SIGHUP)
        running.said("configuration reloaded (signal): neurons -n1")
        after = running.snapshot()
        assert [node["name"] for node in after["nodes"]] == ["n0"] and after["leaving"]["n1"] > 0
        running.fleet.neurons[1].signal(signal.SIGCONT)

    disturbed = asyncio.run(read_all(running.url, asked, change))
    for (path, body), before, after in zip(asked, undisturbed, disturbed, strict=True):
        assert comparable(path, after) == comparable(path, before), (path, body)
    assert not any("another goes on" in line for line in running.gateway.output)
    assert running.snapshot()["leaving"] == {}


@pytest.mark.timeout(300)
def test_files_that_change_are_followed_and_keys_come_and_go(running: Reloadable) -> None:
    running.replace(running.both)
    eventually(lambda: running.nodes() == ["n0", "n1"], within_s=60, what="n1 is back and healthy")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    served = {call(running.url, "POST", CHAT, body)[1]["x-cortex-node"] for _ in range(4)}
    assert served == {"n0", "n1"}
    ask = {"authorization": "Bearer secret"}
    running.replace(KEYS + running.both)
    eventually(lambda: call(running.url, "POST", CHAT, body)[0] == 401, within_s=60, what="a key is required")
    assert call(running.url, "POST", CHAT, body, ask)[0] == 200
    running.replace(KEYS.replace('"ci"', '"cd"').replace('"secret"', '"other"') + running.both)
    eventually(lambda: call(running.url, "POST", CHAT, body, ask)[0] == 401, within_s=60, what="the key is revoked")
    # That no key is required any more has to be asked for.
    running.replace(running.both)
    running.said("would protect less")
    running.said("entitlements.require_auth: true would become false")
    assert call(running.url, "POST", CHAT, body)[0] == 401
    assert json.loads(call(running.url, "GET", "/health")[2])["configuration"] == "refused"
    assert cortex("reload", "-e", running.url).returncode == 0
    assert call(running.url, "POST", CHAT, body)[0] == 200
    assert "configuration" not in json.loads(call(running.url, "GET", "/health")[2])


@pytest.mark.timeout(300)
def test_cortex_reload_says_what_changed_or_every_fault(running: Reloadable) -> None:
    running.config.write_text(running.both + "[routing]\nbeta = 2.0\n")
    done = cortex("reload", "-e", running.url, "--json")
    answer = json.loads(done.stdout)
    # The gateway may have seen the change itself by then.
    assert done.returncode == 0 and answer["outcome"] in ("applied", "unchanged"), done.stderr
    running.config.write_text(running.both + "[routing]\nbeta = -2.0\n")
    done = cortex("reload", "-e", running.url)
    assert done.returncode == 1 and "(`routing.beta`)" in done.stderr and f"{running.config}:" in done.stderr
    running.config.write_text(running.both)
    done = cortex("reload", "-e", running.url)
    assert done.returncode == 0 and done.stdout.split(":")[0] in ("applied", "unchanged")
