"""What goes to the client, and what is done with a body that is not wanted."""

from __future__ import annotations

import asyncio

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.http.asgi import Message
from cortex_gateway.http.body import RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.http.framing import Framing

from tests.cortex_gateway.http.harness import Server, body_of


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


async def test_a_ping_that_falls_due_as_the_answer_comes_begins_it_with_its_headers() -> None:
    """Between the moment that it was due and the one that it is sent, nobody wants any more of them."""
    server, loop = Server(), asyncio.get_running_loop()
    writer = ClientWriter(server.send, Framing(keep_alive=b": ping\n\n"))
    answer_came = loop.create_future()
    loop.call_later(0, answer_came.set_result, None)  # before the ping, in the same turn of the loop
    writer.keep_alive(0, 60, headers=lambda: [(b"x-request-id", b"req_1")], note=lambda: b": loading\n\n")
    await answer_came
    assert await writer.quiet()
    assert (b"x-request-id", b"req_1") in server.sent[0]["headers"]
    assert server.sent[1]["body"] == b": loading\n\n: ping\n\n"
