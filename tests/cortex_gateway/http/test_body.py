"""Bodies within limits, and connections that stay usable whatever a client sends."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import Any

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.http.asgi import Message
from cortex_gateway.http.body import ClientGone, RequestBody
from cortex_gateway.http.client_writer import ClientWriter


class Server:
    """The two ends an ASGI server gives an application."""

    def __init__(self, *parts: bytes | None, then: Message | None = None) -> None:
        self.messages: list[Message] = [
            {"type": "http.disconnect"}
            if part is None
            else {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        self.sent: list[Message] = []
        self.num_received = 0

    async def receive(self) -> Message:
        self.num_received += 1
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)


def body_of(server: Server, **limits: Any) -> RequestBody:
    return RequestBody(server.receive, **{"max_bytes": 10, "timeout_s": 5.0, **limits})


async def test_parts_are_joined() -> None:
    body = body_of(Server(b"abc", b"", b"def", b""))
    assert await body.read([]) == b"abcdef"
    assert body.is_complete


async def test_a_declared_length_beyond_the_limit_is_refused_unread() -> None:
    server = Server(b"x" * 11)
    with pytest.raises(ApiError) as refused:
        await body_of(server).read([(b"content-length", b"11")])
    assert refused.value.status == 413
    assert server.num_received == 0


@pytest.mark.parametrize("parts", [(b"x" * 11,), (b"x" * 6, b"x" * 6), (b"x" * 6, b"x" * 6, b"x" * 6, b"")])
async def test_a_body_that_counts_beyond_the_limit_is_refused(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(ApiError) as refused:
        await body_of(Server(*parts)).read([])
    assert refused.value.status == 413


async def test_a_body_that_stalls_is_a_408() -> None:
    server = Server(b"x", b"")
    server.messages.pop()
    with pytest.raises(ApiError) as refused:
        await body_of(server, timeout_s=0.01).read([])
    assert refused.value.status == 408


async def test_a_client_that_leaves_in_mid_body_is_gone() -> None:
    with pytest.raises(ClientGone):
        await body_of(Server(b"x", None)).read([])


async def test_an_early_answer_goes_out_first_and_the_rest_of_the_body_is_swallowed() -> None:
    server = Server(b"x" * 9, b"x" * 9, b"x" * 9)
    body = body_of(server)
    with pytest.raises(ApiError):
        await body.read([])
    await ClientWriter(server.send).answer(413, [], b"too large", unread=body)
    assert server.sent[0]["status"] == 413
    assert (b"connection", b"close") in server.sent[0]["headers"]
    assert server.sent[1] == {"type": "http.response.body", "body": b"too large", "more_body": True}
    assert server.sent[-1]["more_body"] is False
    assert not server.messages


async def test_an_endless_body_is_swallowed_only_up_to_a_bound() -> None:
    server = Server()

    async def receive() -> Message:
        server.num_received += 1
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x" * 5, "more_body": True}

    body = RequestBody(receive, max_bytes=10, timeout_s=5)
    await ClientWriter(server.send).answer(404, [], b"", unread=body)
    assert server.sent[-1]["more_body"] is False
    assert server.num_received < 30


async def test_after_a_complete_body_the_answer_is_two_messages() -> None:
    server = Server(b"x")
    body = body_of(server)
    await body.read([])
    await ClientWriter(server.send).answer(200, [], b"ok", unread=body)
    assert [message["type"] for message in server.sent] == ["http.response.start", "http.response.body"]
    assert server.sent[0]["headers"] == [(b"content-length", b"2")]


@pytest.mark.parametrize(("encoding", "encode"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
async def test_compressed_bodies_are_undone(encoding: bytes, encode: Any) -> None:
    body = body_of(Server(encode(b"hello")), max_bytes=100)
    assert await body.read([(b"content-encoding", encoding)]) == b"hello"


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        (b"zstd", b"x", 415),
        (b"gzip", b"not gzip", 400),
        (b"gzip", gzip.compress(b"hello")[:-6], 400),
        (b"gzip", gzip.compress(b"x" * 1000), 413),
    ],
    ids=["zstd", "noise", "cut", "bomb"],  # compressed bytes hold the time
)
async def test_other_encodings_noise_and_bombs_are_refused(encoding: bytes, content: bytes, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        await body_of(Server(content), max_bytes=100).read([(b"content-encoding", encoding)])
    assert refused.value.status == status
