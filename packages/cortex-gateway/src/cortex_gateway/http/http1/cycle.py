"""One HTTP/1 request and its answer, as an ASGI application sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from cortex_gateway.http.asgi import SHORTCUT, Message, RawHeaders, Scope

BODY_HIGH_WATER = 64 * 1024
"""How much of a request body may wait for the application before nothing more is read from the client."""

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
WITHOUT_BODY = frozenset((204, 304))
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
DISCONNECT: Message = {"type": "http.disconnect"}


class Line(Protocol):
    """What a cycle needs of its connection."""

    write: Callable[[bytes], None]
    is_blocked: bool
    is_lost: bool
    is_last: bool

    async def drained(self) -> None: ...
    def body_was_taken(self) -> None: ...
    def was_answered(self, cycle: RequestCycle) -> None: ...
    def own_headers(self) -> RawHeaders: ...


class RequestCycle:
    """The connection feeds it; `receive` and `send` are the application's.

    is_whole: the request's body has come to its end. is_started, is_answered: the answer's head, and all of it, were
    written; the head goes out with the first of the body, in one write where both come at once. is_gone: the client has
    closed its side, or the connection is lost. is_cut: the connection has ended this request by itself; nothing more is
    written for it.
    """

    __slots__ = (
        "_body",
        "_is_chunked",
        "_is_delivered",
        "_is_without_body",
        "_left",
        "_line",
        "_moved",
        "_on_disconnect",
        "_unsent_head",
        "is_answered",
        "is_cut",
        "is_gone",
        "is_started",
        "is_whole",
        "num_buffered",
        "scope",
        "wants_continue",
    )

    def __init__(self, line: Line, scope: Scope, *, wants_continue: bool) -> None:
        self.scope = scope
        self.is_whole = False
        self.is_started = False
        self.is_answered = False
        self.is_cut = False
        self.is_gone = False
        self.num_buffered = 0
        self.wants_continue = wants_continue
        self._line = line
        self._body: list[bytes] = []
        self._is_delivered = False
        self._is_chunked = False
        self._is_without_body = False
        self._left: int | None = None
        self._unsent_head = b""
        self._moved: asyncio.Event | None = None
        self._on_disconnect: Callable[[], None] | None = None
        scope["extensions"] = {SHORTCUT: self}

    # ------------------------------------------------------------------------------------------ the client's side

    def feed(self, data: bytes) -> None:
        self._body.append(data)
        self.num_buffered += len(data)
        self._has_moved()

    def end(self) -> None:
        self.is_whole = True
        self._has_moved()

    def lose(self) -> None:
        """The client is gone; what it had sent can still be read."""
        self.is_gone = True
        self._has_moved()
        if self._on_disconnect is not None:
            self._on_disconnect()

    def _has_moved(self) -> None:
        if self._moved is not None:
            self._moved.set()

    # ------------------------------------------------------------------------------------------ the application's side

    async def receive(self) -> Message:
        """The body as it comes, whatever has come of it in one message; after it, the end of the connection."""
        while True:
            if not self._is_delivered and (self._body or self.is_whole):
                return {"type": "http.request", "body": self._take(), "more_body": not self.is_whole}
            if self.is_gone or self.is_answered:
                return DISCONNECT
            if self.wants_continue and not self.is_started:
                self.wants_continue = False
                self._line.write(CONTINUE)
            if self._moved is None:
                self._moved = asyncio.Event()
            self._moved.clear()
            await self._moved.wait()

    def whole_body(self) -> bytes | None:
        return self._take() if self.is_whole and not self._is_delivered else None

    def on_disconnect(self, call: Callable[[], None] | None) -> None:
        self._on_disconnect = call
        if call is not None and self.is_gone:
            call()

    def _take(self) -> bytes:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self.num_buffered = 0
        self._is_delivered = self.is_whole
        self._line.body_was_taken()
        return body

    async def send(self, message: Message) -> None:
        """Waits while the client does not read. Raises `ConnectionError` once there is nobody to send to."""
        line = self._line
        if line.is_lost or self.is_cut:
            raise ConnectionResetError("the client has closed the connection")
        kind = message["type"]
        head = self._unsent_head
        if kind == "http.response.body" and (head or self.is_started) and not self.is_answered:
            data = message.get("body", b"")
            if message.get("more_body", False):
                self._write(head, self._framed(data) if data else b"")
            else:
                self._finish(head, data)
        elif kind == "http.response.start" and not head and not self.is_started:
            self._unsent_head = self._head(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"{kind} is not what an answer goes on with here")
        if line.is_blocked:
            await line.drained()

    # ------------------------------------------------------------------------------------------ framing

    def _head(self, status: int, headers: RawHeaders) -> bytes:
        """The answer's head. Decides how its body is framed (RFC 9112, section 6)."""
        line = self._line
        scope = self.scope
        is_framed = is_closing = False
        lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        for name, value in headers:
            lowered = name.lower()
            if lowered == b"content-length":
                is_framed = True
                self._left = int(value)
            elif lowered == b"transfer-encoding":
                continue  # it is decided here
            elif lowered == b"connection" and value.lower() == b"close":
                is_closing = True
            lines.append(b"%b: %b\r\n" % (name, value))
        lines.extend(b"%b: %b\r\n" % pair for pair in line.own_headers())
        self._is_without_body = scope["method"] == "HEAD" or status in WITHOUT_BODY
        if not is_framed and status not in WITHOUT_BODY:
            if scope["http_version"] == "1.1":
                self._is_chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                line.is_last = True  # its end is the connection's end
        if line.is_last and not is_closing:
            lines.append(b"connection: close\r\n")
        elif is_closing:
            line.is_last = True
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise ValueError("a header of the answer holds a line break")
        return head + b"\r\n"

    def _framed(self, data: bytes) -> bytes:
        if self._is_without_body:
            return b""
        if self._is_chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise RuntimeError("the answer is longer than its content-length")
        return bytes(data)

    def _write(self, head: bytes, data: bytes) -> None:
        if head:
            self.is_started = True
            self._unsent_head = b""
            data = head + data
        if data:
            self._line.write(data)

    def _finish(self, head: bytes, data: bytes) -> None:
        last = self._framed(data) if data else b""
        if self._is_chunked and not self._is_without_body:
            last += b"0\r\n\r\n"
        elif self._left and not self._is_without_body:
            raise RuntimeError("the answer is shorter than its content-length")
        self._write(head, last)
        self.is_answered = True
        self._has_moved()
        self._line.was_answered(self)

    async def run(self, app: Callable[..., Any], log_fault: Callable[[], Any]) -> None:
        """The application's task: what it leaves unanswered is a 500, or an answer that visibly breaks off."""
        try:
            await app(self.scope, self.receive, self.send, None, None)
        except Exception as exc:
            if not ((self._line.is_lost or self.is_cut) and isinstance(exc, OSError)):
                await log_fault()
        finally:
            if not self.is_answered:
                self._break_off()

    def _break_off(self) -> None:
        line = self._line
        line.is_last = True
        if not self.is_started and not self.is_gone and not self.is_cut:
            self.is_started = True
            line.write(self._head(500, [(b"content-length", b"0")]))
        self.is_answered = True
        line.was_answered(self)
