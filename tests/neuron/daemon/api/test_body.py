"""A request's body: read once, within bounds, and swallowed when nobody wants it."""

from __future__ import annotations

import asyncio
import gzip
import os
import zlib
from collections.abc import Callable

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.api.asgi import ClientGone, Message
from neuron.daemon.api.body import RequestBody

from tests.neuron.daemon.api.harness import Server


async def test_an_early_answer_is_sent_before_the_rest_is_swallowed() -> None:
    part: Message = {"type": "http.request", "body": b"x" * 600, "more_body": True}
    server = Server(part, part)
    exchange = server.exchange(max_body_bytes=1000)
    with pytest.raises(ApiError) as caught:
        await exchange.read_body()
    failing = asyncio.create_task(exchange.fail(caught.value))
    while b"request_too_large" not in server.body:
        await asyncio.sleep(0)
    assert not failing.done()  # it goes on reading what the client is still sending
    server.incoming.put_nowait({**part, "more_body": False})
    await failing
    assert server.sent[0]["status"] == 413 and (b"connection", b"close") in server.sent[0]["headers"]


async def test_bodies_that_do_not_end_are_swallowed_within_bounds() -> None:
    endless: Message = {"type": "http.request", "body": b"x" * 1000, "more_body": True}
    server = Server(*[endless] * 100)
    exchange = server.exchange(max_body_bytes=1000)
    with pytest.raises(ApiError) as caught:
        await exchange.read_body()
    await exchange.fail(caught.value)
    assert server.sent[-1]["more_body"] is False


def body_of(*parts: bytes, max_bytes: int = 10, timeout_s: float = 30.0) -> tuple[RequestBody, list[Message]]:
    """Its parts, and what has not been taken of them."""
    left: list[Message] = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1} for index, part in enumerate(parts)
    ]

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return RequestBody(receive, max_bytes=max_bytes, timeout_s=timeout_s), left


async def test_parts_are_joined_and_counted() -> None:
    body, left = body_of(b"abc", b"", b"def")
    assert await body.read([]) == b"abcdef" and body.is_complete and not left


@pytest.mark.parametrize("length", [b"11", b"-1", b"1e1", b"1" * 100])
async def test_a_declared_length_beyond_the_limit_is_refused_unread(length: bytes) -> None:
    body, left = body_of(b"abc")
    with pytest.raises(ApiError) as caught:
        await body.read([(b"content-length", length)])
    assert caught.value.status == 413 and caught.value.extras == {"max_bytes": 10} and len(left) == 1


async def test_a_body_that_counts_beyond_the_limit_is_refused_where_it_does() -> None:
    body, left = body_of(b"x" * 6, b"x" * 5, b"x" * 5)
    with pytest.raises(ApiError) as caught:
        await body.read([])
    assert caught.value.status == 413 and len(left) == 1


async def test_a_body_that_stalls_is_a_408_and_one_that_breaks_off_nobodys() -> None:
    body, left = body_of(b"a", b"b", timeout_s=0.01)
    left.pop()
    with pytest.raises(ApiError) as caught:
        await body.read([])
    assert caught.value.status == 408
    body, left = body_of(b"a", b"b")
    left[1] = {"type": "http.disconnect"}
    with pytest.raises(ClientGone):
        await body.read([])


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [(b"gzip", gzip.compress), (b"x-gzip", gzip.compress), (b" Deflate ", zlib.compress), (b"identity", bytes)],
)
@pytest.mark.parametrize("size", [9, 200_000])
async def test_compressed_bodies_are_undone(encoding: bytes, encode: Callable[[bytes], bytes], size: int) -> None:
    plain = os.urandom(size)
    body, _ = body_of(encode(plain), max_bytes=300_000)
    assert await body.read([(b"content-encoding", encoding)]) == plain


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        (b"br", b"x", 415),
        (b"gzip, gzip", b"x", 415),
        (b"gzip", b"noise", 400),
        (b"gzip", gzip.compress(b"abc")[:-5], 400),
        (b"gzip", gzip.compress(b"x" * 100_001), 413),
    ],
    ids=["brotli", "twice", "noise", "cut short", "bomb"],  # compressed bytes hold the time
)
async def test_other_encodings_noise_and_bombs_are_refused(encoding: bytes, content: bytes, status: int) -> None:
    body, _ = body_of(content, max_bytes=100_000)
    with pytest.raises(ApiError) as caught:
        await body.read([(b"content-encoding", encoding)])
    assert caught.value.status == status
