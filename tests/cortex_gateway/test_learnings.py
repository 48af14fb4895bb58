"""Failures that the reference system learnt from (see docs/explanation/failures.md), each on a gateway that runs."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web

from tests.cortex_gateway.fake_neuron import ANTHROPIC_EVENTS, OPENAI_EVENTS, FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start

CHAT = "/v1/chat/completions"

MESSAGES = "/v1/messages"
SECRET = "Traceback: /srv/secret.py line 7"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **fields}


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "cortex_gateway.access"]
    return [line for line in lines if line["method"] == "POST"]


async def at_rest(client: Client) -> None:
    async with asyncio.timeout(10):
        await client.started.gateway.relay.wait_idle()


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_G8_a_failure_is_one_log_line_and_its_details_are_not_the_clients(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    neuron.have(MODEL)

    async def fail(request: web.Request) -> web.StreamResponse:
        return web.Response(text=SECRET, status=500)

    neuron.answer = fail
    client = await start(neuron)
    caplog.set_level(logging.WARNING)
    async with client.post(path, body()) as response:
        assert response.status == 500
        assert SECRET not in await response.text()
        request_id = response.headers["x-request-id"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert request_id in line and SECRET in line


async def test_G9_a_neurons_refusal_is_logged_with_the_start_of_its_body(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    neuron.have(MODEL)
    document = {"error": {"message": "kv_cache_timeout " + "x" * 5000, "code": "kv_cache_timeout"}}

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response(document, status=503, headers={"retry-after": "7"})

    neuron.answer = refuse
    caplog.set_level(logging.INFO, "cortex_gateway")
    client = await start(neuron)
    assert (await client.chat())[0] == 503
    (line,) = access_lines(caplog)
    assert (line["outcome"], line["status"], line["node"]) == ("upstream_error", 503, "alpha")
    assert line["error"].startswith('{"error": {"message": "kv_cache_timeout xxx') and len(line["error"]) <= 600


async def test_G9_each_rejection_of_the_gateways_own_says_why_in_the_log(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    neuron.have(MODEL)
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    client = await start(neuron, gateway={"max_body_bytes": 1000})
    bodies = [b"{", b"[]", b'{"messages": []}', json.dumps(body(model="no/body")).encode(), b"x" * 2000]
    for sent in bodies:
        async with client.post(CHAT, sent) as response:
            assert 400 <= response.status < 500
    lines = access_lines(caplog)
    assert [line["outcome"] for line in lines] == ["rejected"] * len(bodies)
    codes = ["invalid_json", "invalid_type", "missing_model_field", "model_not_found", "request_too_large"]
    assert [line["error"].partition(":")[0] for line in lines] == codes


@pytest.mark.parametrize(("path", "events"), [(CHAT, OPENAI_EVENTS), (MESSAGES, ANTHROPIC_EVENTS)])
async def test_G10_the_log_says_how_every_stream_ended(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture, path: str, events: list[bytes]
) -> None:
    """Whole, cut off by the neuron, and left by the client."""
    neuron.have(MODEL)
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    client = await start(neuron)
    async with client.post(path, body(stream=True)) as response:
        await response.read()
    await at_rest(client)
    whole = neuron.answer

    async def cut(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(events[0])
        assert request.transport is not None
        request.transport.abort()
        return answer

    neuron.answer = cut
    async with client.post(path, body(stream=True)) as response:
        assert b"error" in await response.read()
    await at_rest(client)
    neuron.answer = whole
    neuron.answer_gate.clear()
    async with client.post(path, body(stream=True)) as response:
        await response.content.readexactly(len(b"".join(events)))
        response.close()
    await at_rest(client)
    ended = [(line["stream"], line["outcome"]) for line in access_lines(caplog)]
    assert ended == [(True, "ok"), (True, "upstream_failed"), (True, "client_gone")]
