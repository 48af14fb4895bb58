"""HTTP/1 on real sockets, with either parser: framing, refusals, back-pressure, the end of connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import get_args

import h2.config
import h2.connection
import h2.events
import pytest
from cortex_core.config import ConfigError
from cortex_core.gateway_config import Http1Parser
from cortex_gateway import server
from cortex_gateway.http.asgi import Receive, Scope, Send
from cortex_gateway.http.http1 import gateway_connection
from cortex_gateway.http.http1.connection import MAX_HEADERS

App = Callable[[Scope, Receive, Send], Awaitable[None]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """An application behind the gateway's own listener; `seen` is what reached it: method, path, query, body."""

    def __init__(self, parser: Http1Parser) -> None:
        self.parser = parser
        self.app: App = self.echo
        self.seen: list[tuple[str, str, bytes, bytes | None]] = []
        self.scopes: list[Scope] = []
        self.ended = asyncio.Event()
        self.stop = asyncio.Event()
        self.port = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.scopes.append(scope)
        try:
            await self.app(scope, receive, send)
        finally:
            self.ended.set()

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        body = b""
        is_whole = False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.append((scope["method"], scope["path"], scope["query_string"], None))
                return
            body += message["body"]
            is_whole = not message["more_body"]
        self.seen.append((scope["method"], scope["path"], scope["query_string"], body))
        answer = scope["path"].encode() + b" " + body
        headers = [(b"content-length", b"%d" % len(answer))] if scope["query_string"] == b"framed" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer, "more_body": False})

    async def connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes; the client does not."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            async with asyncio.timeout(20):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def serving(parser: Http1Parser) -> AsyncIterator[Server]:
    served = Server(parser)
    with server.bind("127.0.0.1:0") as listener:
        served.port = listener.getsockname()[1]
        task = server._start(served, listener, served.stop, "listener", parser)
        try:
            yield served
        finally:
            await server._close(task, served.stop)


@pytest.fixture(params=["httptools", "h11"])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    async with serving(request.param) as running:
        yield running


@pytest.fixture
async def strict() -> AsyncIterator[Server]:
    """With httptools."""
    async with serving("httptools") as running:
        yield running


def post(body: bytes = b"abc", *lines: bytes, path: bytes = b"/", framed: bool = True) -> bytes:
    length = [b"content-length: %d" % len(body)] if framed else []
    return (
        b"POST %b HTTP/1.1\r\nhost: x\r\n" % path
        + b"".join(b"%b\r\n" % line for line in (*lines, *length))
        + (b"\r\n" + body)
    )


CLOSING = b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


# ---------------------------------------------------------------------------------------------- requests and answers

