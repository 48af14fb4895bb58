"""One request through a real gateway to a neuron on a real socket, in every phase and both dialects."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web
from cortex_core.catalogue import Catalogue, ModelProfile

from tests.cortex_gateway.fake_neuron import ANTHROPIC_END, ANTHROPIC_EVENTS, OPENAI_END, OPENAI_EVENTS, FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until
from tests.cortex_gateway.relay.harness import CHAT, MESSAGES, STREAMS, body, read_events, records


async def released(client: Client) -> None:
    """All accounting is back to zero."""
    async with asyncio.timeout(10):
        await client.started.gateway.relay.wait_idle()
    assert client.started.gateway.fleet.activity.total_in_flight() == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/chat/completions", "/messages"])
async def test_every_route_and_its_spelling_without_v1_reaches_the_neuron(
    neuron: FakeNeuron, start: Start, path: str
) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    async with client.post(path + "?beta=true", body()) as response:
        assert response.status == 200
    assert neuron.requests[0][0] == "/v1/" + path.removeprefix("/v1").lstrip("/")


async def test_count_tokens_is_sent_to_a_node_that_has_the_model(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    second.have(MODEL)
    client = await start(neuron, second)
    async with client.post("/v1/messages/count_tokens?beta=true", body()) as response:
        assert response.status == 200
    assert [request[0] for request in second.requests] == ["/v1/messages/count_tokens"]
    assert not neuron.requests


async def test_a_surface_the_neuron_does_not_have_is_a_typed_404(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    async with client.post("/v1/responses", body()) as response:
        error = json.loads(await response.read())["error"]
    assert (response.status, error["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_answer_begins_ends_the_request_on_the_neuron(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture, path: str, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    neuron.have(MODEL)
    never = asyncio.Event()

    async def prefill(request: web.Request) -> web.StreamResponse:
        await never.wait()
        raise AssertionError

    neuron.answer = prefill
    client = await start(neuron)
    waiting = asyncio.ensure_future(client.post(path, body(stream=stream)).__aenter__())
    await neuron.request_arrived.wait()
    waiting.cancel()
    async with asyncio.timeout(10):
        await neuron.request_aborted.wait()
    await released(client)
    (line,) = records(caplog)
    assert (line["status"], line["outcome"]) == (499, "client_gone")
    assert await client.metric("cortex_client_gone_total", model=MODEL, node="alpha") == 1
    assert await client.metric("cortex_request_errors_total", model=MODEL, node="alpha") == 0


@pytest.mark.parametrize(("path", "events", "end"), STREAMS)
async def test_G10_a_client_that_leaves_in_mid_stream_ends_the_request_on_the_neuron(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture, path: str, events: list[bytes], end: bytes
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    async with client.post(path, body(stream=True)) as response:
        await read_events(response, len(b"".join(events)))
        response.close()
    async with asyncio.timeout(10):
        await neuron.request_aborted.wait()
    await released(client)
    assert [line["outcome"] for line in records(caplog)] == ["client_gone"]


@pytest.mark.parametrize("hold_s", [30.0, 0.0])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_during_a_load_leaves_the_load_alone(
    neuron: FakeNeuron, start: Start, stream: bool, hold_s: float
) -> None:
    neuron.load_gate.clear()
    client = await start(
        neuron, catalogue=Catalogue(models=(ModelProfile(id=MODEL),)), gateway={"stream_hold_s": hold_s}
    )
    waiting = asyncio.ensure_future(client.post(CHAT, body(stream=stream)).__aenter__())
    await neuron.load_started.wait()
    waiting.cancel()
    if stream and not waiting.cancelled() and hold_s == 0.0:
        await asyncio.wait({waiting})
        if not waiting.cancelled():
            waiting.result().close()
    await released(client)
    neuron.load_gate.set()
    await until(lambda: client.started.gateway.fleet.snapshot.nodes["alpha"].status(MODEL) == "loaded", client)
    assert neuron.count("POST /models/load") == 1
    assert not neuron.requests


async def test_a_client_that_leaves_in_mid_body_is_logged_as_gone(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    client = await start(neuron)
    host, port = client.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    async with asyncio.timeout(10):
        while not client.started.gateway.relay.num_active:
            await asyncio.sleep(0)
    writer.close()
    await released(client)
    assert [line["outcome"] for line in records(caplog)] == ["client_gone"]


async def test_a_header_that_may_not_go_on_is_left_behind_and_the_request_goes_on(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, gateway={"http1_parser": "h11"})  # httptools refuses it, see test_http1
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": MODEL, "messages": []}).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntraceparent: 00-\x7f\x01\r\nanthropic-beta: caf\xe9\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    async with asyncio.timeout(10):
        assert b" 200 " in await reader.readline()
    writer.close()
    _, headers, _ = neuron.requests[-1]
    assert "traceparent" not in headers and "anthropic-beta" in headers


@pytest.mark.parametrize(
    ("path", "ping", "events", "end"),
    [
        (CHAT, b": ping\n\n", OPENAI_EVENTS, OPENAI_END),
        (MESSAGES, b'event: ping\ndata: {"type": "ping"}\n\n', ANTHROPIC_EVENTS, ANTHROPIC_END),
    ],
)
async def test_a_stream_that_waits_is_opened_with_pings_and_then_carries_the_answer(
    neuron: FakeNeuron, start: Start, path: str, ping: bytes, events: list[bytes], end: bytes
) -> None:
    neuron.load_gate.clear()
    client = await start(
        neuron,
        catalogue=Catalogue(models=(ModelProfile(id=MODEL),)),
        gateway={"stream_hold_s": 0.0, "ping_interval_s": 0.001},
    )
    async with client.post(path, body(stream=True)) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert await read_events(response, 3 * len(ping)) == 3 * ping
        neuron.answer_gate.clear()
        neuron.load_gate.set()
        waited = await response.content.readuntil(events[0])
        assert waited.replace(ping, b"") == events[0]
        rest = b"".join(events[1:])
        assert await read_events(response, len(rest)) == rest
        await asyncio.sleep(0.02)  # twenty ping intervals: from here on the neuron keeps the stream alive
        neuron.answer_gate.set()
        assert await response.read() == end


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_an_error_within_the_hold_keeps_its_status(neuron: FakeNeuron, start: Start, path: str) -> None:
    client = await start(neuron)
    async with client.post(path, body(stream=True)) as response:
        assert response.status == 404
        assert response.headers["content-type"] == "application/json"


async def test_an_error_after_the_hold_is_the_streams_last_event(neuron: FakeNeuron, start: Start) -> None:
    neuron.load_gate.clear()
    neuron.load_error = (422, {"error": {"kind": "quant_not_found", "model_id": MODEL}})
    profiles = tuple(ModelProfile(id=model) for model in (MODEL, "other"))
    client = await start(neuron, catalogue=Catalogue(models=profiles), gateway={"stream_hold_s": 0.0})
    for path, model, prefix in ((CHAT, MODEL, b"data: "), (MESSAGES, "other", b"event: error\ndata: ")):
        async with client.post(path, body(model=model, stream=True)) as response:
            assert response.status == 200
            await response.content.readuntil(b"\n\n")
            neuron.load_gate.set()
            last = (await response.read()).split(b"\n\n")[-2]
            assert last.startswith(prefix)
            error = json.loads(last.removeprefix(prefix))["error"]
            assert "quant_not_found" in last.decode() and error["message"]
            neuron.load_gate.clear()


async def test_a_request_that_waits_longer_than_the_budget_gets_503_and_the_load_goes_on(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.load_gate.clear()
    client = await start(neuron, catalogue=Catalogue(models=(ModelProfile(id=MODEL),)), gateway={"load_wait_s": 0.01})
    async with client.post(CHAT, body()) as response:
        error = json.loads(await response.read())["error"]
    assert (response.status, error["code"]) == (503, "model_loading")
    assert int(response.headers["retry-after"]) >= 1
    neuron.load_gate.set()
    await until(lambda: client.started.gateway.fleet.snapshot.nodes["alpha"].status(MODEL) == "loaded", client)
    assert neuron.count("POST /models/load") == 1


async def test_a_node_that_is_gone_is_a_502_and_is_looked_at_again(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    neuron.is_down = True
    status, answer = await client.chat()
    assert (status, answer["error"]["code"]) == (502, "upstream_connection_error")
    assert client.started.gateway.fleet.snapshot.nodes["alpha"].misses >= 1


async def test_a_dead_kept_alive_connection_is_not_the_clients_problem(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)

    async def drop_once(request: web.Request) -> web.StreamResponse:
        neuron.answer = None
        assert request.transport is not None
        request.transport.abort()
        raise ConnectionResetError

    neuron.answer = drop_once
    status, _ = await client.chat()
    assert status == 200
    assert len(neuron.requests) == 2


async def test_a_model_that_was_unloaded_behind_our_back_is_loaded_again(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, catalogue=Catalogue(models=(ModelProfile(id=MODEL),)))
    del neuron.models[MODEL]
    status, _ = await client.chat()
    assert status == 200
    assert neuron.count("POST /models/load") == 1


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_model_that_recovers_since_our_last_poll_is_waited_for(
    neuron: FakeNeuron, start: Start, path: str
) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    neuron.have(MODEL, status="recovering")

    async def recovering(request: web.Request) -> web.StreamResponse:
        neuron.answer = None
        error = {"message": "recovering", "type": "server_error", "code": "engine_restarting", "param": None}
        return web.json_response({"error": error}, status=503, headers={"retry-after": "5"})

    neuron.answer = recovering
    asking = asyncio.ensure_future(client.post(path, body()).__aenter__())
    await until(lambda: client.started.gateway.fleet.snapshot.nodes["alpha"].status(MODEL) == "recovering", client)
    neuron.have(MODEL)
    response = await asking
    assert (response.status, response.headers["x-cortex-route"]) == (200, "held")
    assert len(neuron.requests) == 2
    await response.read()


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/completions", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 400),
        (b"[1, 2]", 400),
        (b"null", 400),
        (b"{nope", 400),
        (b'{"model": 5}', 400),
        (b'{"messages": []}', 400),
        (b'{"model":"org/model","messages":"\xff\xfe"}', 400),
        (b'{"model":"org/model","messages":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", 400),
        (b'{"model":"nobody/knows","messages":[]}', 404),
        (b'{"model":"org/model","x":"' + b"a" * 50_000_000 + b'"}', 413),
    ],
    ids=["empty", "array", "null", "syntax", "model-type", "no-model", "utf8", "deep", "unknown-model", "50MB"],
)
async def test_bad_input_gets_a_typed_error_in_the_dialect_of_the_route(
    neuron: FakeNeuron, start: Start, path: str, sent: bytes, status: int
) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    async with client.post(path, sent) as response:
        document = json.loads(await response.read())
        assert response.status == status, document
        assert response.headers["content-type"] == "application/json"
        assert response.headers["request-id"].startswith("req_")
    error = document["error"]
    if path.startswith(MESSAGES):
        assert document["type"] == "error" and document["request_id"] == response.headers["request-id"]
        assert error["type"] in ("invalid_request_error", "not_found_error", "request_too_large")
    else:
        assert set(error) >= {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert (await client.chat())[0] == 200


async def test_a_body_sent_in_chunks_is_counted(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, gateway={"max_body_bytes": 1000})

    async def chunks() -> Any:
        for _ in range(40):
            yield b"x" * 100

    async with client.session.post(client.url + MESSAGES, data=chunks()) as response:
        assert response.status == 413
        assert json.loads(await response.read())["error"]["type"] == "request_too_large"


async def test_a_body_that_stalls_is_a_408(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, gateway={"body_timeout_s": 0.05})
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    async with asyncio.timeout(10):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
