"""HTTP by hand: bytes out, bytes in, and what a client library would never send."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

HANG_S = 60.0
"""No answer and no end of the connection for so long is a hang."""


class Answer(NamedTuple):
    """status 0: the connection ended without one."""

    status: int
    head: bytes
    body: bytes


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=HANG_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def request(method: str, path: str, *headers: str, body: bytes = b"", keep: bool = False) -> bytes:
    """A request with a host, and with `connection: close` unless `keep`."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", *headers, *(() if keep else ("connection: close",))]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def posted(path: str, body: bytes, *headers: str, keep: bool = False) -> bytes:
    return request("POST", path, f"content-length: {len(body)}", *headers, body=body, keep=keep)


def exchange(url: str, *pieces: bytes) -> Answer:
    """Send, and read the first answer. Raises `TimeoutError` where there is neither an answer nor an end."""
    with connect(url) as connection:
        send(connection, pieces)
        return read_answer(connection)


def send(connection: socket.socket, pieces: Iterable[bytes]) -> None:
    """What can be sent: a server may answer and close before all of it is out."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            connection.sendall(piece)


def read_answer(connection: socket.socket, rest: bytes = b"") -> Answer:
    """One answer, its body by length, by chunks or to the end. What came behind it is lost."""
    return read_answers(connection, 1, rest)[0]


def read_answers(connection: socket.socket, count: int, rest: bytes = b"") -> list[Answer]:
    """As many answers, or fewer where the connection ends; the last is then cut off, or of status 0."""
    answers: list[Answer] = []
    while len(answers) < count:
        while b"\r\n\r\n" not in rest:
            more = _receive(connection)
            if not more:
                return [*answers, Answer(0, rest, b"")]
            rest += more
        head, _, rest = rest.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if 100 <= status < 200:
            continue
        lowered = head.lower()
        if b"transfer-encoding: chunked" in lowered:
            body, rest = _chunks(connection, rest)
        elif b"content-length: " in lowered:
            length = int(lowered.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            while len(rest) < length and (more := _receive(connection)):
                rest += more
            body, rest = rest[:length], rest[length:]
        else:
            body = b""
            while status not in (204, 304) and (more := _receive(connection)):
                rest += more
                body, rest = rest, b""
        answers.append(Answer(status, head, body))
    return answers


def _chunks(connection: socket.socket, rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        while b"\r\n" not in rest:
            more = _receive(connection)
            if not more:
                return body, b""
            rest += more
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        while len(rest) < size + 2 and (more := _receive(connection)):
            rest += more
        body, rest = body + rest[:size], rest[size + 2 :]
        if size == 0:
            return body, rest


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""
