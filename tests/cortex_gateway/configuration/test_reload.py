"""A gateway that runs follows its files: whole or not at all, and no request in flight notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cortex_core.catalogue import load_catalogue
from cortex_core.gateway_config import load_gateway_config
from cortex_gateway.server import running

from tests.cortex_gateway.fake_neuron import OPENAI_END, FakeNeuron, listening
from tests.cortex_gateway.fake_openai import MODEL as SERVED
from tests.cortex_gateway.fake_openai import FakeOpenAI
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until

STREAM = {"model": MODEL, "messages": [], "stream": True}
KEY = '[[entitlements.keys]]\nkey_id = "{0}"\nkey = "secret-{0}"\n{1}\n'


class Files:
    """cortex.toml and models.toml of one gateway. `config_watch_s` is 0: tests say when."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "cortex.toml"
        self.models = folder / "models.toml"
        self.write_models("")

    def write(
        self, *neurons: FakeNeuron | FakeOpenAI, gateway: str = "", rest: str = "", watch_s: float = 0, extra: str = ""
    ) -> None:
        entries = "".join(
            f'[[neurons]]\nname = "{each.name}"\nendpoint = "{each.url}"\n'
            + ('kind = "openai"\napi_key = "file:secret"\n' if isinstance(each, FakeOpenAI) else "")
            for each in neurons
        )
        self.config.write_text(
            'models_config = "models.toml"\n[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
            f"config_watch_s = {watch_s}\nstream_hold_s = 30\n{gateway}\n{rest}\n{entries}{extra}"
        )

    def write_models(self, text: str) -> None:
        self.models.write_text(text)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


Opening = Callable[[Files], Awaitable[Client]]


@pytest.fixture
async def opened(stack: AsyncExitStack) -> AsyncIterator[Opening]:
    async def open_gateway(files: Files) -> Client:
        config = load_gateway_config(files.config, environ={})
        gateway = running(config, load_catalogue(config.models_config), grace_s=0, config_path=files.config)
        started = await stack.enter_async_context(gateway)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)))
        client = Client(session, started)
        await until(lambda: all(node.health != "unknown" for node in nodes(client).values()), client)
        return client

    yield open_gateway


def nodes(client: Client) -> Any:
    return client.started.gateway.fleet.snapshot.nodes


async def reload(client: Client) -> tuple[int, dict[str, Any]]:
    async with client.post("/admin/reload", {}) as response:
        return response.status, json.loads(await response.read())


async def healthy(client: Client, node: str) -> None:
    await until(lambda: node in nodes(client) and nodes(client)[node].health == "healthy", client)


async def working(neuron: FakeNeuron, count: int) -> None:
    async with asyncio.timeout(10):
        while neuron.num_running < count:
            await asyncio.sleep(0.005)


async def test_a_neuron_that_is_added_is_polled_at_once_and_serves(
    neuron: FakeNeuron, second: FakeNeuron, files: Files, opened: Opening
) -> None:
    second.have(MODEL)
    files.write(neuron, rest="[poll]\ninterval_s = 600")
    client = await opened(files)
    assert (await client.chat())[0] == 404
    files.write(neuron, second, rest="[poll]\ninterval_s = 600")
    status, answer = await reload(client)
    assert (status, answer["outcome"], answer["summary"]) == (200, "applied", "neurons +beta")
    assert answer["changes"] == {"neurons": {"added": ["beta"]}} and answer["needs_restart"] == []
    await healthy(client, "beta")
    assert (await client.chat())[0] == 200
    assert await client.metric("cortex_config_reloads_total", trigger="admin", outcome="applied") == 1


async def test_a_neuron_that_is_removed_ends_what_it_has_and_gets_nothing_new(
    neuron: FakeNeuron, second: FakeNeuron, files: Files, opened: Opening
) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    files.write(neuron, second)
    client = await opened(files)
    async with client.post("/v1/chat/completions", STREAM) as response:
        await response.content.readuntil(b"\n\n")
        whole = asyncio.ensure_future(client.chat())
        await working(neuron, 2)
        second.have(MODEL)
        files.write(second)
        assert (await reload(client))[1]["summary"] == "neurons -alpha"
        async with client.get("/admin/fleet?refresh=1") as shown:
            fleet = json.loads(await shown.read())
        assert [node["name"] for node in fleet["nodes"]] == ["beta"] and fleet["leaving"] == {"alpha": 2}
        assert await client.metric("cortex_leaving_requests", node="alpha") == 2
        assert (await client.chat())[0] == 200
        assert (len(neuron.requests), len(second.requests)) == (2, 1)
        neuron.answer_gate.set()
        assert (await response.read()).endswith(OPENAI_END)
        assert (await whole)[0] == 200
    activity = client.started.gateway.fleet.activity
    assert activity.total_in_flight() == 0 and activity.leaving(()) == {}
    assert await client.metric("cortex_leaving_requests", node="alpha") is None


