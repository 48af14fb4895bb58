"""What no client library sends: oversized, cut off, slow and malformed requests, byte by byte.

Neither server may answer with a fault of its own, leave a connection hanging, or stop serving others.
"""

from __future__ import annotations

import gzip
import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.e2e.fleet_process import MODEL, call
from tests.fuzz.raw_http import Answer, connect, exchange, posted, read_answer, read_answers, request, send
from tests.fuzz.servers import MAX_BODY_BYTES, Servers

CHAT = "/v1/chat/completions"
POSTS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
GOOD = json.dumps({"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}).encode()


@pytest.fixture(params=["gateway", "neuron"])
def url(servers: Servers, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of either server, which serves others all the while."""
    url = servers.urls[request.param]
    yield url
    status, _, body = call(url, "POST", CHAT, GOOD)
    assert status == 200, body


def error_of(answer: Answer) -> dict[str, Any]:
    document = json.loads(answer.body)
    error = document["error"]
    assert error["message"] and error["type"]
    return dict(error)


# ---------------------------------------------------------------------------------------------- oversized


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_announced_too_large_is_a_413_before_it_is_sent(url: str, path: str) -> None:
    for length in (MAX_BODY_BYTES + 1, 10**15):
        answer = exchange(url, request("POST", path, f"content-length: {length}"), b"{")
        assert answer.status == 413, answer
        assert error_of(answer)["type"] in ("invalid_request_error", "request_too_large")


def test_a_body_that_grows_too_large_is_a_413(url: str) -> None:
    chunk = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
    head = request("POST", CHAT, "transfer-encoding: chunked")
    answer = exchange(url, head, *[chunk] * (2 * MAX_BODY_BYTES // 65536))
    assert answer.status == 413, answer


@pytest.mark.parametrize("length", ["9" * 30, "9" * 5000], ids=len)
def test_a_length_that_no_number_holds_is_refused(url: str, length: str) -> None:
    answer = exchange(url, request("POST", CHAT, f"content-length: {length}"))
    assert answer.status in (400, 413), answer


def test_a_small_body_that_unpacks_to_a_large_one_is_a_413(url: str) -> None:
    packed = gzip.compress(b'{"model": "x", "messages": "' + b"x" * 50 * MAX_BODY_BYTES + b'"}')
    assert len(packed) < MAX_BODY_BYTES
    answer = exchange(url, posted(CHAT, packed, "content-encoding: gzip"))
    assert answer.status == 413, answer


@pytest.mark.parametrize(
    "headers",
    [[f"x-large: {'x' * 200_000}"], [f"x-{i}: {'x' * 100}" for i in range(2000)], [f"x-{i}:" for i in range(30_000)]],
    ids=["one", "many", "countless"],
)
def test_headers_without_measure_are_a_431(url: str, headers: list[str]) -> None:
    answer = exchange(url, request("GET", "/health", *headers))
    assert answer.status in (0, 400, 431), answer  # 0: closed with the rest unread, which resets the connection


def test_a_path_without_end_is_refused(url: str) -> None:
    answer = exchange(url, request("GET", "/v1/models/" + "x" * 100_000))
    assert answer.status in (0, 400, 404, 414, 431), answer


# ---------------------------------------------------------------------------------------------- cut off


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("end", ["half", "whole"])
def test_a_body_that_is_cut_off_is_nobodys_request(url: str, path: str, end: str) -> None:
    """The client shuts its sending half, or the whole connection."""
    for head in (f"content-length: {len(GOOD)}", "transfer-encoding: chunked"):
        body = b"%x\r\n%b" % (len(GOOD), GOOD[:20]) if "chunked" in head else GOOD[:20]
        with connect(url) as connection:
            send(connection, [request("POST", path, head, body=body)])
            if end == "half":
                connection.shutdown(socket.SHUT_WR)
                assert read_answer(connection).status in (0, 400)


@pytest.mark.parametrize("part", [b"P", b"POST", b"POST /v1/messages HT", b"GET / HTTP/1.1\r\nhost: x\r\nx"])
def test_a_head_that_is_cut_off_is_nobodys_request(url: str, part: bytes) -> None:
    with connect(url) as connection:
        send(connection, [part])
        connection.shutdown(socket.SHUT_WR)
        assert read_answer(connection).status in (0, 400)


def test_a_packed_body_that_is_cut_off_is_a_400(url: str) -> None:
    packed = gzip.compress(GOOD)
    assert exchange(url, posted(CHAT, packed[:-9], "content-encoding: gzip")).status == 400
    assert exchange(url, posted(CHAT, b"noise", "content-encoding: deflate")).status == 400
    assert exchange(url, posted(CHAT, GOOD, "content-encoding: br")).status == 415


def test_clients_that_vanish_in_the_middle_of_answers_leave_nothing(url: str) -> None:
    body = json.dumps({**json.loads(GOOD), "stream": True, "max_tokens": 500, "ignore_eos": True}).encode()
    for path in (CHAT, "/v1/messages"):
        for _ in range(5):
            with connect(url) as connection:
                send(connection, [posted(path, body)])
                assert connection.recv(64).startswith(b"HTTP/1.1 200")


# ---------------------------------------------------------------------------------------------- slow


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_byte_a_while_is_a_408(url: str, path: str) -> None:
    stop = threading.Event()
    with connect(url) as connection:
        connection.sendall(request("POST", path, f"content-length: {len(GOOD)}"))

        def drip() -> None:
            for position in range(len(GOOD) - 1):
                if stop.wait(0.1):
                    return
                try:
                    connection.sendall(GOOD[position : position + 1])
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            answer = read_answer(connection)
        finally:
            stop.set()
            dripping.join()
    assert answer.status == 408, answer
    error_of(answer)


def test_a_hundred_heads_that_do_not_end_keep_nobody_else_waiting(url: str) -> None:
    with ExitStack() as open_connections:
        slow = [open_connections.enter_context(connect(url)) for _ in range(100)]
        for piece in (b"GET /health HTTP/1.1\r\n", b"host: x\r\n", b"x-a: ", b"b"):
            for connection in slow:
                connection.sendall(piece)
        status, _, body = call(url, "POST", CHAT, GOOD)
        assert status == 200, body
        slow[0].sendall(b"\r\nconnection: close\r\n\r\n")
        assert read_answer(slow[0]).status == 200  # and who ends at last is answered


def test_a_body_in_single_bytes_is_as_good_as_in_one_piece(url: str) -> None:
    pieces = [GOOD[i : i + 1] for i in range(len(GOOD))]
    assert exchange(url, request("POST", CHAT, f"content-length: {len(GOOD)}"), *pieces).status == 200
    chunks = [b"1\r\n%b\r\n" % piece for piece in pieces]
    assert exchange(url, request("POST", CHAT, "transfer-encoding: chunked"), *chunks, b"0\r\n\r\n").status == 200


# ---------------------------------------------------------------------------------------------- malformed


@pytest.mark.parametrize(
    "chunk",
    [
        b"zz\r\nx\r\n",
        b"-1\r\n\r\n",
        b"fffffffffffffffffffff\r\nx",
        b"2\r\nabc\r\n0\r\n\r\n",
        b"\r\n\r\n",
        b"1;" + b"x" * 99_999,
    ],
    ids=["no number", "negative", "beyond measure", "longer than said", "none", "an endless extension"],
)
def test_chunks_that_are_none_are_refused(url: str, chunk: bytes) -> None:
    answer = exchange(url, request("POST", CHAT, "transfer-encoding: chunked"), chunk)
    assert answer.status in (0, 400, 408, 413, 431), answer  # 408: an extension is read past until time is up


@pytest.mark.parametrize(
    "headers",
    [
        ["content-length: abc"],
        ["content-length: -1"],
        ["content-length: 1, 2"],
        ["content-length: 2", "content-length: 3"],
        ["content-length: 0x10"],
        ["content-length: +5"],
        ["content-length: \xb2"],
        ["transfer-encoding: chunked", "transfer-encoding: chunked"],
        ["transfer-encoding: gzip, chunked"],
        ["transfer-encoding: identity"],
        ["host: y"],
        ["x y: z"],
        [": z"],
        ["x: \x00"],
        ["x"],
    ],
    ids=repr,
)
def test_heads_that_are_none_are_a_400(url: str, headers: list[str]) -> None:
    answer = exchange(url, request("POST", CHAT, *headers), b"{}")
    assert answer.status in (400, 413, 501), answer


def test_a_length_beside_chunks_cannot_smuggle_a_request(url: str) -> None:
    """Either it is refused, or the chunks count, and what stands behind them is no second request."""
    smuggled = request("GET", "/health")
    head = request("POST", CHAT, "content-length: 5", "transfer-encoding: chunked", keep=True)
    with connect(url) as connection:
        send(connection, [head, b"0\r\n\r\n", smuggled])
        answers = read_answers(connection, 2)
    assert answers[0].status == 400, answers


@pytest.mark.parametrize(
    "name", ["content-type", "authorization", "x-api-key", "x-request-id", "anthropic-version", "accept"]
)
def test_headers_that_are_given_twice_are_no_fault(url: str, name: str) -> None:
    for values in (("a", "b"), ("\xff\xfe", ""), ("a" * 5000, "b")):
        answer = exchange(url, posted(CHAT, GOOD, *(f"{name}: {value}" for value in values)))
        assert answer.status in (200, 401), answer


@pytest.mark.parametrize("method", ["BREW", "PUT", "DELETE", "PATCH", "TRACE", "M-SEARCH", "X" * 300])
def test_methods_that_are_unknown_are_refused(url: str, method: str) -> None:
    for path in (CHAT, "/health", "/v1/models", "/nowhere"):
        answer = exchange(url, request(method, path))
        assert answer.status in (404, 405), answer
        error_of(answer)
        if answer.status == 405:
            assert b"\r\nallow: " in answer.head.lower() + b"\r\n", answer.head


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/v1/models/%ff%fe",
            "/v1/models/\xff\xfe",
            "/v1/models/%00",
            "/v1/models/%",
            "/v1/models/%zz",
            "//",
            "/../..",
        ),
        *("/%2e%2e/etc/passwd", "/v1/models/..%2f..%2fetc", "http://x/nowhere", "*", "nowhere", "/v1/models/\xc3\xa9"),
        *(
            "/v1//models/",
            "/admin/../v1/nothing",
            "/v1/models/%F0%9F%98%80",
            "/nowhere?%ff=%00&=&&a",
            "/v1/models/\u00a0",
        ),
    ],
)
def test_paths_that_lead_nowhere_are_not_found(url: str, target: str) -> None:
    answer = exchange(url, request("GET", target))
    assert answer.status in (400, 404), answer


@pytest.mark.parametrize("query", ["%ff=%fe", "limit=\xff", "limit=%00", "limit=1&limit=x", "&&&=&;", "x" * 5000])
def test_queries_of_any_bytes_are_no_fault(url: str, query: str) -> None:
    assert exchange(url, request("GET", f"/v1/models?{query}")).status in (200, 400)


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"\x00" * 100,
        b"\r\n" * 1000 + b"x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=lambda opening: repr(opening[:24]),
)
def test_other_protocols_are_turned_away(url: str, opening: bytes) -> None:
    with connect(url) as connection:
        send(connection, [opening])
        connection.shutdown(socket.SHUT_WR)
        answer = read_answer(connection)
    assert answer.status in (0, 200, 400, 404, 405, 505), answer


def test_a_websocket_is_turned_away(url: str) -> None:
    headers = ["upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="]
    for path in ("/", CHAT, "/v1/models"):
        with connect(url) as connection:
            send(connection, [request("GET", path, *headers, "connection: upgrade", keep=True)])
            connection.shutdown(socket.SHUT_WR)
            assert read_answer(connection).status in (0, 400, 403, 404, 405, 426)


def test_http_2_is_spoken_or_turned_away(url: str) -> None:
    """Garbage behind its preface ends the connection and nothing else."""
    for garbage in (b"", bytes(64), b"\xff" * 64, b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff" * 100):
        with connect(url) as connection:
            send(connection, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", garbage])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                continue


def test_requests_in_one_piece_are_answered_in_turn(url: str) -> None:
    turns = [request("GET", "/health", keep=True), posted(CHAT, GOOD, keep=True), request("GET", "/nowhere", keep=True)]
    turns += [posted("/v1/messages", b"{", keep=True), posted(CHAT, GOOD, keep=True), request("GET", "/v1/models")]
    with connect(url) as connection:
        send(connection, [b"".join(turns)])
        answers = read_answers(connection, len(turns))
    assert [answer.status for answer in answers] == [200, 200, 404, 400, 200, 200]


def test_an_expectation_of_a_word_before_the_body_is_met(url: str) -> None:
    with connect(url) as connection:
        send(connection, [request("POST", CHAT, f"content-length: {len(GOOD)}", "expect: 100-continue")])
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        connection.sendall(GOOD)
        assert read_answer(connection).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        ["x-cortex-hop: 1", "x-cortex-resume: garbage"],
        ["x-cortex-hop: 1", "x-cortex-resume: " + "9" * 4000],
        ["x-cortex-hop: 1", "x-cortex-resume: \xff"],
        ["x-cortex-resolved-model: \xff\xfe"],
        ["x-cortex-resolved-model: " + "x" * 5000],
        ["x-cortex-principal: \xff", "x-helexa-account-id: " + "y" * 5000],
    ],
    ids=lambda headers: headers[-1][:30],
)
def test_headers_of_the_hop_are_no_way_in(url: str, headers: list[str]) -> None:
    assert exchange(url, posted(CHAT, GOOD, *headers)).status in (200, 400, 404)


def test_noise_is_never_a_fault(url: str) -> None:
    """Good requests with bytes changed, lost, doubled and inserted at random."""
    rng = random.Random(7)
    for _ in range(150):
        path = rng.choice([*POSTS, "/models/load", "/admin/models/load", "/tokenize", "/detokenize"])
        raw = bytearray(posted(path, GOOD))
        for _ in range(rng.randint(1, 8)):
            position = rng.randrange(len(raw))
            deed = rng.randrange(4)
            if deed == 0:
                raw[position] = rng.randrange(256)
            elif deed == 1:
                del raw[position : position + rng.randint(1, 9)]
            elif deed == 2:
                raw[position:position] = raw[position : position + rng.randint(1, 30)]
            else:
                raw[position:position] = rng.randbytes(rng.randint(1, 9))
        with connect(url) as connection:
            send(connection, [bytes(raw)])
            connection.shutdown(socket.SHUT_WR)
            answer = read_answer(connection)
        assert answer.status < 500 or answer.status in (501, 503, 505, 529), (bytes(raw), answer)
