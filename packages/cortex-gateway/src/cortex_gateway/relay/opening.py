"""Hold a stream's status line until the neuron answers, but not for long.

An error that comes early keeps its HTTP status, which SDKs retry on; a wait that lasts (a cold load, a long
prefill) becomes a 200 with keep-alive pings, which no proxy and no client gives up on. What goes wrong after that
arrives as the dialect's error event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cortex_gateway.http.asgi import RawHeaders, Send


class StreamOpening:
    """Starts with the request; `close` ends it when there is something to send.

    `is_open` from the start: the stream has begun, and waits for another neuron to go on with it.

    Its task is only ever told to stop, never cancelled: a message cut off halfway would leave the server's
    connection in a state in which nothing more can be sent.
    """

    __slots__ = ("_answered", "_handle", "_headers", "_interval_s", "_ping", "_send", "_task", "is_open")

    def __init__(
        self,
        send: Send,
        *,
        headers: Callable[[], RawHeaders],
        ping: Callable[[], bytes],
        hold_s: float,
        interval_s: float,
        is_open: bool = False,
    ) -> None:
        self._send = send
        self._headers = headers
        self._ping = ping
        self._interval_s = interval_s
        self._answered: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self.is_open = is_open
        self._handle = asyncio.get_running_loop().call_later(hold_s, self._begin)

    async def close(self) -> bool:
        """Stop the pings; True if the status line has gone out already."""
        self._handle.cancel()
        if self._task is not None and self._answered is not None:
            self._answered.set()
            await asyncio.shield(self._task)
        return self.is_open

    def _begin(self) -> None:
        self._answered = asyncio.Event()
        self._task = asyncio.create_task(self._keep_alive(self._answered))

    async def _keep_alive(self, answered: asyncio.Event) -> None:
        if answered.is_set():
            return
        if not self.is_open:
            self.is_open = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers()})
        while not answered.is_set():
            await self._send({"type": "http.response.body", "body": self._ping(), "more_body": True})
            try:
                async with asyncio.timeout(self._interval_s):
                    await answered.wait()
            except TimeoutError:
                continue
