"""The daemon's ends of the sockets: frames become calls on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec

from neuron.protocol import FrameError
from neuron.text_workers.messages import FrameReader, encode_frame


class FrameConnection(asyncio.Protocol):
    """on_frame: each payload, in order; it may raise `FrameError`. on_lost: once, with why it ended."""

    def __init__(self, on_frame: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self.is_lost = False

    def send(self, message: msgspec.Struct) -> None:
        """Queue a frame; what is sent to a connection that is gone is lost with it. Raises `FrameError`."""
        if self._transport is not None and not self.is_lost:
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._reader.feed(data):
                self._on_frame(payload)
        except FrameError as exc:
            self._lose(str(exc))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("closed" if exc is None else str(exc))

    def _lose(self, reason: str) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._on_lost(reason)
