"""Pings into a stream whose server has nothing to say, and sends no pings of its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from cortex_gateway.http.asgi import Message, Send
from cortex_gateway.http.body import ClientGone


class PingedSend:
    """A `send` for a stream that has begun: whenever nothing went through it for `interval_s`, a ping does.

    Its task is only ever waited for, never cancelled: a message cut off halfway would leave the server's connection in
    a state in which nothing more can be sent.
    """

    __slots__ = ("_handle", "_interval_s", "_is_sending", "_loop", "_ping", "_pinging", "_send", "_sent_at")

    def __init__(self, send: Send, ping: bytes, interval_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._send = send
        self._ping = ping
        self._interval_s = interval_s
        self._loop = loop
        self._sent_at = loop.time()
        self._is_sending = False
        self._pinging: asyncio.Task[None] | None = None
        self._handle = loop.call_later(interval_s, self._check)

    async def __call__(self, message: Message) -> None:
        if self._pinging is not None:
            await asyncio.shield(self._pinging)
        self._is_sending = True
        try:
            await self._send(message)
        finally:
            self._is_sending = False
            self._sent_at = self._loop.time()

    async def stop(self) -> None:
        """No more pings; one that is on its way has gone out when this returns."""
        self._handle.cancel()
        if self._pinging is not None:
            await asyncio.shield(self._pinging)

    def _check(self) -> None:
        remaining = self._sent_at + self._interval_s - self._loop.time()
        if remaining <= 0 and not self._is_sending and self._pinging is None:
            self._pinging = self._loop.create_task(self._send_ping())
        self._handle = self._loop.call_later(remaining if remaining > 0 else self._interval_s, self._check)

    async def _send_ping(self) -> None:
        try:
            with suppress(ClientGone):  # whoever sends next finds out
                await self._send({"type": "http.response.body", "body": self._ping, "more_body": True})
        finally:
            self._sent_at = self._loop.time()
            self._pinging = None
