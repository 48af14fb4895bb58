"""A connection of the gateway: what is handed to hypercorn, and its end."""

from __future__ import annotations

import asyncio
from typing import get_args

import h2.config
import h2.connection
import h2.events
import pytest
from cortex_core.config import ConfigError
from cortex_core.gateway_config import Http1Parser
from cortex_gateway import server
from cortex_gateway.http.asgi import Receive, Scope, Send
from cortex_gateway.http.http1 import gateway_connection

from tests.cortex_gateway.http.http1.harness import CLOSING, SMUGGLED, Server, post, serving


@pytest.mark.parametrize("num_before", [0, 1])
async def test_the_body_of_an_upgrade_is_not_taken_for_a_request(served: Server, num_before: int) -> None:
    """Java's HTTP client asks for h2c with every request. llhttp would take the body for the other protocol."""
    reader, writer = await served.connect()
    for _ in range(num_before):
        writer.write(post(path=b"/?framed"))
        assert (await reader.readuntil(b"/ abc")).startswith(b"HTTP/1.1 200")
    settings = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAAP__")
    writer.write(post(SMUGGLED, *settings) + CLOSING)
    async with asyncio.timeout(20):
        assert (await reader.read()).count(b"HTTP/1.1 200") == 2
    assert [body for *_, body in served.seen[num_before:]] == [SMUGGLED, b""]
    writer.close()


async def test_an_upgrade_sent_ahead_is_refused(strict: Server) -> None:
    answer = await strict.ask(post() + post(SMUGGLED, b"connection: upgrade", b"upgrade: h2c"))
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]
    assert strict.seen == [("POST", "/", b"", b"abc")]


async def test_a_websocket_is_hypercorns(served: Server) -> None:
    reader, writer = await served.connect()
    writer.write(
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 403")
    assert served.scopes[0]["type"] == "websocket"
    writer.close()


@pytest.mark.parametrize("cut", [2, 10, 100])
async def test_http_2_with_prior_knowledge_is_hypercorns(served: Server, cut: int) -> None:
    reader, writer = await served.connect()
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    headers = [(":method", "GET"), (":path", "/two"), (":scheme", "http"), (":authority", "x")]
    client.send_headers(1, headers, end_stream=True)
    data = client.data_to_send()
    writer.write(data[:cut])
    await asyncio.sleep(0.02)  # so that it may come in two pieces; right either way
    writer.write(data[cut:])
    body = b""
    async with asyncio.timeout(20):
        while b"/two " not in body:
            for event in client.receive_data(await reader.read(65536)):
                if isinstance(event, h2.events.DataReceived):
                    body += event.data
    assert served.scopes[0]["http_version"] == "2"
    writer.close()


async def test_an_idle_connection_ends_with_the_server_and_a_busy_one_after_its_answer(served: Server) -> None:
    go_on, asked = asyncio.Event(), asyncio.Event()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        asked.set()
        await go_on.wait()
        await served.echo(scope, receive, send)

    served.app = late
    silent, silent_writer = await served.connect()
    busy, busy_writer = await served.connect()
    busy_writer.write(post(path=b"/?framed"))
    await asked.wait()
    served.stop.set()
    async with asyncio.timeout(20):
        assert await silent.read() == b""
        go_on.set()
        assert (await busy.read()).endswith(b"/ abc")
    silent_writer.close()
    busy_writer.close()


async def test_a_connection_without_a_request_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.2)
    async with serving("httptools") as served:
        assert (await served.ask(post(path=b"/?framed"))).endswith(b"/ abc")
        assert await served.ask(b"GET / HTTP/1.1\r\nhost: x\r\na") == b""
        assert await served.ask(b"") == b""


def test_a_parser_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [gateway_connection.has_httptools(parser) for parser in ("auto", "h11")] == [False, False]
    with pytest.raises(ConfigError, match="http1_parser"):
        gateway_connection.has_httptools("httptools")
    assert set(get_args(Http1Parser)) == {"auto", "h11", "httptools"}
