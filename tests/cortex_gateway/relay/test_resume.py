"""A stream whose neuron is cut off goes on with another one; the client reads one stream."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web
from cortex_core.hop import (
    Batch,
    ChoiceTokens,
    ResumeState,
    StreamHead,
    split_resume,
    stream_comment,
    tokens_comment,
)

from tests.cortex_gateway.fake_neuron import FakeNeuron, Handler
from tests.cortex_gateway.gateway_client import MODEL, Start
from tests.cortex_gateway.relay.harness import records

HEAD = StreamHead("chatcmpl-1", 5, (7,))
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
END = b"data: [DONE]\n\n"


def write(token_id: int) -> bytes:
    return b"data: %d\n\n" % token_id + tokens_comment([ChoiceTokens(0, [token_id])])


def speaking(ids: list[int], *, then: bytes | None, head: StreamHead = HEAD, **headers: str) -> Handler:
    """A neuron that writes these tokens and ends the stream with `then`, or is cut off."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request, **headers)
        await response.write(stream_comment(head) + b"".join(map(write, ids)))
        if then is None:
            await response.write(b"data: half an eve")
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(then)
        await response.write_eof()
        return response

    return answer


def resumed(neuron: FakeNeuron) -> tuple[ResumeState, Any]:
    """What the last request asked the neuron to go on from, and the client's own request in it."""
    _, headers, body = neuron.requests[-1]
    state, original = split_resume(headers["x-cortex-resume"].encode(), body)
    return state, json.loads(original)


def ids_of(batches: tuple[Batch, ...]) -> list[int]:
    return [token for batch in batches for choice in batch for token in choice.token_ids]


async def test_the_client_reads_one_stream(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer = speaking([1, 2], then=None)
    second.have(MODEL)
    second.answer = speaking([3], then=END)
    client = await start(neuron, second)
    async with client.post("/v1/chat/completions", BODY) as response:
        neuron.models.clear()
        assert await response.read() == b"data: 1\n\ndata: 2\n\ndata: 3\n\n" + END
    state, original = resumed(second)
    assert (state.head, ids_of(state.batches), original) == (HEAD, [1, 2], BODY)
    assert "x-cortex-resume" not in neuron.requests[0][1]


@pytest.mark.parametrize(
    ("first", "then", "is_mixed"),
    [("f1", "f1", False), ("f1", "f2", True), ("f1", None, True), (None, "f1", True), (None, None, True)],
)
async def test_it_is_known_where_a_stream_goes_on_with_something_else(
    neuron: FakeNeuron,
    second: FakeNeuron,
    start: Start,
    caplog: pytest.LogCaptureFixture,
    first: str | None,
    then: str | None,
    is_mixed: bool,
) -> None:
    def named(fingerprint: str | None) -> dict[str, str]:
        return {} if fingerprint is None else {"x_cortex_fingerprint": fingerprint}

    caplog.set_level(logging.INFO)
    neuron.have(MODEL)
    neuron.answer = speaking([1, 2], then=None, **named(first))
    second.have(MODEL)
    second.answer = speaking([3], then=END, **named(then))
    client = await start(neuron, second)
    async with client.post("/v1/chat/completions", BODY) as response:
        neuron.models.clear()
        assert (await response.read()).endswith(END)
        assert "x-cortex-fingerprint" not in response.headers
    (line,) = records(caplog)
    assert (line["resumes"], line.get("mixed", False)) == (1, is_mixed)
    assert ("serves" in caplog.text and "otherwise" in caplog.text) is is_mixed
    async with client.session.get(client.started.metrics_url + "/metrics") as scraped:
        assert ("cortex_mixed_streams_total{" in await scraped.text()) is is_mixed


async def test_a_stream_that_is_cut_off_twice_goes_on_twice(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    answers = [speaking([1], then=None), speaking([2, 3], then=None), speaking([4], then=END)]

    async def answer(request: web.Request) -> web.StreamResponse:
        return await answers.pop(0)(request)

    neuron.answer = answer
    client = await start(neuron)
    async with client.post("/v1/chat/completions", BODY) as response:
        assert await response.read() == b"".join(b"data: %d\n\n" % token for token in (1, 2, 3, 4)) + END
    state, _ = resumed(neuron)
    assert ids_of(state.batches) == [1, 2, 3]


async def test_a_neuron_that_gives_up_is_succeeded(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer = speaking([1], then=b": cortex-unfinished\n\ndata: {}\n\n")
    second.have(MODEL)
    second.answer = speaking([2], then=END)
    client = await start(neuron, second)
    async with client.post("/v1/chat/completions", BODY) as response:
        neuron.models.clear()
        assert await response.read() == b"data: 1\n\ndata: 2\n\n" + END


async def test_a_neuron_that_falls_silent_is_succeeded(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    never = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        await response.write(stream_comment(HEAD) + write(1))
        await never.wait()
        return response

    neuron.answer = answer
    second.have(MODEL)
    second.answer = speaking([2], then=END)
    client = await start(neuron, second, gateway={"stream_silence_s": 0.3})
    async with client.post("/v1/chat/completions", BODY) as response:
        neuron.models.clear()
        assert await response.read() == b"data: 1\n\ndata: 2\n\n" + END


async def test_a_neuron_that_begins_another_stream_is_not_mixed_in(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    neuron.answer = speaking([1], then=None)
    second.have(MODEL)
    second.answer = speaking([2], then=END, head=StreamHead("chatcmpl-2", 6, (8,)))
    client = await start(neuron, second)
    async with client.post("/v1/chat/completions", BODY) as response:
        neuron.models.clear()
        data = await response.read()
    assert data.startswith(b"data: 1\n\n") and b"data: 2" not in data
    assert b"upstream_malformed_response" in data


@pytest.mark.parametrize("status", [400, 422])
async def test_a_refusal_to_go_on_ends_the_stream_with_an_error(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, status: int
) -> None:
    neuron.have(MODEL)
    neuron.answer = speaking([1], then=None)

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no", "type": "invalid_request_error"}}, status=status)

    second.have(MODEL)
    second.answer = refuse
    client = await start(neuron, second)
    async with client.post("/v1/chat/completions", BODY) as response:
        neuron.models.clear()
        data = await response.read()
    assert data.startswith(b"data: 1\n\n") and b'"error"' in data and data.count(b"data: ") == 2
