"""Client disconnects, where the HTTP server tells of them only to who receives: a task waits in `receive`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cortex_gateway.http.asgi import Message, Receive


class DisconnectWatch:
    """Begins once the body has been read. on_disconnect: called when the client has hung up."""

    __slots__ = ("_on_disconnect", "_receiving")

    def __init__(self, receive: Receive, on_disconnect: Callable[[], None]) -> None:
        self._on_disconnect = on_disconnect
        self._receiving: asyncio.Future[Message] = asyncio.ensure_future(receive())
        self._receiving.add_done_callback(self._received)

    def cancel(self) -> None:
        self._receiving.cancel()

    def _received(self, received: asyncio.Future[Message]) -> None:
        if not received.cancelled() and received.exception() is None:
            self._on_disconnect()