async def test_the_neuron_that_was_removed_is_still_watched_over_for_the_answers_it_owes(
    neuron: FakeNeuron, files: Files, opened: Opening
) -> None:
    """An answer that is not streamed is silent: it lives as long as its neuron answers polls (F29)."""
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    settings = {"gateway": "upstream_idle_timeout_s = 0.5", "rest": "[poll]\ninterval_s = 0.1\ntimeout_s = 0.2"}
    files.write(neuron, **settings)
    client = await opened(files)
    patient, doomed = asyncio.ensure_future(client.chat()), asyncio.ensure_future(client.chat())
    await working(neuron, 2)
    files.write(**settings)
    assert (await reload(client))[0] == 200
    for _ in range(8):
        neuron.polled.clear()
        await neuron.polled.wait()
    assert not patient.done()
    neuron.models_hang = True
    assert [(await answer)[0] for answer in (patient, doomed)] == [504, 504]
    neuron.models_hang = False
    while any(task.get_name() == "poll-alpha" for task in asyncio.all_tasks()):
        await asyncio.sleep(0.01)  # nobody is owed anything any more, and nobody asks


async def test_another_server_under_the_same_name_starts_from_nothing(
    neuron: FakeNeuron, files: Files, opened: Opening, stack: AsyncExitStack
) -> None:
    other = await stack.enter_async_context(listening(FakeNeuron("alpha")))
    neuron.have(MODEL)
    other.have("other")
    neuron.answer_gate.clear()
    files.write(neuron)
    client = await opened(files)
    async with client.post("/v1/chat/completions", STREAM) as response:
        await response.content.readuntil(b"\n\n")
        files.write(other)
        assert (await reload(client))[1]["summary"] == "neurons ~alpha"
        await healthy(client, "alpha")
        assert list(nodes(client)["alpha"].models) == ["other"]
        assert (await client.chat())[0] == 404
        assert (await client.chat(model="other"))[0] == 200
        # What the old one still says is no sign of life of the new one.
        assert not client.started.gateway.fleet.activity.is_heard_since("alpha", 0.0)
        neuron.answer_gate.set()
        assert (await response.read()).endswith(OPENAI_END)
    assert client.started.gateway.fleet.activity.total_in_flight() == 0


async def test_who_waits_for_a_load_on_a_removed_neuron_is_served_elsewhere(
    neuron: FakeNeuron, second: FakeNeuron, files: Files, opened: Opening
) -> None:
    neuron.load_gate.clear()
    files.write_models(f'[[models]]\nid = "{MODEL}"\nvram_mb = 1000\n')
    files.write(neuron)
    client = await opened(files)
    asking = [asyncio.ensure_future(client.chat()) for _ in range(3)]
    await neuron.load_started.wait()
    by_hand = client.post("/admin/models/load", {"model": MODEL})
    loading = asyncio.ensure_future(by_hand.__aenter__())
    files.write(second)
    assert (await reload(client))[0] == 200
    await healthy(client, "beta")
    assert [(await each)[0] for each in asking] == [200, 200, 200]
    assert json.loads(await (await loading).read())["node"] == "beta"
    assert second.count("POST /models/load") == 1
    assert client.started.gateway.placement.loads.running("alpha", MODEL) is None


