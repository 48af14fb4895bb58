"""Those who are to get in: programs, reverse proxies, names of a private network, the command line, SDKs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import h2.config
import h2.connection
import h2.events
import openai
import pytest
from cortex_core.config import ConfigError
from cortex_core.gateway_config import load_gateway_config
from cortex_gateway.configuration.current import read_configuration
from cortex_gateway.server import running
from neuron.daemon.common.config import load_neuron_config

from tests.access.proxy import PUBLIC_NAME, proxy_for
from tests.access.raw import ask
from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start
from tests.neuron.daemon.api.harness import make_checkpoint, run_neuron

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
LINE = re.compile(r"put into \[(\w+)\]: (\w+ = \[.*\])$")


def gateway_file(folder: Path, neuron: FakeNeuron, *lines: str) -> Path:
    file = folder / "cortex.toml"
    own = "\n".join(lines)
    file.write_text(
        f'models_config = "none.toml"\n[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n{own}\n'
        f'[[neurons]]\nname = "alpha"\nendpoint = "{neuron.url}"\n'
    )
    return file


def advised(caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """Table and line that the last refusal says are to be added."""
    found = [match for record in caplog.records if (match := LINE.search(record.getMessage()))]
    return found[-1][1], found[-1][2]


# ---------------------------------------------------------------------------------------------- reverse proxies


async def test_H6_a_reverse_proxy_that_passes_its_name_on_works_with_the_line_from_the_log(
    neuron: FakeNeuron,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    neuron.have(MODEL)
    lines: tuple[str, ...] = ()
    page = (("origin", f"https://{PUBLIC_NAME}"), ("sec-fetch-site", "same-origin"))
    for status in (421, 200):
        config = load_gateway_config(gateway_file(tmp_path, neuron, *lines), environ={})
        async with running(config, grace_s=0) as started, proxy_for(started.url, passes_host=True) as url:
            for headers in ((), page):
                answer = await ask(url, "POST", "/v1/chat/completions", CHAT, host=PUBLIC_NAME, headers=headers)
                assert answer.status == status, answer
            metrics = await ask(started.metrics_url, "GET", "/metrics", host=PUBLIC_NAME)
            assert metrics.status == status
            # Whoever comes through a proxy is no operator, though the proxy runs on this machine.
            admin = await ask(url, "GET", "/admin/fleet", host=PUBLIC_NAME)
            assert admin.status == (421 if status == 421 else 403)
        table, line = advised(caplog)
        assert table == "gateway"
        lines = (line,)


async def test_H6_a_reverse_proxy_that_asks_by_the_address_works_as_it_is(
    neuron: FakeNeuron,
    start: Start,
) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    async with proxy_for(client.url, passes_host=False) as url:
        assert (await ask(url, "POST", "/v1/chat/completions", CHAT, host=PUBLIC_NAME)).status == 200
        # Its pages are pages of elsewhere here, until they are listed.
        page = (("origin", f"https://{PUBLIC_NAME}"),)
        assert (await ask(url, "POST", "/v1/chat/completions", CHAT, host=PUBLIC_NAME, headers=page)).status == 403


async def test_H6_a_page_that_is_listed_uses_the_api_and_reads_its_answers(
    neuron: FakeNeuron,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    neuron.have(MODEL)
    lines: tuple[str, ...] = ()
    page = (("origin", "https://app.example"),)
    for status in (403, 200):
        config = load_gateway_config(gateway_file(tmp_path, neuron, *lines), environ={})
        async with running(config, grace_s=0) as started:
            answer = await ask(started.url, "POST", "/v1/chat/completions", CHAT, headers=page)
            assert answer.status == status
            stream = await ask(started.url, "POST", "/v1/messages", {**CHAT, "stream": True}, headers=page)
            assert stream.status == status
            bad = await ask(started.url, "POST", "/v1/chat/completions", {"model": "nobody"}, headers=page)
            for seen in (answer, stream, bad) if status == 200 else ():
                assert seen.headers["access-control-allow-origin"] == "https://app.example"
                assert seen.headers["vary"] == "origin"
            assert (await ask(started.url, "GET", "/admin/fleet", headers=page)).status == 403
            assert (await ask(started.metrics_url, "GET", "/metrics", headers=page)).status == 403
        if status == 403:
            lines = (advised(caplog)[1],)


# ---------------------------------------------------------------------------------------------- names


async def test_H6_names_of_a_private_network_get_in(
    neuron: FakeNeuron,
    start: Start,
    tmp_path: Path,
) -> None:
    """What a gateway's configuration and people's clients name hosts by; a domain of one's own takes a line."""
    neuron.have(MODEL)
    hosts = ["gpu1:13131", "GPU1", "gpu1.local:13131", "localhost", "localhost.", "app.localhost", os.uname().nodename]
    client = await start(neuron)
    async with run_neuron(make_checkpoint(tmp_path / "a")) as running_neuron:
        for host in (*hosts, None):
            version = "1.1" if host is not None else "1.0"  # without a name it is no browser
            for url in (client.url, running_neuron.url):
                assert (await ask(url, "GET", "/v1/models", host=host, version=version)).status == 200, (url, host)
        for url in (client.url, running_neuron.url):
            assert (await ask(url, "GET", "/v1/models", host="gpu1.lan:13131")).status == 421
    client = await start(neuron, gateway={"allowed_hosts": ["gpu1.lan"]})
    async with run_neuron(make_checkpoint(tmp_path / "b"), allowed_hosts=("*.lan",)) as running_neuron:
        for url in (client.url, running_neuron.url):
            assert (await ask(url, "GET", "/v1/models", host="gpu1.lan:13131")).status == 200
            assert (await ask(url, "GET", "/v1/models", host="evil.example")).status == 421


