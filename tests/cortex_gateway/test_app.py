"""The gateway as one application, from its first request to its drain."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from cortex_core.gateway_config import GatewayConfig, GatewaySection, NeuronEntry
from cortex_gateway.server import running

from tests.cortex_gateway.harness import STREAM

from .fake_neuron import OPENAI_END, FakeNeuron
from .gateway_client import MODEL, Client, Start


async def drain(client: Client, grace_s: float) -> None:
    await client.started.gateway.drain(grace_s)


async def draining(client: Client) -> None:
    async with asyncio.timeout(10):
        while not client.started.gateway.relay.is_draining:
            await asyncio.sleep(0)


async def test_while_draining_health_says_so_and_new_work_is_refused_retryably(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    running_one = asyncio.ensure_future(client.chat())
    await neuron.request_arrived.wait()
    stopping = asyncio.ensure_future(drain(client, 30))
    await draining(client)
    async with client.get("/health") as response:
        assert (response.status, json.loads(await response.read())["status"]) == (503, "draining")
    for path, status in (("/v1/chat/completions", 503), ("/v1/messages", 529)):
        async with client.post(path, {"model": MODEL, "messages": []}) as response:
            document = json.loads(await response.read())
            assert response.status == status, document
            assert int(response.headers["retry-after"]) > 0
            assert response.headers["connection"] == "close"
    neuron.answer_gate.set()
    assert (await running_one)[0] == 200
    await stopping


async def test_streams_get_the_grace_to_finish(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    async with client.post("/v1/chat/completions", STREAM) as response:
        await response.content.readuntil(b"\n\n")
        stopping = asyncio.ensure_future(drain(client, 30))
        await draining(client)
        neuron.answer_gate.set()
        assert (await response.read()).endswith(OPENAI_END)
    await stopping


@pytest.mark.parametrize(("path", "prefix"), [("/v1/chat/completions", b"data: "), ("/v1/messages", b"event: error\n")])
async def test_what_outlasts_the_grace_ends_with_the_dialects_error_event(
    neuron: FakeNeuron, start: Start, path: str, prefix: bytes
) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    async with client.post(path, STREAM) as response:
        await response.content.readuntil(b"\n\n")
        await drain(client, 0)
        text = await response.read()
    last = text.split(b"\n\n")[-2]
    assert last.startswith(prefix) and b"shutting down" in last
    await neuron.request_aborted.wait()


async def test_a_waiting_request_that_outlasts_the_grace_is_a_503(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    asking = asyncio.ensure_future(client.chat())
    await neuron.request_arrived.wait()
    await drain(client, 0)
    status, document = await asking
    assert (status, document["error"]["code"]) == (503, "shutting_down")


async def test_a_client_that_reads_nothing_does_not_keep_the_gateway(
    neuron: FakeNeuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream can be told nothing any more; the process ends all the same."""
    monkeypatch.setattr("cortex_gateway.server.CLOSE_TIMEOUT_S", 0.1)
    neuron.have(MODEL)
    flooding = asyncio.Event()

    async def flood(request: web.Request) -> web.StreamResponse:
        response = await neuron.begin_stream(request)
        while True:
            try:
                async with asyncio.timeout(0.3):
                    await response.write(b"data: " + b"x" * 60_000 + b"\n\n")
            except TimeoutError:  # back-pressure reached the neuron
                flooding.set()
                await asyncio.Event().wait()

    neuron.answer = flood
    config = GatewayConfig(
        gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"),
        neurons=(NeuronEntry(name="alpha", endpoint=neuron.url),),
    )
    async with asyncio.timeout(40):
        async with running(config, grace_s=0) as started:
            host, port = started.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port), limit=1)
            content = json.dumps(STREAM).encode()
            writer.write(
                b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content) + content
            )
            await flooding.wait()
        await neuron.request_aborted.wait()
    writer.transport.abort()
    # What is left of the connection ends with it, in a process by its exit.
    if left := {task for task in asyncio.all_tasks() if task.get_name() == "listener"}:
        await asyncio.wait(left)
