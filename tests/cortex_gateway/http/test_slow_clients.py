"""Large, slow and stuck clients on real sockets: what they may hold is bounded in size and in time."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from aiohttp import web
from cortex_core.hop import ChoiceTokens, StreamHead, stream_comment, tokens_comment

from tests.cortex_gateway.fake_neuron import OPENAI_END, FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start

STREAM = {"model": MODEL, "messages": [], "stream": True}
EVENT = b"data: " + b"x" * 60_000 + b"\n\n"


@pytest.fixture(params=["httptools", "h11"])
def start(start: Start, request: pytest.FixtureRequest) -> Start:
    """With either parser of HTTP/1: what is held and how a connection ends is theirs to do."""

    async def start_gateway(*neurons: FakeNeuron, gateway: dict[str, Any] | None = None) -> Client:
        return await start(*neurons, gateway={"http1_parser": request.param, **(gateway or {})})

    return start_gateway


async def connect(
    client: Client, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = client.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    return await asyncio.open_connection(sock=connection, limit=2**16 if receive_buffer is None else 1)


def request(body: dict[str, Any], length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    return head % (length if length is not None else len(content)) + content


async def over(client: Client) -> None:
    """Every request has ended, and nothing is held any more."""
    async with asyncio.timeout(30):
        await client.started.gateway.relay.wait_idle()
    assert client.started.gateway.fleet.activity.total_in_flight() == 0
    assert client.started.gateway.relay._body_memory.held == 0


# ---------------------------------------------------------------------------------------------- headers


async def test_headers_beyond_64_KiB_are_a_431(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    reader, writer = await connect(client)
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 70_000)
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 431")
        await reader.read()
    writer.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/messages HTTP/1.1\r\nhost: x\r\n"])
async def test_headers_that_do_not_end_are_given_up(
    neuron: FakeNeuron, start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("cortex_gateway.server.KEEP_ALIVE_S", 0.3)
    client = await start(neuron)
    reader, writer = await connect(client)
    writer.write(sent)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    writer.close()


# ---------------------------------------------------------------------------------------------- bodies


async def test_all_bodies_together_are_bounded_and_given_back(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, gateway={"max_body_memory_bytes": 1_000_000})
    _, slow = await connect(client)
    slow.write(request(STREAM, 900_000) + b" " * 700_000)
    memory = client.started.gateway.relay._body_memory
    async with asyncio.timeout(20):
        while memory.held < 700_000:
            await asyncio.sleep(0.01)  # until the gateway has read it
    body = {"model": MODEL, "messages": [], "padding": "x" * 400_000}
    async with client.post("/v1/chat/completions", body) as response:
        document = json.loads(await response.read())
        assert (response.status, document["error"]["code"]) == (503, "body_memory_full")
        assert int(response.headers["retry-after"]) > 0
    async with client.post("/v1/messages", body) as response:
        assert response.status == 529
    assert (await client.chat())[0] == 200, "small ones still fit"
    slow.transport.abort()
    await over(client)
    async with client.post("/v1/chat/completions", body) as response:
        assert response.status == 200
    await over(client)


async def test_a_body_counts_until_its_request_is_over(neuron: FakeNeuron, start: Start) -> None:
    """It is kept for another try, so it is memory all the while."""
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, gateway={"max_body_memory_bytes": 1_000_000})
    asking = asyncio.ensure_future(client.chat(padding="x" * 700_000))
    await neuron.request_arrived.wait()
    assert (await client.chat(padding="x" * 400_000))[0] == 503
    neuron.answer_gate.set()
    assert (await asking)[0] == 200
    await over(client)


# ---------------------------------------------------------------------------------------------- readers


class Flood:
    """A neuron that streams as fast as it is read, up to `num_events`; `blocked` once nobody takes any more."""

    def __init__(self, num_events: int, *, marked: bool = False) -> None:
        self.num_events = num_events
        self.num_bytes = 0
        self.marked = marked
        self.blocked = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        if self.marked:
            await response.write(stream_comment(StreamHead("chatcmpl-1", 5, (7,))))
        mark = tokens_comment([ChoiceTokens(0, [1])]) if self.marked else b""
        for _ in range(self.num_events):
            writing = asyncio.ensure_future(response.write(EVENT + mark))
            done, _ = await asyncio.wait({writing}, timeout=0.5)
            if not done:
                self.blocked.set()
            await writing
            self.num_bytes += len(EVENT)
        await response.write(OPENAI_END)
        await response.write_eof()
        return response


async def test_a_client_that_does_not_read_stops_the_neuron_and_little_is_held(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    neuron.answer = flood = Flood(10_000)
    client = await start(neuron)
    _, writer = await connect(client, 4096)
    writer.write(request(STREAM))
    async with asyncio.timeout(60):
        await flood.blocked.wait()
    # 600 MB were to come; what came fills the buffers of three sockets, most of it in the kernel.
    assert flood.num_bytes < 20_000_000
    exchange = next(iter(client.started.gateway.relay._active))
    assert exchange.stream is not None and len(exchange.stream._held) < 2**20
    writer.transport.abort()
    async with asyncio.timeout(30):
        await neuron.request_aborted.wait()
    await over(client)


async def test_a_client_that_reads_nothing_for_too_long_is_cut_off_and_no_neuron_is_blamed(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    neuron.answer = Flood(10_000, marked=True)
    client = await start(neuron, gateway={"write_timeout_s": 1.5, "stream_silence_s": 0.4})
    _, writer = await connect(client, 4096)
    writer.write(request(STREAM))
    async with asyncio.timeout(60):
        await neuron.request_aborted.wait()
    await over(client)
    assert await client.metric("cortex_client_gone_total", model=MODEL) == 1
    assert not await client.metric("cortex_request_errors_total", model=MODEL)
    assert len(neuron.requests) == 1
    neuron.answer = None
    assert (await client.chat())[0] == 200, "no breaker has opened"
    writer.close()


async def test_a_client_that_pauses_gets_everything_in_the_end(neuron: FakeNeuron, start: Start) -> None:
    """Its pause is not the neuron's silence: nothing is cut, nothing is asked again."""
    neuron.have(MODEL)
    neuron.answer = flood = Flood(300, marked=True)
    client = await start(neuron, gateway={"stream_silence_s": 0.3, "upstream_idle_timeout_s": 0.4})
    async with client.post("/v1/chat/completions", STREAM) as response:
        async with asyncio.timeout(60):
            await flood.blocked.wait()
        await asyncio.sleep(1.2)  # longer than any silence that is allowed a neuron
        assert await response.read() == EVENT * 300 + OPENAI_END
    assert len(neuron.requests) == 1
    await over(client)