async def test_H6_a_star_answers_to_every_name(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, gateway={"allowed_hosts": ["*"]})
    assert (await ask(client.url, "GET", "/v1/models", host="evil.example")).status == 200
    assert (await ask(client.url, "GET", "/v1/models", host="a b")).status == 400


@pytest.mark.parametrize("parser", ["h11", "httptools"])
async def test_H6_what_is_asked_for_in_two_ways_is_refused_by_either_parser(
    neuron: FakeNeuron,
    start: Start,
    parser: str,
    tmp_path: Path,
) -> None:
    client = await start(neuron, gateway={"http1_parser": parser})
    own = client.url.removeprefix("http://")
    async with run_neuron(make_checkpoint(tmp_path / "a")) as running_neuron:
        for url in (client.url, running_neuron.url):
            for target, host in (
                ("http://evil.example/v1/models", own),
                (f"http://{own}/v1/models", "evil.example"),
                (f"http://{own}@evil.example/v1/models", own),
            ):
                assert (await ask(url, "GET", target, host=host)).status in (400, 421), (url, target)
            twice = await ask(url, "GET", "/v1/models", headers=(("host", "evil.example"),))
            assert twice.status == 400
    assert (await ask(client.url, "GET", f"{client.url}/v1/models")).status == (200 if parser == "httptools" else 404)


async def test_H6_the_name_counts_in_http_2_too(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    for authority, status in ((client.url.removeprefix("http://"), b"200"), ("evil.example", b"421")):
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        connection.initiate_connection()
        reader, writer = await asyncio.open_connection("127.0.0.1", int(client.url.rpartition(":")[2]))
        connection.send_headers(
            1,
            [(":method", "GET"), (":path", "/v1/models"), (":scheme", "http"), (":authority", authority)],
            end_stream=True,
        )
        writer.write(connection.data_to_send())
        found = None
        async with asyncio.timeout(20):
            while found is None:
                for event in connection.receive_data(await reader.read(65536)):
                    if isinstance(event, h2.events.ResponseReceived):
                        found = {bytes(name): bytes(value) for name, value in _raw(event.headers)}
        writer.close()
        assert found[b":status"] == status


@pytest.mark.parametrize("parser", ["h11", "httptools"])
@pytest.mark.parametrize("num_before", [0, 1])
async def test_H6_nobody_gets_past_a_reverse_proxy_by_an_upgrade(
    neuron: FakeNeuron, start: Start, parser: str, num_before: int, tmp_path: Path
) -> None:
    """A proxy that passes an upgrade on and sees it granted copies bytes from then on: without `x-forwarded-for`, and
    past whatever it keeps from its clients. On this machine that would be an operator."""
    client = await start(neuron, gateway={"http1_parser": parser})
    async with run_neuron(make_checkpoint(tmp_path / "a")) as running_neuron:
        for url, path in ((client.url, "/admin/fleet"), (running_neuron.url, "/models")):
            inner = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
            settings = inner.initiate_upgrade_connection().decode()
            inner.send_headers(
                3,
                [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "localhost")],
                end_stream=True,
            )
            forwarded = "GET /health HTTP/1.1\r\nhost: localhost\r\nx-forwarded-for: 203.0.113.9\r\n"
            upgrade = f"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: {settings}\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(f"{forwarded}\r\n".encode() * num_before)
            async with asyncio.timeout(20):
                for _ in range(num_before):
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                writer.write(f"{forwarded}{upgrade}\r\n".encode() + inner.data_to_send())
                answers = await reader.read()
            writer.close()
            assert answers.startswith(b"HTTP/1.1 200")
            assert b"HTTP/1.1 101" not in answers and b'"nodes":[' not in answers and b'"servable"' not in answers


