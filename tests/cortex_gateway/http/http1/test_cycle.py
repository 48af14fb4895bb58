"""One request and its answer over HTTP/1: what the application hears, and what goes out."""

from __future__ import annotations

import asyncio

import pytest
from cortex_gateway.http.asgi import Receive, Scope, Send
from cortex_gateway.http.http1.cycle import RequestCycle

from tests.cortex_gateway.http.http1.harness import CLOSING, SMUGGLED, Server, post


@pytest.mark.parametrize("path", [b"/", b"/?framed"])
async def test_a_head_request_gets_no_body(served: Server, path: bytes) -> None:
    answer = await served.ask(b"HEAD %b HTTP/1.1\r\nhost: x\r\n\r\n" % path + CLOSING)
    first, _, rest = answer.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200") and rest.startswith(b"HTTP/1.1 200")
    assert (b"content-length: 2" in first) is (path == b"/?framed")


async def test_http_1_0_gets_a_body_that_ends_with_the_connection(served: Server) -> None:
    answer = await served.ask(b"GET /a HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"/a " and b"transfer-encoding" not in head and b"connection: close" in head.lower()


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body_has_none(served: Server, status: int) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"never", "more_body": False})

    served.app = answer
    got = await served.ask(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" + CLOSING)
    assert got.count(b"HTTP/1.1 %d" % status) == 2 and b"never" not in got


async def test_100_continue_is_said_when_the_body_is_asked_for(strict: Server) -> None:
    asked = asyncio.Event()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await asked.wait()
        await strict.echo(scope, receive, send)

    strict.app = late
    reader, writer = await strict.connect()
    writer.write(post(b"", b"expect: 100-continue", b"content-length: 3", framed=False))
    asked.set()
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"abc")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert strict.seen == [("POST", "/", b"", b"abc")]
    writer.close()


async def test_who_is_refused_at_once_is_not_told_to_continue(strict: Server) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    strict.app = refuse
    answer = await strict.ask(post(b"", b"expect: 100-continue", b"content-length: 3", framed=False))
    assert answer.startswith(b"HTTP/1.1 413") and b"100 Continue" not in answer


async def test_an_application_waits_for_a_client_that_does_not_read_and_learns_that_it_is_gone(strict: Server) -> None:
    raised: list[BaseException] = []
    sent = 0

    async def flood(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
                sent += 1
        except BaseException as exc:
            raised.append(exc)
            raise

    strict.app = flood
    _, writer = await asyncio.open_connection("127.0.0.1", strict.port, limit=1)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    before = -1
    async with asyncio.timeout(60):
        while sent > before or sent == 0:
            before = sent
            await asyncio.sleep(0.3)  # no event tells that nothing more is taken
    assert sent < 500
    writer.transport.abort()
    async with asyncio.timeout(20):
        await strict.ended.wait()
    assert isinstance(raised[0], OSError)


@pytest.mark.parametrize("ends", ["closes", "resets", "shuts its side"])
async def test_an_application_that_waits_hears_of_a_client_that_ends(served: Server, ends: str) -> None:
    heard: list[str] = []
    waiting = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        waiting.set()
        heard.append((await receive())["type"])

    served.app = wait
    _, writer = await served.connect()
    writer.write(post())
    await waiting.wait()
    if ends == "closes":
        writer.close()
    elif ends == "resets":
        writer.transport.abort()
    else:
        writer.write_eof()
    async with asyncio.timeout(20):
        await served.ended.wait()
    assert heard == ["http.disconnect"]
    writer.close()


@pytest.mark.parametrize("where", ["before", "after"])
async def test_an_application_that_fails_is_a_500_or_a_visible_break(served: Server, where: str) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if where == "after":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        raise LookupError("on purpose")

    served.app = fail
    answer = await served.ask(post())
    if where == "before":
        assert answer.startswith(b"HTTP/1.1 500")
    else:
        assert b"part" in answer and not answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("header", [(b"a", b"b\r\nc: d"), (b"a: b\r\nc", b"d"), (b"a", b"b\nc"), (b"a", b"\0")])
async def test_a_header_cannot_bring_another(served: Server, header: tuple[bytes, bytes]) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [header]})

    served.app = answer
    assert (await served.ask(post())).startswith(b"HTTP/1.1 500")


@pytest.mark.parametrize("length", [b"2", b"5"])
async def test_a_body_that_is_not_its_length_breaks_off(strict: Server, length: bytes) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": b"abc", "more_body": False})

    strict.app = answer
    body = (await strict.ask(post() + SMUGGLED)).partition(b"\r\n\r\n")[2]
    assert body == b"" and len(strict.scopes) == 1


class WrittenLine:
    """A connection that remembers each write."""

    is_blocked = is_lost = is_last = False

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.write = self.writes.append

    async def drained(self) -> None:
        return

    def body_was_taken(self) -> None:
        return

    def was_answered(self, cycle: RequestCycle) -> None:
        return

    def own_headers(self) -> list[tuple[bytes, bytes]]:
        return []


@pytest.mark.parametrize(
    ("bodies", "writes"),
    [
        ([(b"all", False)], [b"HEAD3\r\nall\r\n0\r\n\r\n"]),
        ([(b"", False)], [b"HEAD0\r\n\r\n"]),
        ([(b"a", True), (b"b", False)], [b"HEAD1\r\na\r\n", b"1\r\nb\r\n0\r\n\r\n"]),
        ([(b"", True), (b"b", True), (b"", True), (b"", False)], [b"HEAD", b"1\r\nb\r\n", b"0\r\n\r\n"]),
    ],
)
async def test_a_head_goes_out_with_the_first_of_the_body(
    bodies: list[tuple[bytes, bool]], writes: list[bytes]
) -> None:
    """An answer that is there at once is one write, and a body without bytes sends the head by itself."""
    line = WrittenLine()
    cycle = RequestCycle(line, {"method": "GET", "http_version": "1.1"}, wants_continue=False)
    await cycle.send({"type": "http.response.start", "status": 200, "headers": []})
    assert line.writes == [] and not cycle.is_started
    for data, more in bodies:
        await cycle.send({"type": "http.response.body", "body": data, "more_body": more})
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert [each.replace(head, b"HEAD") for each in line.writes] == writes
    assert cycle.is_started and cycle.is_answered
    with pytest.raises(RuntimeError):
        await cycle.send({"type": "http.response.start", "status": 200, "headers": []})


async def test_what_fails_between_head_and_body_is_a_500() -> None:
    line = WrittenLine()
    cycle = RequestCycle(line, {"method": "GET", "http_version": "1.1"}, wants_continue=False)

    async def fails(scope: Scope, receive: Receive, send: Send, *_: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError

    async def log() -> None:
        return

    await cycle.run(fails, log)
    assert b"".join(line.writes).startswith(b"HTTP/1.1 500 ") and cycle.is_answered
