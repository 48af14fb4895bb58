"""The secret between gateways and neurons: who is believed, who is refused, how a fleet gets from one to the next."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cortex_core.config import ConfigError
from cortex_core.gateway_config import load_gateway_config
from cortex_core.hop import SECRET_HEADER
from cortex_gateway.configuration.current import read_configuration
from cortex_gateway.server import RunningGateway, running
from neuron.daemon.common.config import NeuronConfig, ServerSection, load_neuron_config
from neuron.daemon.server import Daemon

from tests.access.raw import Answer, ask
from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.fake_openai import FakeOpenAI
from tests.cortex_gateway.fake_openai import listening as openai_listening
from tests.neuron.daemon.api.harness import RunningNeuron, make_checkpoint, run_neuron

OLD, NEW, WRONG = "the-first-secret-of-the-fleet", "the-second-secret-of-the-fleet", "somebody-elses-secret"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("secrets") / "checkpoint")


@asynccontextmanager
async def gateway_to(
    folder: Path, url: str, *lines: str, kind: str = "neuron", neuron: str = ""
) -> AsyncIterator[RunningGateway]:
    """A gateway from files, which has asked its one node. lines: of [gateway]; neuron: of its entry."""
    file = folder / "cortex.toml"
    own = "\n".join(lines)
    file.write_text(
        f'models_config = "models.toml"\n[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
        f"config_watch_s = 0.02\n{own}\n[poll]\ninterval_s = 0.1\n[capture]\nexchanges = 10\n"
        f'[[neurons]]\nname = "alpha"\nkind = "{kind}"\nendpoint = "{url}"\n{neuron}\n'
    )
    value = read_configuration(file)
    async with running(value.config, value.catalogue, grace_s=0, config_path=file) as started:
        await settled(started)
        yield started


async def settled(started: RunningGateway, *healths: str) -> str:
    """The node's health once it is one of these, or any but `unknown`."""
    fleet = started.gateway.fleet
    while True:
        health = fleet.snapshot.nodes["alpha"].health
        if health in healths or (not healths and health != "unknown"):
            return health
        await fleet.changed()


def chat(neuron: RunningNeuron, **fields: Any) -> dict[str, Any]:
    return {**neuron.chat(), **fields}


async def ask_gateway(started: RunningGateway, neuron: RunningNeuron, **fields: Any) -> Answer:
    return await ask(started.url, "POST", "/v1/chat/completions", chat(neuron, **fields))


def principals(caplog: pytest.LogCaptureFixture) -> list[str | None]:
    """Who the neuron took the callers of its last requests for."""
    lines = [record.getMessage() for record in caplog.records if record.name == "neuron.request"]
    return [match[1] if (match := re.search(r" principal=(\S+)", line)) else None for line in lines]


