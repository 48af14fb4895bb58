"""Writer of one answer to one client: whatever of an answer goes out, goes through here.

While there is nothing to say, it keeps a stream alive by itself. An error that comes early keeps its HTTP status, which
SDKs retry on; a wait that lasts (a cold load, a long prefill) becomes a 200 with keep-alives, which no proxy and no
client gives up on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from cortex_gateway.http.asgi import Message, RawHeaders, Send
from cortex_gateway.http.body import ClientGone, RequestBody
from cortex_gateway.http.framing import WHOLE_JSON, Framing

NOTHING = b""


def no_headers() -> RawHeaders:
    return []


def no_note() -> bytes:
    return NOTHING


class ClientWriter:
    """status: the one that the answer was begun with, 0 before. is_sending: something is on its way to the client, who
    may be slow: sending waits while the client does not read. before_end: called before the last bytes go out.

    Every method that sends raises `ClientGone` where the client is gone, or reads nothing for too long.
    """

    __slots__ = (
        "_handle",
        "_headers",
        "_interval_s",
        "_is_lost",
        "_loop",
        "_note",
        "_pinging",
        "_send_message",
        "_sent_at",
        "before_end",
        "framing",
        "is_sending",
        "status",
    )

    def __init__(self, send: Send, framing: Framing = WHOLE_JSON) -> None:
        self.framing = framing
        self.status = 0
        self.is_sending = False
        self.before_end: Callable[[], None] | None = None
        self._send_message = send
        self._loop = asyncio.get_running_loop()
        self._sent_at = 0.0
        self._interval_s = 0.0
        self._headers: Callable[[], RawHeaders] = no_headers
        self._note: Callable[[], bytes] = no_note
        self._handle: asyncio.TimerHandle | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._is_lost = False

    # ------------------------------------------------------------------------------------------ sending

    def start(self, status: int, headers: RawHeaders) -> Coroutine[Any, Any, None]:
        self.status = status
        return self._send({"type": "http.response.start", "status": status, "headers": headers})

    def flush(self) -> Coroutine[Any, Any, None]:
        """The head that was started goes out now, and not with the first of the body."""
        return self.write(NOTHING)

    def write(self, data: bytes) -> Coroutine[Any, Any, None]:
        return self._send({"type": "http.response.body", "body": data, "more_body": True})

    def end(self, data: bytes = NOTHING) -> Coroutine[Any, Any, None]:
        """data: what is still to be sent."""
        if self.before_end is not None:
            self.before_end()
        return self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def answer(self, status: int, headers: RawHeaders, data: bytes, *, unread: RequestBody | None = None) -> None:
        """A whole answer; `content-length` is added here and nowhere else. unread: the body of the request, of which
        the client may still be sending some: it is swallowed, within bounds, so that the client gets to read this."""
        headers.append((b"content-length", b"%d" % len(data)))
        if unread is None or unread.is_complete:
            if self.before_end is not None:
                self.before_end()
            await self.start(status, headers)
            await self.end(data)
            return
        headers.append((b"connection", b"close"))
        await self.start(status, headers)
        await self.write(data)
        async with unread.swallowed():
            await self.end()

    async def _send(self, message: Message) -> None:
        if self._pinging is not None:
            await asyncio.shield(self._pinging)
        if self._is_lost:
            raise ClientGone
        self.is_sending = True
        try:
            await self._send_message(message)
        except OSError:  # A client that reads nothing for too long, `server.bind`; never a neuron's fault.
            raise ClientGone from None
        finally:
            self.is_sending = False
            if self._handle is not None:
                self._sent_at = self._loop.time()

    # ------------------------------------------------------------------------------------------ keeping alive

    def keep_alive(
        self,
        first_s: float,
        interval_s: float,
        *,
        headers: Callable[[], RawHeaders] = no_headers,
        note: Callable[[], bytes] = no_note,
    ) -> None:
        """From now on, whenever nothing was sent for `interval_s` (at first: for `first_s`), the framing's keep-alive
        is, and before it what `note` says. An answer that has not begun is begun with it, as a 200 with `headers`.
        """
        self._cancel()
        if self.framing.keep_alive is None:
            return
        self._headers, self._note = headers, note
        self._interval_s = interval_s
        self._sent_at = self._loop.time()
        self._handle = self._loop.call_later(first_s, self._check, first_s)

    async def quiet(self) -> bool:
        """No more keep-alives; one that is on its way has gone out when this returns. True if the answer has begun."""
        self._cancel()
        if self._pinging is not None:
            await asyncio.shield(self._pinging)
        return self.status != 0

    def _cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._headers, self._note = no_headers, no_note

    def _check(self, silence_s: float) -> None:
        remaining = self._sent_at + silence_s - self._loop.time()
        if remaining <= 0 and not self.is_sending and self._pinging is None:
            # Only ever waited for, never cancelled: a message cut off halfway would leave the server's connection in a
            # state in which nothing more can be sent.
            self._pinging = self._loop.create_task(self._ping(self._headers, self._note))
            silence_s = self._interval_s
        self._handle = self._loop.call_later(remaining if remaining > 0 else self._interval_s, self._check, silence_s)

    async def _ping(self, headers: Callable[[], RawHeaders], note: Callable[[], bytes]) -> None:
        """headers, note: as they were when it fell due, for nobody may want any more of them by now."""
        keep_alive = self.framing.keep_alive
        assert keep_alive is not None
        self.is_sending = True
        try:
            if not self.status:
                self.status = 200
                begun = [*self.framing.headers, *headers()]
                await self._send_message({"type": "http.response.start", "status": 200, "headers": begun})
            data = note() + keep_alive
            await self._send_message({"type": "http.response.body", "body": data, "more_body": True})
        except OSError:
            self._is_lost = True  # whoever sends next finds out
        finally:
            self.is_sending = False
            self._sent_at = self._loop.time()
            self._pinging = None
