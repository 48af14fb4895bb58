"""A request under which two processes end is refused; nobody else's is."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start


def ends_under_a_request(neuron: FakeNeuron, word: bytes = b"poison") -> None:
    """Its process ends without a byte of answer where the word occurs, and is back at once, younger."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = neuron.requests[-1][2]
        if word not in body:
            return web.json_response({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        neuron.health_extra = {"uptime_secs": 0}
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    neuron.answer = answer


def asked(word: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": word}], **fields}


def num_requests(*neurons: FakeNeuron) -> list[int]:
    return [len(neuron.requests) for neuron in neurons]


@pytest.mark.parametrize("stream", [False, True])
async def test_H2_two_ends_without_a_byte_blame_the_request(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, stream: bool
) -> None:
    for each in (neuron, second):
        each.have(MODEL)
        ends_under_a_request(each)
    client = await start(neuron, second)
    status, document = await client.chat(**asked("poison", stream=stream))
    assert (status, document["error"]["code"]) == (400, "request_kills_engine")
    assert num_requests(neuron, second) == [1, 1]
    assert await client.metric("cortex_rejected_requests_total", code="request_kills_engine") == 1
    # A client asks again by itself: no third process ends, and nobody else is held back.
    status, document = await client.chat(**asked("poison", stream=stream))
    assert (status, document["error"]["code"]) == (400, "request_kills_engine")
    assert num_requests(neuron, second) == [1, 1]
    for _ in range(4):
        assert (await client.chat(**asked("fine")))[0] == 200


async def test_H2_a_connection_that_was_cut_blames_nobody(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    for each in (neuron, second):
        each.have(MODEL)
        ends_under_a_request(each)
    client = await start(neuron, second)
    for each in (neuron, second):
        each.health_extra = {"uptime_secs": 1_000}  # what the next poll finds is older than what the last one found

        async def cut(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        each.answer = cut
    status, document = await client.chat(**asked("poison"))
    assert (status, document["error"]["code"]) == (502, "upstream_connection_error")
    for each in (neuron, second):
        each.answer = None
    assert (await client.chat(**asked("poison")))[0] == 200


async def test_H2_one_end_is_asked_elsewhere(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    for each in (neuron, second):
        each.have(MODEL)
    ends_under_a_request(neuron)
    client = await start(neuron, second)
    for _ in range(4):
        assert (await client.chat(**asked("poison")))[0] == 200
