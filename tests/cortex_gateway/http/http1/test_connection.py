"""Bytes of a connection become requests, one after the other, however they are cut."""

from __future__ import annotations

import asyncio
import socket

import pytest
from cortex_gateway.http.asgi import Receive, Scope, Send
from cortex_gateway.http.http1.connection import MAX_HEADERS

from tests.cortex_gateway.http.http1.harness import CLOSING, SMUGGLED, Server, post

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


async def test_the_absolute_form_is_the_same_path(strict: Server) -> None:
    for target in (b"http://x:1/a?b", b"http://x"):
        await strict.ask(b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % target)
    assert strict.seen == [("GET", "/a", b"b", b""), ("GET", "/", b"", b"")]


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
            await asyncio.sleep(0.3)  # no event tells that nothing more goes out
    assert before > size // 2, "most of it still waits at the client"
    reading.set()
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert len(served.seen[0][3] or b"") == size
    writer.transport.abort()


async def test_a_client_that_shuts_its_side_after_asking_still_gets_its_answer(served: Server) -> None:
    reader, writer = await served.connect()
    writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
    writer.write_eof()
    async with asyncio.timeout(20):
        assert b"/a " in await reader.read()
    writer.close()
