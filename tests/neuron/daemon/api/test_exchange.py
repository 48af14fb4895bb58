"""One exchange against a scripted server side."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.api.asgi import ClientGone, Message
from neuron.daemon.api.exchange import Exchange
from neuron.daemon.common.config import ServerSection

GONE: Message = {"type": "http.disconnect"}
BODY: Message = {"type": "http.request", "body": b"{}", "more_body": False}


class Server:
    """What the exchange receives is put into `incoming`; what it sends is in `sent`."""

    def __init__(self, *messages: Message) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        for message in messages:
            self.incoming.put_nowait(message)

    async def send(self, message: Message) -> None:
        await self.may_send.wait()
        self.sent.append(message)

    def exchange(self, method: str = "POST", path: str = "/v1/messages", **limits: Any) -> Exchange:
        scope = {"type": "http", "method": method, "path": path, "headers": [], "http_version": "1.1"}
        return Exchange(scope, self.incoming.get, self.send, ServerSection(**limits))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def test_a_client_that_leaves_cancels_what_is_awaited() -> None:
    server = Server(BODY)
    exchange = server.exchange()
    assert await exchange.read_body() == b"{}"
    was_cancelled = False
    with pytest.raises(ClientGone):
        async with exchange.watched():
            server.incoming.put_nowait(GONE)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled = True
                raise
    assert was_cancelled
    await asyncio.sleep(0)  # the task itself is not cancelled


async def test_a_client_that_leaves_before_the_body_is_complete_is_gone() -> None:
    server = Server({"type": "http.request", "body": b"{", "more_body": True}, GONE)
    with pytest.raises(ClientGone):
        await server.exchange().read_body()


async def test_a_cancellation_from_outside_stays_one() -> None:
    exchange = Server().exchange()
    inside = asyncio.Event()

    async def work() -> None:
        async with exchange.watched():
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_end_of_a_complete_exchange_is_no_departure() -> None:
    server = Server(BODY)
    exchange = server.exchange()
    await exchange.read_body()
    async with exchange.watched():
        server.may_send.clear()
        answering = asyncio.create_task(exchange.respond_json({"ok": True}))
        while not exchange.has_started:
            await asyncio.sleep(0)
        server.incoming.put_nowait(GONE)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        server.may_send.set()
        await answering
    assert server.body == b'{"ok":true}'


async def test_a_client_that_never_reads_counts_as_gone() -> None:
    server = Server(BODY)
    exchange = server.exchange(write_timeout_s=0.01)
    await exchange.start_stream()
    server.may_send.clear()
    with pytest.raises(ClientGone):
        await exchange.send_chunk(b"data")


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


@pytest.mark.parametrize(("path", "dialect"), [("/v1/messages", "anthropic"), ("/models/load", "openai")])
async def test_errors_speak_the_dialect_of_the_path(path: str, dialect: str) -> None:
    server = Server(BODY)
    exchange = server.exchange(path=path)
    await exchange.read_body()
    await exchange.fail(ApiError("overloaded", "busy", retry_after=7))
    assert server.sent[0]["status"] == (529 if dialect == "anthropic" else 503)
    assert (b"retry-after", b"7") in server.sent[0]["headers"]
    assert (b'"type":"error"' in server.body) == (dialect == "anthropic")
