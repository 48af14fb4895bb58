"""One exchange against a scripted server side."""

from __future__ import annotations

import asyncio

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.api.asgi import ClientGone, Message

from tests.neuron.daemon.api.harness import Server

GONE: Message = {"type": "http.disconnect"}
BODY: Message = {"type": "http.request", "body": b"{}", "more_body": False}


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


@pytest.mark.parametrize(("path", "dialect"), [("/v1/messages", "anthropic"), ("/models/load", "openai")])
async def test_errors_speak_the_dialect_of_the_path(path: str, dialect: str) -> None:
    server = Server(BODY)
    exchange = server.exchange(path=path)
    await exchange.read_body()
    await exchange.fail(ApiError("overloaded", "busy", retry_after=7))
    assert server.sent[0]["status"] == (529 if dialect == "anthropic" else 503)
    assert (b"retry-after", b"7") in server.sent[0]["headers"]
    assert (b'"type":"error"' in server.body) == (dialect == "anthropic")
