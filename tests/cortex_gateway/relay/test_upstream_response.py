"""What a neuron answers reaches the client: whole answers, streams, errors, and streams that break."""

from __future__ import annotations

import json
import logging

import pytest
from aiohttp import web

from tests.cortex_gateway.fake_neuron import JSON_ANSWER, FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start
from tests.cortex_gateway.relay.harness import CHAT, MESSAGES, STREAMS, body, read_events, records


async def test_a_json_answer_passes_byte_for_byte_with_the_decision_in_its_headers(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    sent = b'{ "model":"org/model" ,\n "messages":[{"role":"user","content":"\\u00e4 \xc3\xa4"}], "unknown": [1,2] }'
    async with client.post(CHAT, sent, headers={"authorization": "Bearer k", "x-api-key": "k"}) as response:
        assert response.status == 200
        assert await response.read() == JSON_ANSWER
        headers = response.headers
    path, upstream, received = neuron.requests[0]
    assert (path, received) == (CHAT, sent)
    assert upstream["x-cortex-resolved-model"] == MODEL
    assert upstream["x-cortex-hop"] == "1"
    assert not {"authorization", "x-api-key"} & upstream.keys()
    assert headers["x-request-id"] == headers["request-id"] == upstream["x-request-id"]
    assert headers["x-request-id"].startswith("req_")
    decided = {name: headers[f"x-cortex-{name}"] for name in ("node", "model", "route")}
    assert decided == {"node": "alpha", "model": MODEL, "route": "loaded"}


@pytest.mark.parametrize(("path", "events", "end"), STREAMS)
async def test_events_pass_unchanged_and_at_once(
    neuron: FakeNeuron, start: Start, path: str, events: list[bytes], end: bytes
) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    async with client.post(path, body(stream=True)) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        early = b"".join(events)
        assert await read_events(response, len(early)) == early
        neuron.answer_gate.set()
        assert await response.read() == end


async def test_usage_is_metered_from_streams_whose_client_did_not_ask(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    neuron.have(MODEL)
    client = await start(neuron)
    async with client.post(CHAT, body(stream=True)) as response:
        await response.read()
    await client.chat()
    for name, count in (("prompt", 22), ("completion", 14), ("cached_prompt", 6)):
        assert await client.metric(f"cortex_{name}_tokens_total", model=MODEL, node="alpha") == count
    streamed, whole = records(caplog)
    for line in (streamed, whole):
        assert (line["status"], line["outcome"], line["node"]) == (200, "ok", "alpha")
        assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (11, 7, 3)
        assert line["ttft_ms"] <= line["duration_ms"]
    assert streamed["stream"] is True and "stream" not in whole


@pytest.mark.parametrize("num_bytes", [100_000, 3_000_000])
async def test_a_large_answer_passes_whole(neuron: FakeNeuron, start: Start, num_bytes: int) -> None:
    neuron.have(MODEL)
    large = b'{"text":"' + b"x" * num_bytes + b'","usage":{"prompt_tokens":1,"completion_tokens":2}}'

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=large, content_type="application/json")

    neuron.answer = answer
    client = await start(neuron)
    async with client.post(CHAT, body()) as response:
        assert response.headers["content-length"] == str(len(large))
        assert await response.read() == large
    assert await client.metric("cortex_completion_tokens_total", model=MODEL) == 2


async def test_a_request_of_an_origin_that_is_allowed_may_read_its_answer(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, gateway={"allow_origins": ["https://page.example"]})
    async with client.post(CHAT, body(), headers={"origin": "https://page.example"}) as response:
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        assert response.headers["vary"] == "origin"
    async with client.post(CHAT, body()) as response:
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("stream", [True, False])
async def test_a_neurons_error_passes_with_status_headers_and_body(
    neuron: FakeNeuron, start: Start, stream: bool
) -> None:
    neuron.have(MODEL)
    document = b'{"error":{"message":"busy","type":"rate_limit_error","code":"rate_limit_exceeded","param":null}}'

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(body=document, status=503, content_type="application/json", headers={"retry-after": "7"})

    neuron.answer = refuse
    client = await start(neuron)
    async with client.post(CHAT, body(stream=stream)) as response:
        assert (response.status, response.headers["retry-after"]) == (503, "7")
        assert await response.read() == document
        assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_an_error_that_is_no_json_becomes_one_in_the_routes_dialect(
    neuron: FakeNeuron, start: Start, path: str
) -> None:
    neuron.have(MODEL)

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(text="Internal Server Error", status=500)

    neuron.answer = refuse
    client = await start(neuron)
    async with client.post(path, body()) as response:
        document = json.loads(await response.read())
    assert response.status == 500
    assert "Internal Server Error" not in json.dumps(document)
    assert ("type" in document) == (path == MESSAGES)


@pytest.mark.parametrize(("path", "events", "end"), STREAMS)
async def test_a_stream_that_breaks_ends_with_an_error_event_after_whole_events(
    neuron: FakeNeuron,
    start: Start,
    caplog: pytest.LogCaptureFixture,
    path: str,
    events: list[bytes],
    end: bytes,
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    neuron.have(MODEL)

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = await neuron.begin_stream(request)
        await response.write(events[0] + b'data: {"half')
        assert request.transport is not None
        request.transport.close()
        return response

    neuron.answer = break_off
    client = await start(neuron)
    async with client.post(path, body(stream=True)) as response:
        text = await response.read()
    assert text.startswith(events[0]) and b"half" not in text
    last = text.removeprefix(events[0])
    assert last.startswith(b"data: " if path == CHAT else b"event: error\ndata: ") and last.endswith(b"\n\n")
    error = json.loads(last.split(b"data: ")[1])["error"]
    assert error["message"] and error["type"] in ("server_error", "api_error")
    assert b"[DONE]" not in text and b"message_stop" not in text
    (line,) = records(caplog)
    assert (line["status"], line["outcome"]) == (502, "upstream_failed")
    assert await client.metric("cortex_request_errors_total", model=MODEL, node="alpha") == 1
