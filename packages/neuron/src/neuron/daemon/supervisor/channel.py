"""Frames of `neuron.protocol` over a Unix socket, as an asyncio protocol without a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from neuron.protocol import FrameError, FromEngine, ToEngine, decode_from_engine, encode_frame, frame_length

_PREFIX_BYTES = 4


class ChannelClosed(Exception):
    """The engine's end of the socket is gone."""


class EngineChannel(asyncio.Protocol):
    """One connection of an engine process.

    on_frame is called for each frame in order, on the event loop; on_lost once, with the reason, when the connection
    ends for whatever reason but `close`.
    """

    def __init__(
        self, on_frame: Callable[[EngineChannel, FromEngine], None], on_lost: Callable[[EngineChannel, str], None]
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._pending = b""
        self._is_closed = False
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def send(self, message: ToEngine) -> None:
        """Queue one frame at once, whatever is queued already. Raises `ChannelClosed` and `FrameError`."""
        if self._is_closed or self._transport is None:
            raise ChannelClosed
        self._transport.write(encode_frame(message))

    async def writable(self) -> None:
        """Wait until the socket takes more. Raises `ChannelClosed`."""
        if not self._writable.is_set():
            await self._writable.wait()
        if self._is_closed:
            raise ChannelClosed

    def close(self) -> None:
        """Close without a word to `on_lost`; what is queued is dropped."""
        self._is_closed = True
        self._writable.set()
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        buffer = self._pending + data if self._pending else data
        view = memoryview(buffer)
        start = 0
        try:
            while len(buffer) - start >= _PREFIX_BYTES:
                end = start + _PREFIX_BYTES + frame_length(view[start : start + _PREFIX_BYTES])
                if end > len(buffer):
                    break
                frame = decode_from_engine(view[start + _PREFIX_BYTES : end])
                start = end
                self._on_frame(self, frame)
                if self._is_closed:
                    return
        except FrameError as exc:
            self._lose(f"the engine sent a frame that does not decode: {exc}")
            return
        self._pending = bytes(view[start:])

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("the engine closed its socket" if exc is None else f"the engine's socket failed: {exc}")

    def _lose(self, reason: str) -> None:
        if self._is_closed:
            return
        self.close()
        self._on_lost(self, reason)
