"""Large bodies through a gateway on sockets: none is read, copied or written in one go on its loop (H13).

Nothing here looks at a clock: what the loop is given to do at a time is counted in bytes.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp.http_writer
import pytest
from aiohttp import web
from cortex_core.catalogue import Catalogue
from cortex_core.dialects import json_body
from cortex_core.errors import ApiError
from cortex_gateway.bodies import payload
from cortex_gateway.bodies import pool as pools
from cortex_gateway.http import body as bodies
from cortex_gateway.http.body import Inflating
from cortex_gateway.identity import estimate
from cortex_gateway.placement import session_hints
from cortex_gateway.surfaces import envelope

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.fake_openai import MODEL, FakeOpenAI
from tests.cortex_gateway.gateway_client import Client, Start

CHAT, MESSAGES, COUNT = "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"
SIZE = 3 * 2**20
PIECE_BYTES = payload.PIECE_BYTES


def long_text(size: int = SIZE) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "lorem \N{HONEYBEE} ipsum " * (size // 17)}]


def many_messages(size: int = SIZE) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a" * (size // 9_000)}] * 9_000


def image(size: int = SIZE) -> list[dict[str, Any]]:
    data = base64.b64encode(os.urandom(size * 3 // 4)).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "what is it?"}]}]


SHAPES: dict[str, Callable[[], list[dict[str, Any]]]] = {"text": long_text, "messages": many_messages, "image": image}


def body_of(messages: list[dict[str, Any]], model: str = MODEL, **fields: Any) -> bytes:
    """As SDKs write it: what matters comes last."""
    return json.dumps({"messages": messages, "max_tokens": 5, **fields, "model": model}).encode()


class Loop:
    """How many bytes its thread was given at a time: to decode, to inflate, and to write to a server or a worker."""

    def __init__(self) -> None:
        self.decoded: list[int] = []
        self.inflated: list[int] = []
        self.written: list[int] = []

    @property
    def longest(self) -> int:
        return max((*self.decoded, *self.inflated, *self.written))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    loop, thread = Loop(), threading.get_ident()

    def noting(sizes: list[int], real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(data: Any, *rest: Any) -> Any:
            if threading.get_ident() == thread:
                sizes.append(len(data))
            return real(data, *rest)

        return noted

    class Decoder:
        def __init__(self, real: Any) -> None:
            self.decode = noting(loop.decoded, real.decode)

    for module, name in (
        (envelope, "_decoder"), (estimate, "_decoder"), (session_hints, "_keys"), (session_hints, "_prompt"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Decoder(getattr(module, name)))
    for module, name in ((envelope, "_fields"), (json_body, "_decode")):
        monkeypatch.setattr(module, name, noting(loop.decoded, getattr(module, name)))
    take = Inflating.take

    def taken(self: Inflating) -> bytes:
        plain = take(self)
        loop.inflated.append(len(plain))
        return plain

    monkeypatch.setattr(Inflating, "take", taken)
    write = aiohttp.http_writer.StreamWriter.write

    async def written(self: Any, chunk: Any, **options: Any) -> None:
        loop.written.append(len(chunk))
        await write(self, chunk, **options)

    monkeypatch.setattr(aiohttp.http_writer.StreamWriter, "write", written)
    real_write = asyncio.StreamWriter.write

    def to_worker(self: asyncio.StreamWriter, data: Any) -> None:
        loop.written.append(len(data))
        real_write(self, data)

    monkeypatch.setattr(asyncio.StreamWriter, "write", to_worker)
    yield loop


async def send(client: Client, path: str, data: bytes, **headers: str) -> tuple[int, bytes]:
    async def slowly() -> Any:
        for start in range(0, len(data), 2**16):
            yield data[start : start + 2**16]

    sent = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    async with client.session.post(client.url + path, data=slowly(), headers=sent) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parser", ["h11", "auto"])
async def test_H13_a_large_body_reaches_a_neuron_byte_for_byte_and_never_as_a_whole(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, watched: Loop, shape: str, parser: str
) -> None:
    """With everything that reads it: the choice between replicas, a budget, a limit of tokens."""
    for each in (neuron, second):
        each.have(MODEL)
    key = {"key_id": "k", "key": "secret", "tokens_per_minute": 10**9}
    client = await start(
        neuron, second, gateway={"http1_parser": parser}, entitlements={"require_auth": True, "keys": [key]}
    )
    data = body_of(SHAPES[shape]())
    headers = {"x-api-key": "secret"}
    for _ in range(2):
        status, answer = await send(client, CHAT, data, **headers)
        assert status == 200, answer
    (asked,) = [each.requests for each in (neuron, second) if each.requests]  # the second goes where the first went
    assert [sent for _, _, sent in asked] == [data, data]
    assert watched.longest <= PIECE_BYTES


@pytest.mark.parametrize("shape", SHAPES)
async def test_H13_a_large_body_passes_to_another_server_under_another_name(
    openai_server: FakeOpenAI, start: Start, watched: Loop, shape: str
) -> None:
    client = await start(openai_server, catalogue=Catalogue(aliases={"fast": MODEL}))
    data = body_of(SHAPES[shape](), model="fast")
    status, answer = await send(client, CHAT, data)
    assert status == 200, answer
    assert openai_server.requests[-1][2] == data.replace(b'"model": "fast"', b'"model": "%b"' % MODEL.encode())
    assert watched.longest <= PIECE_BYTES
    # Named twice, the last one counts: then it is written anew.
    status, answer = await send(client, CHAT, b'{"model": "no/model",' + data[1:])
    assert status == 200, answer
    assert json.loads(openai_server.requests[-1][2]) == {**json.loads(data), "model": MODEL}
    assert watched.longest <= PIECE_BYTES


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
async def test_H13_a_large_body_is_translated_elsewhere(
    openai_server: FakeOpenAI, start: Start, watched: Loop, shape: str, stream: bool
) -> None:
    client = await start(openai_server)
    asked = SHAPES[shape]()
    small = body_of([{"role": "user", "content": "hi"}], stream=stream)
    data = body_of(asked, stream=stream)
    expected, got = [await send(client, MESSAGES, each) for each in (small, data)]
    assert (expected[0], got[0]) == (200, 200), got[1]
    sent = json.loads(openai_server.requests[-1][2])["messages"]
    if shape == "image":
        assert asked[0]["content"][0]["source"]["data"] in sent[0]["content"][0]["image_url"]["url"]
    else:
        assert [message["content"] for message in sent] == [message["content"] for message in asked]
    if not stream:
        first, second = json.loads(expected[1]), json.loads(got[1])
        assert (first["content"], first["usage"], first["model"]) == (
            second["content"],
            second["usage"],
            second["model"],
        )
    else:
        assert got[1].count(b"event: ") == expected[1].count(b"event: ") and b"message_stop" in got[1]
    assert watched.longest <= PIECE_BYTES


async def test_H13_tokens_of_a_large_body_are_counted_elsewhere(
    openai_server: FakeOpenAI, start: Start, watched: Loop
) -> None:
    openai_server.count = 7
    client = await start(openai_server)
    status, answer = await send(client, COUNT, body_of(many_messages()))
    assert (status, json.loads(answer)) == (200, {"input_tokens": 7})
    assert watched.longest <= PIECE_BYTES


async def test_H13_what_is_small_but_costly_to_translate_is_translated_elsewhere_too(
    openai_server: FakeOpenAI, start: Start, watched: Loop
) -> None:
    client = await start(openai_server)
    data = body_of(many_messages(2**18))
    assert len(data) < payload.MAX_INLINE_BYTES
    status, answer = await send(client, MESSAGES, data)
    assert status == 200, answer
    # It is read here for its model, and for nothing else.
    assert len(watched.decoded) - watched.decoded.count(0) <= 2
    assert client.started.gateway._body_workers.pids


async def test_H13_no_process_is_started_for_bodies_as_they_mostly_are(
    openai_server: FakeOpenAI, neuron: FakeNeuron, start: Start
) -> None:
    neuron.have("org/model")
    client = await start(openai_server, neuron)
    for path, model in ((CHAT, MODEL), (MESSAGES, MODEL), (CHAT, "org/model")):
        status, answer = await send(client, path, body_of(long_text(2**18), model=model))
        assert status == 200, answer
    assert client.started.gateway._body_workers.pids == []


async def test_H13_a_large_stream_goes_on_elsewhere_with_its_body(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, watched: Loop
) -> None:
    """One neuron breaks off; the other gets the state in front of the same bytes."""

    async def broken(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        await response.write(b': cortex-stream {"id":"c","created":1,"seeds":[1]}\n\n')
        await response.write(b'data: {"choices":[]}\n\n\n: cortex-tokens [[0,[5]]]\n\n')
        assert request.transport is not None
        request.transport.close()
        return response

    neuron.have(MODEL)
    neuron.answer = broken
    client = await start(neuron, second)
    data = body_of(long_text(), stream=True)
    asking = asyncio.ensure_future(send(client, CHAT, data))
    await neuron.request_arrived.wait()
    second.have(MODEL)
    await client.started.gateway._poller.refresh_all()
    await second.request_arrived.wait()
    _, headers, sent = second.requests[-1]
    neuron.answer = second.answer = None
    assert sent[int(headers["x-cortex-resume"]) :] == data
    assert json.loads(sent[: int(headers["x-cortex-resume"])])["head"]["id"] == "c"
    assert watched.longest <= PIECE_BYTES
    asking.cancel()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_H13_a_compressed_body_comes_out_a_piece_at_a_time(
    neuron: FakeNeuron, start: Start, watched: Loop, encoding: str
) -> None:
    import zlib

    neuron.have(MODEL)
    client = await start(neuron)
    data = body_of(long_text(4 * SIZE))
    packed = gzip.compress(data) if encoding == "gzip" else zlib.compress(data)
    assert len(packed) < len(data) / 100
    status, answer = await send(client, CHAT, packed, **{"content-encoding": encoding})
    assert status == 200, answer
    assert neuron.requests[-1][2] == data
    assert max(watched.inflated) <= bodies.INFLATED_BYTES
    assert watched.longest <= PIECE_BYTES


def test_H13_a_bomb_is_given_up_at_the_limit_and_not_at_its_end() -> None:
    packed = gzip.compress(bytes(64 * 2**20))
    inflating = Inflating(b"gzip", 2**20)
    inflating.feed(packed)
    num_bytes = 0
    with pytest.raises(ApiError) as refused:
        while plain := inflating.take():
            num_bytes += len(plain)
    assert refused.value.status == 413 and num_bytes <= 2**20


async def test_H13_what_is_wrong_with_a_large_body_is_said_in_the_callers_dialect(
    neuron: FakeNeuron, openai_server: FakeOpenAI, start: Start
) -> None:
    client = await start(neuron, openai_server)
    cut = body_of(long_text())[:-1]
    status, answer = await send(client, CHAT, cut)
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_json")
    status, answer = await send(client, MESSAGES, cut)
    assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error")
    status, answer = await send(client, CHAT, body_of(long_text()).replace(MODEL.encode(), b"no/such"))
    assert (status, json.loads(answer)["error"]["code"]) == (404, "model_not_found")
    status, answer = await send(client, MESSAGES, body_of([*long_text(), {"role": "robot", "content": "x"}]))
    assert status == 400 and "messages[1].role" in json.loads(answer)["error"]["message"]
    unusual = body_of([])[:-1] + b"".join(b',"k%d":0' % number for number in range(300_000)) + b"}"
    status, answer = await send(client, CHAT, unusual)
    assert (status, json.loads(answer)["error"]["code"]) == (400, "too_many_fields")


async def test_H13_a_large_body_is_captured_by_its_beginning_without_its_images(
    neuron: FakeNeuron, start: Start, watched: Loop
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, capture={"exchanges": 5, "exchange_bytes": 4096})
    for shape in ("image", "text"):
        data = body_of(SHAPES[shape]())
        assert (await send(client, CHAT, data))[0] == 200
        async with client.get("/admin/captures") as response:
            captures = json.loads(await response.read())["captures"]
        async with client.get(f"/admin/captures/{captures[-1]['id']}") as response:
            shown = json.loads(await response.read())["request"]
        assert shown["num_bytes"] == len(data)
        if shape == "image":
            assert "characters]" in shown["body"] and "what is it?" in shown["body"] and shown["is_shortened"]
        else:
            assert shown["body"].encode() == data[:2048] and shown["is_cut"]
    assert watched.longest <= PIECE_BYTES


async def test_H13_what_the_loop_is_given_grows_with_the_body_and_not_faster(
    neuron: FakeNeuron, start: Start, watched: Loop
) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    totals = []
    for factor in (1, 2):
        for sizes in (watched.decoded, watched.written):
            sizes.clear()
        assert (await send(client, CHAT, body_of(many_messages(factor * SIZE))))[0] == 200
        totals.append(sum(watched.decoded) + sum(watched.written))
    assert totals[1] < 2.1 * totals[0]


async def test_H13_a_client_that_leaves_while_its_body_is_read_is_noticed(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    workers = client.started.gateway._body_workers
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def never(*_: Any, **__: Any) -> Any:
        arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()

    workers.run = never  # type: ignore[method-assign]
    asking = asyncio.ensure_future(send(client, CHAT, body_of(long_text())))
    await arrived.wait()
    asking.cancel()
    async with asyncio.timeout(10):
        await gone.wait()
    assert not neuron.requests


async def test_H13_a_body_that_ends_its_process_is_refused_counted_and_nobody_elses_matter(
    openai_server: FakeOpenAI, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(openai_server)
    data = body_of(many_messages())
    monkeypatch.setattr(pools, "CPU_S", 0.0)
    monkeypatch.setattr(pools, "CPU_S_PER_MB", 0.001)
    status, answer = await send(client, MESSAGES, data)
    error = json.loads(answer)["error"]
    assert (status, error["type"]) == (413, "request_too_large") and str(len(data)) in error["message"]
    assert await client.metric("cortex_body_workers_ended_total", reason="cpu") == 1
    monkeypatch.undo()
    assert (await send(client, MESSAGES, data))[0] == 200