def _raw(headers: Any) -> list[tuple[bytes, bytes]]:
    def encoded(text: Any) -> bytes:
        return text if isinstance(text, bytes) else text.encode()

    return [(encoded(name), encoded(value)) for name, value in headers]


async def test_H6_a_reload_brings_names_and_origins(neuron: FakeNeuron, tmp_path: Path) -> None:
    file = gateway_file(tmp_path, neuron)
    before = read_configuration(file)
    page = (("origin", "https://app.example"),)
    async with running(before.config, before.catalogue, grace_s=0, config_path=file) as started:
        assert (await ask(started.url, "GET", "/v1/models", host=PUBLIC_NAME)).status == 421
        gateway_file(tmp_path, neuron, f'allowed_hosts = ["{PUBLIC_NAME}"]', 'allow_origins = ["https://app.example"]')
        assert (await ask(started.url, "POST", "/admin/reload")).status == 200
        assert (await ask(started.url, "GET", "/v1/models", host=PUBLIC_NAME, headers=page)).status == 200


# ---------------------------------------------------------------------------------------------- clients


@pytest.fixture
async def served(neuron: FakeNeuron, start: Start) -> AsyncIterator[Client]:
    neuron.have(MODEL)
    yield await start(neuron)


async def test_H6_the_command_line_gets_in(served: Client) -> None:
    url = served.url.replace("127.0.0.1", "localhost")
    for arguments in (
        ("status", "-e", url),
        ("models", "-e", url),
        ("top", "--once", "-e", url),
        ("pin", MODEL, "-e", url),
        ("logs", "-e", url),
        ("captures", "list", "-e", url),
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "cortex_cli",
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, (arguments, output.decode())


async def test_H6_sdks_get_in(served: Client) -> None:
    url = served.url.replace("127.0.0.1", "localhost")
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content.startswith("42")
    assert [model.id async for model in client.models.list()] == [MODEL]
    other = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)
    events = await other.messages.create(
        model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert [event.type async for event in events][-1] == "message_stop"
    await client.close()
    await other.close()


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('allowed_hosts = ["https://cortex.example"]', "gateway.allowed_hosts: `https://cortex.example`"),
        ('allowed_hosts = ["cortex.example:443"]', "leave the port out"),
        ('allow_origins = ["cortex.example"]', "gateway.allow_origins: `cortex.example` is no origin"),
    ],
)
def test_H6_a_setting_that_cannot_be_meant_is_refused_at_start(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "cortex.toml").write_text(f"[gateway]\n{line}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_gateway_config(tmp_path / "cortex.toml", environ={})
    (tmp_path / "neuron.toml").write_text(f"[server]\n{line}\n")
    with pytest.raises(ConfigError, match=re.escape(said.replace("gateway.", "server."))):
        load_neuron_config(tmp_path / "neuron.toml", environ={})


async def test_O13_the_warnings_are_in_the_log_of_a_start(
    neuron: FakeNeuron,
    start: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    await start(neuron)
    assert not [record for record in caplog.records if record.getMessage().startswith("open: ")]
    await start(neuron, gateway={"listen": "0.0.0.0:0", "metrics_listen": "0.0.0.0:0"})
    opened = [record.getMessage() for record in caplog.records if record.getMessage().startswith("open: ")]
    assert len(opened) == 2 and json.dumps(opened).count("0.0.0.0") == 2


def neuron_command(*arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "neuron", "serve", *arguments], {**os.environ, **environment}


async def test_O13_a_neuron_says_at_start_what_is_open_and_does_not_start_without_its_secret(tmp_path: Path) -> None:
    file = tmp_path / "neuron.toml"
    file.write_text('state_dir = ""\n')
    for host, is_open in (("0.0.0.0", True), ("127.0.0.1", False)):
        command, environment = neuron_command("--config", str(file), "--host", host, "--port", "0")
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert (await ask(line.split()[-1].replace("0.0.0.0", "127.0.0.1"), "GET", "/health")).status == 200
        process.terminate()
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert (f"open: whoever reaches {host} may load" in errors.decode()) == is_open
    file.write_text('state_dir = ""\n[server]\nsecret = "env:NOWHERE"\n')
    command, environment = neuron_command("--config", str(file), "--host", "127.0.0.1", "--port", "0")
    environment.pop("NOWHERE", None)
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert "server.secret: the environment has no variable NOWHERE" in errors.decode()
    assert "Traceback" not in errors.decode()
