"""The watch over the client of a request: when it hangs up, the request ends wherever it is."""

from __future__ import annotations

import asyncio

from cortex_gateway.http.asgi import Message, Receive, Shortcut
from cortex_gateway.http.body import ClientGone
from cortex_gateway.relay.request_state import RequestState


class DisconnectWatch:
    """Begins once the body has been read. Where the server offers no shortcut, a task waits in `receive`."""

    __slots__ = ("_exchange", "_receiving", "_shortcut")

    def __init__(self, exchange: RequestState, receive: Receive, shortcut: Shortcut | None) -> None:
        self._exchange = exchange
        self._shortcut = shortcut
        self._receiving: asyncio.Future[Message] | None = None
        if shortcut is not None:
            shortcut.on_disconnect(self._client_left)
        else:
            self._receiving = asyncio.ensure_future(receive())
            self._receiving.add_done_callback(self._received)

    def cancel(self) -> None:
        if self._shortcut is not None:
            self._shortcut.on_disconnect(None)
        if self._receiving is not None:
            self._receiving.cancel()

    def _client_left(self) -> None:
        self._exchange.interrupt(ClientGone())

    def _received(self, received: asyncio.Future[Message]) -> None:
        if not received.cancelled() and received.exception() is None:
            self._client_left()