async def command_line(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cortex_cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200"},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


# ---------------------------------------------------------------------------------------------- who is believed


CLAIMS = (("x-cortex-principal", "boss"), ("x-cortex-hop", "1"))


@pytest.mark.parametrize("mode", ["none", "accept", "warn", "require"])
async def test_O13_claims_are_believed_of_those_who_know_the_secret(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FLEET", OLD)
    own = {} if mode == "none" else {"secret": "env:FLEET", "secret_mode": mode}
    async with run_neuron(checkpoint, **own) as neuron:
        for secret, is_right in ((None, False), (WRONG, False), ("", False), (OLD, True), (f"{WRONG}, {OLD}", True)):
            headers = (*CLAIMS, *((("x-cortex-secret", secret),) if secret is not None else ()))
            answer = await ask(neuron.url, "POST", "/v1/chat/completions", chat(neuron, stream=True), headers=headers)
            if mode == "require" and not is_right:
                code = "secret_missing" if secret is None else "secret_wrong"
                assert (answer.status, answer.code) == (401, code)
                continue
            assert answer.status == 200
            is_believed = is_right or mode == "none"
            assert (b": cortex-stream" in answer.body) == is_believed, (mode, secret)
            assert ("account:boss" in principals(caplog)[-1:]) == is_believed, (mode, secret)
        # What continues a stream is a claim as well: read as a body, it is none.
        resumed = await ask(
            neuron.url,
            "POST",
            "/v1/chat/completions",
            chat(neuron),
            headers=(("x-cortex-hop", "1"), ("x-cortex-resume", "9" * 9)),
        )
        assert resumed.status == {"none": 400, "accept": 200, "warn": 200, "require": 401}[mode]
        # Any caller may name any model: that is none.
        model = {**chat(neuron), "model": "some-alias"}
        aliased = await ask(
            neuron.url, "POST", "/v1/chat/completions", model, headers=(("x-cortex-resolved-model", neuron.model),)
        )
        assert aliased.status == (401 if mode == "require" else 200)
        metrics = neuron.daemon.services.metrics
        refused = metrics.access_refused.labels("secret_wrong")._value.get()
        unproven = metrics.access_unproven.labels("secret_wrong")._value.get()
        assert (refused, unproven) == {"none": (0, 0), "accept": (0, 0), "warn": (0, 2), "require": (2, 0)}[mode]
    warned = [record.getMessage() for record in caplog.records if record.name == "neuron.daemon.api.access"]
    assert bool(warned) == (mode in ("warn", "require"))
    assert ("would be refused once server.secret_mode is `require`" in " ".join(warned)) == (mode == "warn")
    assert OLD not in caplog.text and WRONG not in caplog.text


async def test_O13_only_that_there_is_a_neuron_is_told_without_the_secret(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET", OLD)
    async with run_neuron(checkpoint, load=False, secret="env:FLEET") as neuron:
        answer = await ask(neuron.url, "GET", "/")
        assert answer.status == 200 and set(json.loads(answer.body)) == {"name", "version", "status"}
        assert (await ask(neuron.url, "HEAD", "/")).status == 200
        for path in ("/health", "/metrics", "/models", "/version", "/discovery", "/nothing", "//", "/./", "/?x"):
            assert (await ask(neuron.url, "GET", path)).status == (200 if path == "/?x" else 401), path


# ---------------------------------------------------------------------------------------------- between the two


@pytest.mark.parametrize(
    ("mode", "sent", "outcome"),
    [
        ("none", None, "believed"),
        ("none", OLD, "believed"),
        ("accept", OLD, "believed"),
        ("warn", OLD, "believed"),
        ("require", OLD, "believed"),
        ("accept", None, "served"),  # a gateway of 7d1037b, which knows of no secret
        ("warn", None, "served"),
        ("accept", WRONG, "served"),
        ("warn", WRONG, "served"),
        ("require", None, "secret_missing"),
        ("require", WRONG, "secret_wrong"),
    ],
)
async def test_O13_a_gateway_and_a_neuron(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    sent: str | None,
    outcome: str,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FLEET", OLD)
    monkeypatch.setenv("SENT", sent or "")
    own = {} if mode == "none" else {"secret": "env:FLEET", "secret_mode": mode}
    lines = () if sent is None else ('secret = "env:SENT"',)
    async with run_neuron(checkpoint, **own) as neuron, gateway_to(tmp_path, neuron.url, *lines) as started:
        fleet = json.loads((await ask(started.url, "GET", "/admin/fleet")).body)["nodes"][0]
        health = json.loads((await ask(started.url, "GET", "/health")).body)
        if outcome in ("believed", "served"):
            assert (fleet["health"], fleet["refusal"], health["status"]) == ("healthy", None, "ok")
            plain = await ask_gateway(started, neuron)
            stream = await ask_gateway(started, neuron, stream=True)
            assert plain.status == stream.status == 200 and stream.body.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
            assert b"cortex-stream" not in stream.body
            # The neuron's marks are what the gateway counts by, where it was believed.
            tokens = started.gateway.metrics.completion_tokens.labels(neuron.model, "alpha")._value.get()
            assert tokens == (6 if outcome == "believed" else 3)
            pinned = await ask(started.url, "POST", "/admin/models/pin", {"model": neuron.model})
            assert pinned.status == 200 and neuron.served.is_pinned
        else:
            assert (fleet["health"], fleet["refusal"], health["status"]) == ("refusing", outcome, "degraded")
            assert "x-cortex-secret" in fleet["last_error"]
            assert health["refusing"] == [{"node": "alpha", "reason": outcome}]
            metrics = (await ask(started.metrics_url, "GET", "/metrics")).body.decode()
            assert 'cortex_node_refusing{node="alpha"} 1.0' in metrics
            assert 'cortex_node_healthy{node="alpha"} 0.0' in metrics
            assert any(f"node alpha refuses this gateway ({outcome})" in each.getMessage() for each in caplog.records)
            assert (await ask_gateway(started, neuron)).status == 503
            for arguments, reason in ((("status",), outcome), (("top", "--once"), "x-cortex-secret")):
                shown = await command_line(*arguments, "-e", started.url)
                assert "refusing" in shown and reason in shown, shown
            assert neuron.daemon.services.metrics.access_refused.labels(outcome)._value.get() > 0
        seen = caplog.text + json.dumps([fleet, health])
        assert OLD not in seen and WRONG not in seen


async def test_O13_a_secret_is_exchanged_under_load_without_a_restart_or_a_refusal(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The steps of the guide: neurons learn the new one, gateways send the new one, neurons forget the old one."""
    theirs, ours = tmp_path / "neuron-secret", tmp_path / "gateway-secret"
    theirs.write_text(OLD), ours.write_text(OLD)
    more = tmp_path / "neuron-secret-2"
    more.write_text(OLD)
    async with (
        run_neuron(checkpoint, secret=(f"file:{theirs}", f"file:{more}")) as neuron,
        gateway_to(tmp_path, neuron.url, f'secret = "file:{ours}"') as started,
    ):

        async def is_served() -> bool:
            return (await ask_gateway(started, neuron)).status == 200

        assert await is_served()
        more.write_text(NEW)
        assert await is_served()
        ours.write_text(NEW)
        client = started.gateway._neurons["alpha"]
        while started.gateway._neurons["alpha"] is client:
            assert await is_served()
        theirs.write_text(NEW)
        assert await is_served()
        assert neuron.daemon.services.metrics.access_refused.labels("secret_wrong")._value.get() == 0
        assert (await ask(neuron.url, "GET", "/models", headers=(("x-cortex-secret", OLD),))).status == 401
        assert (await ask(neuron.url, "GET", "/models", headers=(("x-cortex-secret", NEW),))).status == 200
        # What cannot be read is no reason to forget what is known.
        for broken in ("", "two\nlines", "\xff"):
            theirs.write_text(broken, encoding="latin-1")
            assert await is_served()
        theirs.unlink()
        assert await is_served()


async def test_O13_a_neuron_that_begins_to_refuse_is_seen_and_comes_back(checkpoint: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "neuron-secret"
    theirs.write_text(OLD)
    (tmp_path / "ours").write_text(OLD)
    async with (
        run_neuron(checkpoint, secret=f"file:{theirs}") as neuron,
        gateway_to(tmp_path, neuron.url, 'secret = "file:ours"') as started,
    ):
        assert await settled(started, "healthy")
        theirs.write_text(NEW)
        assert await settled(started, "refusing")
        theirs.write_text(OLD)
        assert await settled(started, "healthy")
        assert (await ask_gateway(started, neuron)).status == 200


async def test_O13_a_request_that_meets_a_refusal_goes_elsewhere_and_its_client_reads_nothing_of_it(
    neuron: FakeNeuron, second: FakeNeuron, start: Any
) -> None:
    """Between two polls a neuron may begin to refuse. A 401 would tell a client that its own key is wrong."""

    async def refuse(request: web.Request) -> web.Response:
        error = {"message": "no", "type": "authentication_error", "param": None, "code": "secret_wrong"}
        return web.json_response({"error": error}, status=401)

    neuron.have("m")
    neuron.answer = refuse
    client = await start(neuron)
    body = {"model": "m", "messages": []}
    answer = await ask(client.url, "POST", "/v1/chat/completions", body)
    assert (answer.status, answer.code) == (502, "neuron_refuses_gateway")
    second.have("m")
    client = await start(neuron, second)
    neuron.models["m"]["status"] = "failed"  # as its next poll would find
    answers = [await ask(client.url, "POST", "/v1/chat/completions", body) for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4


async def test_H6_a_node_that_does_not_answer_to_its_name_says_so_with_the_line_to_add(
    checkpoint: Path, tmp_path: Path
) -> None:
    async with run_neuron(checkpoint, load=False) as neuron:
        # As a gateway finds it whose configuration names a host that resolves to this one.
        port = neuron.url.rpartition(":")[2]
        async with gateway_to(tmp_path, f"http://neuron.lab.example:{port}") as started:
            client = started.gateway._neurons["alpha"]
            client._urls.clear()
            client._base = neuron.url
            client.secret_headers = {"host": f"neuron.lab.example:{port}"}
            assert await settled(started, "refusing")
            (node,) = json.loads((await ask(started.url, "GET", "/admin/fleet")).body)["nodes"]
            assert node["refusal"] == "host_not_allowed"
            assert "neuron.lab.example" in node["last_error"] and "server.allowed_hosts" in node["last_error"]


# ---------------------------------------------------------------------------------------------- where it goes


async def test_O13_the_secret_goes_to_neurons_alone_and_follows_no_redirect(
    neuron: FakeNeuron, second: FakeNeuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET", OLD)
    monkeypatch.setenv("OWN", NEW)
    neuron.have("m")
    second.have("m")
    body = {"model": "m", "messages": []}

    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect(second.url + request.path)

    async with gateway_to(tmp_path, neuron.url, 'secret = ["env:FLEET"]') as started:
        assert (await ask(started.url, "POST", "/v1/chat/completions", body)).status == 200
        assert neuron.requests[-1][1]["x-cortex-secret"] == OLD
        neuron.answer = redirect
        assert (await ask(started.url, "POST", "/v1/chat/completions", body)).status >= 300
        assert second.requests == []
    neuron.answer = None
    for lines, entry, sent in (
        (['secret = ["env:FLEET", "env:OWN"]'], "", f"{OLD}, {NEW}"),
        (['secret = "env:FLEET"'], 'secret = "env:OWN"', NEW),
        (['secret = "env:FLEET"'], "secret = []", None),
        ([], 'secret = "env:OWN"', NEW),
        ([], "", None),
    ):
        async with gateway_to(tmp_path, neuron.url, *lines, neuron=entry) as started:
            # A client's own is not passed on.
            spoofed = (("x-cortex-secret", WRONG),)
            answer = await ask(started.url, "POST", "/v1/chat/completions", body, headers=spoofed)
            assert answer.status == 200
            assert neuron.requests[-1][1].get("x-cortex-secret") == sent
    async with openai_listening(FakeOpenAI()) as server:
        async with gateway_to(tmp_path, server.url, 'secret = "env:FLEET"', kind="openai") as started:
            asked = {"model": server.models[0]["id"], "messages": [{"role": "user", "content": "hi"}]}
            assert (await ask(started.url, "POST", "/v1/chat/completions", asked)).status == 200
        assert server.requests and server.polls
        seen = str([headers for _, headers, *_ in (*server.requests, *server.polls)]).lower()
        assert OLD not in seen and "x-cortex-secret" not in seen


async def test_O13_no_secret_is_shown_by_captures_errors_or_the_view_of_the_fleet(
    neuron: FakeNeuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that repeats what it was sent, as debugging proxies do."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FLEET", OLD)
    neuron.have("m")

    async def repeat(request: web.Request) -> web.Response:
        sent = "; ".join(f"{name}: {value}" for name, value in request.headers.items())
        return web.json_response({"error": {"message": sent, "type": "x", "code": "x"}}, status=400)

    neuron.answer = repeat
    async with gateway_to(tmp_path, neuron.url, 'secret = "env:FLEET"') as started:
        spoofed = (("x-cortex-secret", OLD),)
        body = {"model": "m", "messages": []}
        answer = await ask(started.url, "POST", "/v1/chat/completions", body, headers=spoofed)
        assert answer.status == 400 and b"***" in answer.body
        captures = await ask(started.url, "GET", "/admin/captures")
        (capture,) = json.loads(captures.body)["captures"]
        shown = [answer, await ask(started.url, "GET", f"/admin/captures/{capture['id']}")]
        neuron.unload_error = (409, {"error": f"in flight; {OLD}"})
        shown.append(await ask(started.url, "POST", "/admin/models/unload", {"model": "m"}))
        shown.append(await ask(started.url, "GET", "/admin/fleet"))
        shown.append(await ask(started.url, "GET", "/admin/log"))
        shown.append(await ask(started.metrics_url, "GET", "/metrics"))
    assert b"[removed]" in shown[1].body
    assert not [each for each in shown if OLD.encode() in each.body]
    assert OLD not in caplog.text


# ---------------------------------------------------------------------------------------------- settings


def test_O13_a_secret_that_is_not_where_it_should_be_is_refused_at_start_and_none_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "secret").write_text("\n")
    (tmp_path / "cortex.toml").write_text(
        '[gateway]\nsecret = ["env:NOWHERE", "file:secret"]\n[[neurons]]\nname = "a"\nendpoint = "http://a"\n'
        '[[neurons]]\nname = "b"\nendpoint = "http://b"\n'
    )
    with pytest.raises(ConfigError) as refused:
        read_configuration(tmp_path / "cortex.toml")
    assert len(refused.value.faults) == 2 and all("gateway.secret: " in fault for fault in refused.value.faults)
    (tmp_path / "neuron.toml").write_text('[server]\nsecret = ["env:NOWHERE", "file:secret"]\n')
    config = load_neuron_config(tmp_path / "neuron.toml", environ={})
    assert config.server.secret_mode == "require"
    with pytest.raises(ConfigError) as refused:
        Daemon(config)
    assert len(refused.value.faults) == 2 and all("server.secret: " in fault for fault in refused.value.faults)
    for text in ('secret = "plain"', "secret = 1", 'secret = ["plain"]', 'secret_mode = "maybe"'):
        (tmp_path / "neuron.toml").write_text(f"[server]\n{text}\n")
        with pytest.raises(ConfigError) as refused:
            load_neuron_config(tmp_path / "neuron.toml", environ={})
        assert "plain" not in str(refused.value)
    (tmp_path / "cortex.toml").write_text(
        '[[neurons]]\nname = "a"\nkind = "openai"\nendpoint = "http://a"\nsecret = "env:X"\n'
    )
    with pytest.raises(ConfigError, match="does not go there"):
        load_gateway_config(tmp_path / "cortex.toml", environ={})


@pytest.mark.parametrize("value", ["env:FLEET", '["env:FLEET", "env:OTHER"]'])
def test_O13_the_environment_may_say_where_the_secret_is(value: str) -> None:
    expected = json.loads(value) if value.startswith("[") else value
    config = load_neuron_config(None, environ={"NEURON_SERVER__SECRET": value})
    assert config.server.secret == (tuple(expected) if isinstance(expected, list) else expected)
    gateway = load_gateway_config(None, environ={"CORTEX_GATEWAY__SECRET": value})
    assert gateway.gateway.secret == config.server.secret


def test_O13_a_secret_that_can_be_guessed_is_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuron.daemon.api.fleet_secret import FleetSecret

    for secret, is_weak in (("short", True), ("a" * 32, False)):
        monkeypatch.setenv("FLEET", secret)
        caplog.clear()
        FleetSecret("env:FLEET", "require", environ={"FLEET": secret})
        assert ("can be guessed" in caplog.text) == is_weak
    assert NeuronConfig(server=ServerSection()).server.secret == ()


async def test_O13_whatever_stands_in_the_place_of_a_secret_the_neuron_goes_on(tmp_path: Path) -> None:
    """Its files are looked at with each request, so a read that waits would stop everything."""
    from neuron.daemon.api.fleet_secret import FleetSecret

    file = tmp_path / "secret"
    file.write_text("a" * 32)
    secret = FleetSecret(f"file:{file}", "require", environ={})
    headers = [(SECRET_HEADER.encode(), b"a" * 32)]

    def fifo() -> None:
        os.mkfifo(file)

    def endless() -> None:
        with file.open("wb") as sparse:
            sparse.truncate(2**40)

    for put in (fifo, endless, file.mkdir, partial(file.symlink_to, "/dev/zero")):
        file.unlink()
        put()
        async with asyncio.timeout(20):
            assert await asyncio.to_thread(secret.standing, headers) == "proven", "what was known stays"
        if file.is_dir():
            file.rmdir()
            file.touch()
    file.unlink()
    file.write_text("b" * 32)
    assert secret.standing(headers) == "wrong"
