"""The daemon's ends of the sockets: frames become calls on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec

from neuron.daemon.text_workers.messages import FrameReader, encode_frame
from neuron.protocol import FrameError

PIECE_BYTES = 256 * 1024


class FrameConnection(asyncio.Protocol):
    """on_frame: each payload, in order; it may raise `FrameError`. on_lost: once, with why it ended."""

    def __init__(self, on_frame: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.is_lost = False

    def send(self, message: msgspec.Struct) -> None:
        """Queue a frame; what is sent to a connection that is gone is lost with it. Raises `FrameError`."""
        if self._transport is not None and not self.is_lost:
            self._transport.write(encode_frame(message))

    async def send_body(self, body: bytes) -> None:
        """Bytes behind a frame, piece by piece: no copy of megabytes holds up the loop."""
        view = memoryview(body)
        for start in range(0, len(view), PIECE_BYTES):
            await self._writable.wait()
            if self._transport is None or self.is_lost:
                return
            self._transport.write(view[start : start + PIECE_BYTES])
            await asyncio.sleep(0)

    def send_at_once(self, message: msgspec.Struct, body: bytes) -> None:
        """A frame and the few bytes behind it, in one write. Raises `FrameError`."""
        if self._transport is not None and not self.is_lost:
            frame = encode_frame(message)
            frame += body
            self._transport.write(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

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
        self._writable.set()
        if not self.is_lost:
            self.is_lost = True
            self._on_lost(reason)
