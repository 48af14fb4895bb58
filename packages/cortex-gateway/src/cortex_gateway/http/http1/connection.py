"""HTTP/1 with httptools (llhttp) in place of h11, on a connection that hypercorn has accepted.

hypercorn stays the server: sockets, TLS, lifespan, HTTP/2 and shutdown are its own. What this replaces is the way of a
request from the socket to the application and back: one callback and one write where hypercorn has a stream reader, a
lock, two tasks and a pure-Python parser. It is strict where h11 is lenient: a request that two parsers could read in
two ways is refused and the connection closed. What is not plain HTTP/1 (an upgrade, CONNECT, HTTP/2 with prior
knowledge, a method that llhttp does not know) is handed to hypercorn with all its bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import httptools
from cortex_core.serving.connection_table import Connection

from cortex_gateway.http.asgi import RawHeaders, Scope
from cortex_gateway.http.http1.cycle import BODY_HIGH_WATER, STATUS_LINES, RequestCycle

SLICE = 16 * 1024
"""Parsed at a time, so that few requests can be queued behind the one that is answered: the rest waits as bytes."""
LINGER_S = 1.0
"""How long what a refused client still sends is swallowed."""
MAX_HEADERS = 256
"""More in one request is a 431, as is a head beyond the configured size."""


class _Refused(Exception):
    """Raised through the parser; `Http1Connection._verdict` says what for."""


class Http1Connection(asyncio.Protocol):
    """One client. hypercorn's task awaits `ended`: True if hypercorn itself has to go on with the connection.

    is_blocked: the client does not read. is_lost: nothing can be written any more. is_last: the connection ends with
    the answer that is being given. `parent` is the protocol of the stream that hypercorn has opened. `entry`: in the
    table of connections, which ends those that are idle for too long.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        config: Any,
        scope: Scope,
        transport: asyncio.Transport,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
        entry: Connection,
    ) -> None:
        self.ended: asyncio.Future[bool] = loop.create_future()
        self.is_blocked = False
        self.is_lost = False
        self.is_last = False
        self.tasks: set[asyncio.Task[None]] = set()
        self.write: Callable[[bytes], None] = transport.write
        self._app = app
        self._config = config
        self._scope = scope
        self._transport = transport
        self._reader = reader
        self._parent = transport.get_protocol()
        self._loop = loop
        self._entry = entry
        self._parser: Any = httptools.HttpRequestParser(self)
        self._verdict = 0  # the status of a refusal; 0: none
        self._is_foreign = False
        self._raw: bytes | None = b""  # from the beginning of the request whose head is being read, where that is known
        self._num_head_bytes = 0
        self._has_begun = False
        self._is_in_head = True
        self._url = b""
        self._headers: RawHeaders = []
        self._receiving: RequestCycle | None = None  # whose body is being read
        self._cycle: RequestCycle | None = None  # which is being answered
        self._queue: deque[RequestCycle] = deque()
        self._pending = b""
        self._is_paused = False
        self._is_half_closed = False
        self._is_deaf = False  # whatever still comes is not read
        self._num_requests = 0
        self._drain: asyncio.Future[None] | None = None
        self._lingering: asyncio.TimerHandle | None = None
        transport.set_protocol(self)

    # ------------------------------------------------------------------------------------------ the transport's calls

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._pending or self._queue:
            self._pending += data
            return
        self._parse(data)

    def eof_received(self) -> bool:
        """A client that closes its side is gone, as it is for hypercorn; what is being written is finished."""
        self._is_half_closed = True
        if self._cycle is None:
            return False
        self._lose_all()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(is_handed_over=False)
        self.is_lost = True
        self._lose_all()
        if self._drain is not None and not self._drain.done():
            self._drain.set_exception(ConnectionResetError("the client does not take what it is sent"))
            self._drain.exception()  # seen
        self._parent.connection_lost(exc)

    def pause_writing(self) -> None:
        self.is_blocked = True
        self._entry.stalls()

    def resume_writing(self) -> None:
        self.is_blocked = False
        self._entry.moves()
        if self._drain is not None and not self._drain.done():
            self._drain.set_result(None)
        self._drain = None

    # ------------------------------------------------------------------------------------------ for hypercorn's task

    def shut_down(self) -> None:
        """Close: now if nothing is being answered, else after the answer."""
        self.is_last = True
        if self._cycle is None:
            self._transport.close()

    def abort(self) -> None:
        for task in self.tasks:
            task.cancel()
        self._transport.abort()

    # ------------------------------------------------------------------------------------------ for the cycle

    async def drained(self) -> None:
        if self._drain is None:
            self._drain = self._loop.create_future()
        await asyncio.shield(self._drain)

    def own_headers(self) -> RawHeaders:
        """Date and whatever else hypercorn's configuration says, made once a second."""
        second, config = int(time.time()), self._config
        if config.answer_headers[0] != second:
            config.answer_headers = second, config.response_headers("h11")
        headers: RawHeaders = config.answer_headers[1]
        return headers

    def body_was_taken(self) -> None:
        if self._is_paused:
            self._resume()

    def was_answered(self, cycle: RequestCycle) -> None:
        self._cycle = None
        if cycle.is_cut and not cycle.is_started:
            return  # refused: what the client still sends is swallowed, and then the connection is closed
        if not cycle.is_whole:
            self.is_last = True  # the rest of the body is in the way of the next request
        if self.is_last or self._is_half_closed or self.is_lost:
            self._is_deaf = True
            self._transport.close()
        elif self._queue:
            self._begin(self._queue.popleft())
            self._loop.call_soon(self._go_on)
        else:
            self._entry.rests()
            if self._has_begun:
                self._entry.head_began()
            if self._verdict:
                self._refuse()
            elif self._is_paused:
                self._loop.call_soon(self._go_on)

    # ------------------------------------------------------------------------------------------ parsing

    def _go_on(self) -> None:
        """With what had to wait for an answer."""
        if self._pending and not self._queue and not self._is_deaf:
            data, self._pending = self._pending, b""
            self._parse(data)
        self._resume()

    def _parse(self, data: bytes) -> None:
        self._entry.head_began()
        if not self._has_begun:
            self._raw = data
        elif self._raw is not None:
            self._raw += data
        for start in range(0, len(data), SLICE):
            part = data if len(data) <= SLICE else data[start : start + SLICE]
            try:
                self._parser.feed_data(part)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
                self._failed(exc)
                return
            if self._is_in_head or self._receiving is not None:  # a head, or what follows the last byte of a body
                self._num_head_bytes += len(part)
                if self._num_head_bytes > self._config.h11_max_incomplete_size:
                    self._verdict = 431
                    self._failed(None)
                    return
            if self._queue:
                self._pending = data[start + SLICE :]
                break
        if not self._has_room():
            self._pause()

    def _failed(self, exc: Exception | None) -> None:
        if self.is_last and self._receiving is None and not self._verdict:
            self._is_deaf = True  # after `connection: close`: of no interest
            return
        is_foreign = self._is_foreign or isinstance(exc, httptools.HttpParserInvalidMethodError)
        if is_foreign and self._raw is not None and self._cycle is None:
            self._hand_over(self._raw)
            return
        self._verdict = self._verdict or 400
        self._is_deaf = True
        broken, self._receiving = self._receiving, None
        if broken is not None and broken in self._queue:
            self._queue.remove(broken)  # its body never ends: it is refused when its turn comes
        if broken is not None and broken is self._cycle:
            # The body that an application reads is no body: it learns of it as of a client that is gone.
            broken.lose()
            broken.is_cut = True
            if broken.is_started:
                self._transport.close()
            else:
                self._refuse()
        elif self._cycle is None:
            self._refuse()

    def _refuse(self) -> None:
        head = b"".join(b"%b: %b\r\n" % pair for pair in self.own_headers())
        self.write(STATUS_LINES[self._verdict] + b"content-length: 0\r\nconnection: close\r\n" + head + b"\r\n")
        self._is_deaf = True
        self._pending = b""
        self._resume()
        # Closing with input unread would make the kernel send a reset, which can destroy the answer on its way.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._lingering = self._loop.call_later(LINGER_S, self._transport.close)

    def _hand_over(self, raw: bytes) -> None:
        """To hypercorn, with everything since the beginning of this request."""
        self._stop(is_handed_over=True)
        if self.is_blocked:
            self._entry.moves()  # whoever has the connection now says it by itself
        self._transport.set_protocol(self._parent)
        self._reader.feed_data(raw)

    # ------------------------------------------------------------------------------------------ the parser's calls

    def on_message_begin(self) -> None:
        self._has_begun = True
        self._num_head_bytes = 0
        self._is_in_head = True
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url
        if self._parser.get_method() == b"PRI":
            # HTTP/2 with prior knowledge: the first thing of a connection, or nothing.
            self._is_foreign = self._num_requests == 0
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self._headers) >= MAX_HEADERS:
            self._verdict = 431
            raise _Refused
        self._headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser.should_upgrade():
            self._is_foreign = True  # llhttp would take a body for the other protocol
            raise _Refused
        version = parser.get_http_version()
        num_hosts = 0
        wants_continue = False
        for name, value in self._headers:
            if name == b"host":
                num_hosts += 1
            elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version != "1.1"):
                self._verdict = 501 if version == "1.1" else 400
                raise _Refused
            elif name == b"expect" and value.lower() == b"100-continue" and version == "1.1":
                wants_continue = True
        if version not in ("1.1", "1.0"):
            self._verdict = 505
            raise _Refused
        if num_hosts > 1 or (num_hosts == 0 and version == "1.1"):
            self._verdict = 400
            raise _Refused
        self._is_in_head = False
        self._raw = None
        target, _, query = self._url.partition(b"?")
        is_absolute = not target.startswith(b"/") and target != b"*"  # as a proxy is asked; whose, the door looks at
        path = ((httptools.parse_url(target).path or b"/") if is_absolute else target).decode("ascii")
        scope = {
            **self._scope,
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": unquote(path) if "%" in path else path,
            "raw_path": target,
            "query_string": query,
            "headers": self._headers,
            "state": dict(self._scope["state"]),
        }
        self._num_requests += 1
        cycle = self._receiving = RequestCycle(self, scope, wants_continue=wants_continue)
        self._headers = []  # trailers come here: counted, and they go nowhere
        self._num_head_bytes = 0
        if self._cycle is None and not self._queue:
            self._begin(cycle)
        else:
            self._queue.append(cycle)

    def on_body(self, data: bytes) -> None:
        self._num_head_bytes = 0
        if self._receiving is not None:
            self._receiving.feed(data)

    def on_message_complete(self) -> None:
        cycle, self._receiving = self._receiving, None
        if cycle is not None:
            cycle.end()
            if cycle is self._cycle:
                self._entry.works()
        self._has_begun = False
        self._is_in_head = True
        self._num_head_bytes = 0

    # ------------------------------------------------------------------------------------------ lifecycle

    def _begin(self, cycle: RequestCycle) -> None:
        self._cycle = cycle
        self._entry.works(is_receiving=not cycle.is_whole)
        headers: RawHeaders = cycle.scope["headers"]
        if cycle.scope["http_version"] == "1.0" or self._num_requests >= self._config.keep_alive_max_requests:
            self.is_last = True
        for name, value in headers:
            if name == b"connection" and b"close" in value.lower():
                self.is_last = True
        task = self._loop.create_task(cycle.run(self._app, self._log_fault))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _log_fault(self) -> None:
        await self._config.log.exception("Error in ASGI Framework")

    def _lose_all(self) -> None:
        for cycle in (self._cycle, *self._queue):
            if cycle is not None:
                cycle.lose()
        self._queue.clear()
        self._pending = b""

    def _stop(self, *, is_handed_over: bool) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        self._parser = None  # it refers back
        if not self.ended.done():
            self.ended.set_result(is_handed_over)

    def _has_room(self) -> bool:
        """Whether more may be read than is held already."""
        receiving = self._receiving
        if receiving is not None and receiving.num_buffered > BODY_HIGH_WATER:
            return False
        return not self._pending and not self._queue

    def _pause(self) -> None:
        if not self._is_paused and not self.is_lost:
            self._is_paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._is_paused and self._has_room() and not self.is_lost:
            self._is_paused = False
            self._transport.resume_reading()