async def test_anything_wrong_refuses_all_of_it_and_names_file_line_and_key(
    neuron: FakeNeuron, second: FakeNeuron, files: Files, opened: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    neuron.have(MODEL)
    files.write(neuron)
    client = await opened(files)
    before = client.started.gateway.current.value
    files.write(second, rest=KEY.format("ci", ""))
    files.write_models("[[models]]\nid = 5\n")
    status, answer = await reload(client)
    assert (status, answer["error"]["code"]) == (409, "configuration_refused")
    assert [f"{files.models}:2: " in fault for fault in answer["error"]["faults"]] == [True]
    files.write(second, gateway="load_wait_s = -1\nlod_wait_s = 1")
    status, answer = await reload(client)
    assert status == 409 and "cortex.toml" in answer["error"]["message"] and "`gateway.lod_wait_s`" in str(answer)
    assert client.started.gateway.current.value is before
    assert list(nodes(client)) == ["alpha"] and (await client.chat())[0] == 200
    assert await client.metric("cortex_config_valid") == 0
    assert await client.metric("cortex_config_reloads_total", trigger="admin", outcome="refused") == 2
    assert sum("the running one stays" in record.message for record in caplog.records) == 2
    files.write(neuron)
    files.write_models("")
    assert (await reload(client))[1]["outcome"] == "unchanged"
    assert await client.metric("cortex_config_valid") == 1


async def test_a_catalogue_that_vanishes_is_refused_and_an_empty_one_is_taken(
    neuron: FakeNeuron, files: Files, opened: Opening
) -> None:
    files.write_models(f'[[models]]\nid = "{MODEL}"\n[aliases]\nfast = "{MODEL}"\n')
    files.write(neuron)
    client = await opened(files)
    assert (await client.chat(model="fast"))[0] == 200
    files.models.unlink()
    status, answer = await reload(client)
    assert status == 409 and "no such file" in answer["error"]["message"]
    assert (await client.chat(model="fast"))[0] == 200
    files.write_models("")
    assert (await reload(client))[1]["summary"] == f"models -{MODEL}; aliases -fast"
    assert (await client.chat(model="fast"))[0] == 404


async def test_names_lead_elsewhere_at_once(
    neuron: FakeNeuron, files: Files, opened: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    neuron.have(MODEL)
    neuron.have("org/other")
    files.write_models(f'[aliases]\nfast = "{MODEL}"\n')
    files.write(neuron)
    client = await opened(files)
    body = {"model": "fast", "messages": []}
    async with client.post("/v1/chat/completions", body) as response:
        assert response.headers["x-cortex-model"] == MODEL
    files.write_models('[aliases]\nfast = "org/other"\nslow = "org/none"\n')
    assert (await reload(client))[1]["summary"] == "aliases +slow ~fast"
    async with client.post("/v1/chat/completions", body) as response:
        assert response.headers["x-cortex-model"] == "org/other"
    async with client.get("/v1/models") as response:
        assert "fast" in {entry["id"] for entry in json.loads(await response.read())["data"]}
    async with asyncio.timeout(10):
        while not any("alias slow: no such model" in record.message for record in caplog.records):
            await asyncio.sleep(0)


async def test_keys_come_go_and_change_and_what_they_have_used_counts_on(
    neuron: FakeNeuron, files: Files, opened: Opening
) -> None:
    neuron.have(MODEL)
    auth = "[entitlements]\nrequire_auth = true\n"
    files.write(neuron, rest=auth + KEY.format("ann", "requests_per_minute = 3") + KEY.format("bob", ""))
    client = await opened(files)

    async def ask(name: str) -> int:
        async with client.post(
            "/v1/chat/completions", {"model": MODEL, "messages": []}, headers={"x-api-key": f"secret-{name}"}
        ) as response:
            return response.status

    neuron.answer_gate.clear()
    in_flight = [asyncio.ensure_future(ask(name)) for name in ("ann", "bob")]
    await working(neuron, 2)
    concurrency = "requests_per_minute = 2\nmax_concurrent_requests = 1"
    files.write(neuron, rest=auth + KEY.format("ann", concurrency) + KEY.format("cid", "admin = true"))
    assert (await reload(client))[1]["summary"] == "keys +cid -bob ~ann"
    assert await ask("ann") == 429  # one is in flight, from before
    assert await ask("bob") == 401
    neuron.answer_gate.set()
    assert [await each for each in in_flight] == [200, 200]
    assert [await ask(name) for name in ("ann", "ann", "cid")] == [200, 429, 200]  # one of two was used before
    async with client.post("/admin/reload", {}, headers={"x-api-key": "secret-cid", "x-forwarded-for": "1.2.3.4"}) as r:
        assert r.status == 200
    async with client.post("/admin/reload", {}, headers={"x-api-key": "secret-ann", "x-forwarded-for": "1.2.3.4"}) as r:
        assert r.status == 403


async def test_a_secret_in_a_file_is_read_again(openai_server: FakeOpenAI, files: Files, opened: Opening) -> None:
    secret = files.config.parent / "secret"
    secret.write_text("first")
    openai_server.key = "first"
    files.write(openai_server)
    client = await opened(files)
    assert (await client.chat(model=SERVED))[0] == 200
    openai_server.key = "second"
    assert (await client.chat(model=SERVED))[0] == 502
    secret.write_text("second")
    status, answer = await reload(client)
    assert answer["summary"] == "neurons ~other" and "second" not in str(answer)
    assert (await client.chat(model=SERVED))[0] == 200
    secret.unlink()
    status, answer = await reload(client)
    assert status == 409 and "api_key" in answer["error"]["message"]
    assert (await client.chat(model=SERVED))[0] == 200


async def test_settings_apply_from_the_next_decision_on_and_others_are_named(
    neuron: FakeNeuron, files: Files, opened: Opening
) -> None:
    neuron.have(MODEL)
    files.write(neuron, rest="[poll]\ninterval_s = 600")
    client = await opened(files)
    gateway = client.started.gateway
    neuron.polled.clear()
    files.write(
        neuron,
        gateway="max_body_bytes = 100\nwrite_timeout_s = 7",
        rest='[poll]\ninterval_s = 0.05\n[eviction]\nstrategy = "priority"\n[breaker]\nfailures = 1\n',
    )
    _, answer = await reload(client)
    assert answer["changes"]["settings"] == [
        "breaker.failures",
        "eviction.strategy",
        "gateway.max_body_bytes",
        "poll.interval_s",
    ]
    assert answer["needs_restart"] == ["gateway.write_timeout_s"]
    assert answer["summary"].endswith("; a restart is needed for gateway.write_timeout_s")
    async with asyncio.timeout(10):
        await neuron.polled.wait()
    assert gateway.placement.state().policy.strategy == "priority"
    assert gateway.fleet.breakers.settings.failures == 1
    assert (await client.chat(user="x" * 100))[0] == 413
    # Still so: the process has not been restarted.
    assert (await reload(client))[1]["needs_restart"] == ["gateway.write_timeout_s"]


async def test_files_that_are_put_back_as_they_were_are_right_again(
    neuron: FakeNeuron, files: Files, opened: Opening
) -> None:
    files.write(neuron, watch_s=0.05)
    client = await opened(files)

    async def valid(wanted: float) -> None:
        async with asyncio.timeout(10):
            while await client.metric("cortex_config_valid") != wanted:
                await asyncio.sleep(0.02)

    right = files.config.read_text()
    files.config.write_text(right + "nonsense = ")
    await valid(0)
    files.config.write_text(right)
    await valid(1)
    assert await client.metric("cortex_config_reloads_total", trigger="file", outcome="unchanged") == 1


async def test_a_load_that_a_reload_leaves_to_its_neuron_does_not_seem_to_go_on(
    neuron: FakeNeuron, files: Files, opened: Opening
) -> None:
    """The endpoint is written in another way, which is another client for the same node."""
    neuron.load_gate.clear()
    files.write_models(f'[[models]]\nid = "{MODEL}"\nvram_mb = 1000\n')
    files.write(neuron)
    client = await opened(files)
    loading = asyncio.ensure_future(client.post("/admin/models/load", {"model": MODEL}).__aenter__())
    await neuron.load_started.wait()
    assert nodes(client)["alpha"].status(MODEL) == "loading"
    files.config.write_text(files.config.read_text().replace(neuron.url, neuron.url + "/"))
    status, answer = await reload(client)
    assert (status, answer["outcome"]) == (200, "applied")
    neuron.load_gate.set()
    assert (await loading).status in (200, 503)
    await until(lambda: nodes(client)["alpha"].status(MODEL) == "loaded", client)
    assert (await client.chat())[0] == 200


async def test_half_a_file_is_not_taken_and_the_rest_of_it_is(
    neuron: FakeNeuron, second: FakeNeuron, files: Files, opened: Opening
) -> None:
    files.write(neuron, watch_s=0.05)
    client = await opened(files)
    looks = 0
    files.write(neuron, second, watch_s=0.05)
    whole = files.config.read_text()
    half = whole[: whole.index("[[neurons]]")]
    with files.config.open("w") as file:
        file.write(half)
        file.flush()
        while looks < 8:  # as long as it grows, it has not settled
            file.write("#\n")
            file.flush()
            looks += 1
            await asyncio.sleep(0.03)
            assert list(nodes(client)) == ["alpha"]
        file.write(whole.removeprefix(half))
    await healthy(client, "beta")
    assert list(nodes(client)) == ["alpha", "beta"]
    assert await client.metric("cortex_config_reloads_total", trigger="file", outcome="applied") == 1
    assert await client.metric("cortex_config_reloads_total", trigger="file", outcome="refused") == 0


async def test_a_gateway_that_was_not_started_from_files_says_so(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    status, answer = await reload(client)
    assert (status, answer["error"]["code"]) == (409, "no_configuration_file")