GOOD = {
    "get": (b"GET /a?b=c HTTP/1.1\r\nhost: x\r\n\r\n", ("GET", "/a", b"b=c", b"")),
    "escaped": (b"GET /a%20b/%C3%A9 HTTP/1.1\r\nhost: x\r\n\r\n", ("GET", "/a b/é", b"", b"")),
    "length": (post(), ("POST", "/", b"", b"abc")),
    "empty": (post(b""), ("POST", "/", b"", b"")),
    "large": (post(b"x" * 300_000), ("POST", "/", b"", b"x" * 300_000)),
    "framed": (post(path=b"/?framed"), ("POST", "/", b"framed", b"abc")),
    "chunks": (
        post(b"3;note=1\r\nabc\r\n2\r\nde\r\n0\r\nx-trailer: 1\r\n\r\n", b"transfer-encoding: chunked", framed=False),
        ("POST", "/", b"", b"abcde"),
    ),
    "spaces": (b"GET / HTTP/1.1\r\nHost: \t x \t\r\nx-latin: \xe9\r\n\r\n", ("GET", "/", b"", b"")),
    "options": (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", ("OPTIONS", "*", b"", b"")),
    "unknown method": (b"BREW /pot HTTP/1.1\r\nhost: x\r\n\r\n", ("BREW", "/pot", b"", b"")),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_request_reaches_the_application_whole(served: Server, name: str) -> None:
    data, expected = GOOD[name]
    answer = await served.ask(data + CLOSING)
    assert served.seen == [expected, ("GET", "/last", b"", b"")]
    assert answer.count(b"HTTP/1.1 200") == 2 and b"\r\ndate: " in answer
    assert b"/last " in answer.rpartition(b"\r\n\r\n")[0], "the connection was kept for the second one"
    assert all(name == name.lower() and value == value.strip() for name, value in served.scopes[0]["headers"])
    assert b"x-trailer" not in dict(served.scopes[0]["headers"]), "what comes behind a body is no header"
    assert served.scopes[0]["client"][0] == "127.0.0.1"


async def test_any_cut_gives_the_same_requests(served: Server) -> None:
    data = b"\r\n" + GOOD["chunks"][0] + GOOD["framed"][0] + CLOSING
    expected = [GOOD["chunks"][1], GOOD["framed"][1], ("GET", "/last", b"", b"")]
    if served.parser == "h11":
        data = data.removeprefix(b"\r\n")
    for cut in range(1, len(data), 3):
        served.seen.clear()
        reader, writer = await served.connect()
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.write(data[:cut])
        await asyncio.sleep(0)
        writer.write(data[cut:])
        async with asyncio.timeout(20):
            await reader.read()
        assert served.seen == expected, cut
        writer.close()


async def test_requests_sent_ahead_are_answered_in_order(served: Server) -> None:
    num = 2000
    reader, writer = await served.connect()
    writer.write(b"".join(b"GET /%d?framed HTTP/1.1\r\nhost: x\r\n\r\n" % each for each in range(num)) + CLOSING)
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    assert [path for _, path, _, _ in served.seen] == [f"/{each}" for each in range(num)] + ["/last"]
    bodies = [part.partition(b"HTTP/1.1")[0] for part in answer.split(b"\r\n\r\n")[1:]]
    assert bodies[:num] == [b"/%d " % each for each in range(num)]


async def test_bodies_sent_ahead_wait_their_turn(served: Server) -> None:
    bodies = [bytes([65 + each]) * 100_000 for each in range(6)]
    await served.ask(b"".join(post(body) for body in bodies) + CLOSING)
    assert [body for *_, body in served.seen] == [*bodies, b""]


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


async def test_the_absolute_form_is_the_same_path(strict: Server) -> None:
    for target in (b"http://x:1/a?b", b"http://x"):
        await strict.ask(b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % target)
    assert strict.seen == [("GET", "/a", b"b", b""), ("GET", "/", b"", b"")]


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


# ---------------------------------------------------------------------------------------------- refusals

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked"
REFUSED = {
    "length and chunks": (400, post(b"0\r\n\r\n" + SMUGGLED, b"content-length: 5", CHUNKED, framed=False)),
    "chunks and length": (400, post(b"0\r\n\r\n" + SMUGGLED, CHUNKED, b"content-length: 5", framed=False)),
    "two lengths": (400, post(SMUGGLED, b"content-length: 5")),
    "the same length twice": (400, post(b"abc", b"content-length: 3")),
    "a list of lengths": (400, post(b"abc", b"content-length: 3, 3", framed=False)),
    "a signed length": (400, post(b"abc", b"content-length: +3", framed=False)),
    "a hexadecimal length": (400, post(b"abc", b"content-length: 0x3", framed=False)),
    "a length beyond 64 bits": (400, post(b"abc", b"content-length: 99999999999999999999", framed=False)),
    "chunked twice": (400, post(b"0\r\n\r\n", CHUNKED, CHUNKED, framed=False)),
    "chunked, but not last": (400, post(b"0\r\n\r\n", b"transfer-encoding: chunked, gzip", framed=False)),
    "chunked gzip": (501, post(b"0\r\n\r\n", b"transfer-encoding: gzip, chunked", framed=False)),
    "no chunks": (501, post(b"abc", b"transfer-encoding: xchunked", framed=False)),
    "chunks in HTTP/1.0": (400, b"POST / HTTP/1.0\r\nhost: x\r\n%b\r\n\r\n0\r\n\r\n" % CHUNKED),
    "a folded header": (400, b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n"),
    "a space before the colon": (400, post(b"abc", b"content-length : 3", framed=False)),
    "a line feed alone": (400, b"GET / HTTP/1.1\nhost: x\n\n"),
    "a line feed in a head": (400, b"GET / HTTP/1.1\r\nhost: x\na: b\r\n\r\n"),
    "a return in a value": (400, b"GET / HTTP/1.1\r\nhost: x\r\na: b\rc\r\n\r\n"),
    "a zero byte": (400, b"GET / HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n"),
    "a control character": (400, b"GET / HTTP/1.1\r\nhost: x\r\na: b\x01c\r\n\r\n"),
    "a name of nothing": (400, b"GET / HTTP/1.1\r\nhost: x\r\n: b\r\n\r\n"),
    "no colon": (400, b"GET / HTTP/1.1\r\nhost: x\r\nabc\r\n\r\n"),
    "bytes in a path": (400, b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n"),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n"),
    "HTTP/0.9": (505, b"GET /\r\n\r\n"),
    "HTTP/1.2": (400, b"GET / HTTP/1.2\r\nhost: x\r\n\r\n"),
    "HTTP/2.0 by name": (505, b"GET / HTTP/2.0\r\nhost: x\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200),
    "too many headers": (431, b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * MAX_HEADERS + b"\r\n"),
    "a long head": (431, b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 200_000 + b"\r\n\r\n"),
    "a long path": (431, b"GET /" + b"b" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_could_be_read_in_two_ways_is_refused_with_all_that_follows(strict: Server, name: str) -> None:
    status, data = REFUSED[name]
    answer = await strict.ask(data + SMUGGLED)
    assert answer.startswith(b"HTTP/1.1 %d" % status), answer[:200]
    assert answer.count(b"HTTP/1.1") == 1 and b"connection: close" in answer
    assert strict.seen == []


@pytest.mark.parametrize("name", ["length and chunks", "a folded header", "no host", "a long head"])
async def test_a_bad_request_behind_a_good_one_is_refused_after_its_answer(strict: Server, name: str) -> None:
    status, data = REFUSED[name]
    answer = await strict.ask(post() + data + SMUGGLED)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"%d" % status]
    assert strict.seen == [("POST", "/", b"", b"abc")]


BAD_CHUNKS = [
    *(b"zz\r\nabc\r\n", b"0x3\r\nabc\r\n", b"-3\r\nabc\r\n", b"3 \r\nabc\r\n", b"3\nabc\r\n", b"3;a=b\nabc\r\n"),
    *(b"2\r\nabc\r\n", b"3\r\nabc0\r\n\r\n", b"ffffffffffffffffff\r\nabc\r\n"),
    b"3\r\nabc\r\n0\r\ncontent-length: 5\r\n\r\n",
]


@pytest.mark.parametrize("chunks", BAD_CHUNKS)
async def test_a_body_that_breaks_off_is_a_400_and_a_disconnect(strict: Server, chunks: bytes) -> None:
    answer = await strict.ask(post(chunks, CHUNKED, framed=False) + SMUGGLED)
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
    await strict.ended.wait()
    assert strict.seen == [("POST", "/", b"", None)]


@pytest.mark.parametrize("trailers", [b"a: " + b"b" * 200_000, b"a: b\r\n" * 40_000])
async def test_what_follows_a_body_is_bounded_like_a_head(strict: Server, trailers: bytes) -> None:
    answer = await strict.ask(post(b"3\r\nabc\r\n0\r\n" + trailers, CHUNKED, framed=False))
    assert answer.startswith(b"HTTP/1.1 431"), answer[:200]
    await strict.ended.wait()
    assert strict.seen == [("POST", "/", b"", None)]


async def test_a_body_that_breaks_off_behind_a_running_request_is_refused_after_its_answer(strict: Server) -> None:
    answer = await strict.ask(post() + post(b"zz\r\nabc\r\n", CHUNKED, framed=False) + SMUGGLED)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]
    assert strict.seen == [("POST", "/", b"", b"abc")]


async def test_nothing_is_read_after_connection_close(strict: Server) -> None:
    answer = await strict.ask(CLOSING + SMUGGLED + b"\xff")
    assert answer.count(b"HTTP/1.1") == 1 and [path for _, path, _, _ in strict.seen] == ["/last"]


# ---------------------------------------------------------------------------------------------- handed to hypercorn


@pytest.mark.parametrize("num_before", [0, 1])
async def test_the_body_of_an_upgrade_is_not_taken_for_a_request(served: Server, num_before: int) -> None:
    """Java's HTTP client asks for h2c with every request. llhttp would take the body for the other protocol."""
    reader, writer = await served.connect()
    for _ in range(num_before):
        writer.write(post(path=b"/?framed"))
        assert (await reader.readuntil(b"/ abc")).startswith(b"HTTP/1.1 200")
    settings = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAAP__")
    writer.write(post(SMUGGLED, *settings) + CLOSING)
    async with asyncio.timeout(20):
        assert (await reader.read()).count(b"HTTP/1.1 200") == 2
    assert [body for *_, body in served.seen[num_before:]] == [SMUGGLED, b""]
    writer.close()


async def test_an_upgrade_sent_ahead_is_refused(strict: Server) -> None:
    answer = await strict.ask(post() + post(SMUGGLED, b"connection: upgrade", b"upgrade: h2c"))
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]
    assert strict.seen == [("POST", "/", b"", b"abc")]


async def test_a_websocket_is_hypercorns(served: Server) -> None:
    reader, writer = await served.connect()
    writer.write(
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 403")
    assert served.scopes[0]["type"] == "websocket"
    writer.close()


@pytest.mark.parametrize("cut", [2, 10, 100])
async def test_http_2_with_prior_knowledge_is_hypercorns(served: Server, cut: int) -> None:
    reader, writer = await served.connect()
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    headers = [(":method", "GET"), (":path", "/two"), (":scheme", "http"), (":authority", "x")]
    client.send_headers(1, headers, end_stream=True)
    data = client.data_to_send()
    writer.write(data[:cut])
    await asyncio.sleep(0.02)  # so that it may come in two pieces; right either way
    writer.write(data[cut:])
    body = b""
    async with asyncio.timeout(20):
        while b"/two " not in body:
            for event in client.receive_data(await reader.read(65536)):
                if isinstance(event, h2.events.DataReceived):
                    body += event.data
    assert served.scopes[0]["http_version"] == "2"
    writer.close()


# ---------------------------------------------------------------------------------------------- pressure and ends


async def test_a_body_that_nobody_reads_is_not_taken_in(served: Server) -> None:
    reading = asyncio.Event()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await reading.wait()
        await served.echo(scope, receive, send)

    served.app = late
    reader, writer = await served.connect()
    size = 32 * 2**20
    writer.write(post(b"x" * size, path=b"/?framed"))
    before = size
    async with asyncio.timeout(60):
        while (left := writer.transport.get_write_buffer_size()) < before or left == size:
            before = left
            await asyncio.sleep(0.3)
    assert before > size // 2, "most of it still waits at the client"
    reading.set()
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert len(served.seen[0][3] or b"") == size
    writer.transport.abort()


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
            await asyncio.sleep(0.3)
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


async def test_a_client_that_shuts_its_side_after_asking_still_gets_its_answer(served: Server) -> None:
    reader, writer = await served.connect()
    writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
    writer.write_eof()
    async with asyncio.timeout(20):
        assert b"/a " in await reader.read()
    writer.close()


async def test_an_idle_connection_ends_with_the_server_and_a_busy_one_after_its_answer(served: Server) -> None:
    go_on, asked = asyncio.Event(), asyncio.Event()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        asked.set()
        await go_on.wait()
        await served.echo(scope, receive, send)

    served.app = late
    silent, silent_writer = await served.connect()
    busy, busy_writer = await served.connect()
    busy_writer.write(post(path=b"/?framed"))
    await asked.wait()
    served.stop.set()
    async with asyncio.timeout(20):
        assert await silent.read() == b""
        go_on.set()
        assert (await busy.read()).endswith(b"/ abc")
    silent_writer.close()
    busy_writer.close()


async def test_a_connection_without_a_request_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.2)
    async with serving("httptools") as served:
        assert (await served.ask(post(path=b"/?framed"))).endswith(b"/ abc")
        assert await served.ask(b"GET / HTTP/1.1\r\nhost: x\r\na") == b""
        assert await served.ask(b"") == b""


# ---------------------------------------------------------------------------------------------- faults


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


def test_a_parser_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [gateway_connection.has_httptools(parser) for parser in ("auto", "h11")] == [False, False]
    with pytest.raises(ConfigError, match="http1_parser"):
        gateway_connection.has_httptools("httptools")
    assert set(get_args(Http1Parser)) == {"auto", "h11", "httptools"}
