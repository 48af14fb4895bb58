"""HTTP/2 by hypercorn, within bounds: what a client sends only to make work ends its connection.

h2 bounds what one frame may hold and how many streams are open at once. Neither library bounds how often: streams that
are opened and reset at once (each starts a request), pings and settings (each wants an answer), priorities and windows
cost their sender nothing. Here each of them costs of a credit that grows with time and with what is sent to the client,
as nghttp2 and Go do it, and without credit the connection ends with ENHANCE_YOUR_CALM.
"""

from __future__ import annotations

from typing import Any

import h2.errors
import h2.events
from h2.stream import StreamState
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Body, EndBody
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from priority.priority import PriorityError

from cortex_core.serving.connection_table import Connection

SLICE = 4 * 1024
"""Handed to h2 at a time: it takes frames apart at some 20 µs each, and does not stop before the end."""
CREDIT = 1000.0
CREDIT_PER_S = 200.0
CREDIT_PER_CHUNK = 2.0
"""Clients acknowledge what they are sent, by windows and pings."""
RESET_COSTS = 10.0

_FREE = (h2.events.RequestReceived, h2.events.StreamEnded, h2.events.TrailersReceived, h2.events.ConnectionTerminated)


class BoundedH2(H2Protocol):  # type: ignore[misc]
    """entry: of the connection in the table."""

    def __init__(self, *arguments: Any, entry: Connection) -> None:
        super().__init__(*arguments)
        self._entry = entry
        self._credit = CREDIT
        self._credited_at = self.context.time()

    async def handle(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().handle(event)
            if isinstance(event, Closed):
                # Whoever waits there for its data to be sent would wait for ever, and the connection for it.
                for buffer in list(self.stream_buffers.values()):
                    await buffer.close()
            return
        data = event.data
        for start in range(0, len(data), SLICE):
            if self.closed:
                return
            try:
                await super().handle(RawData(data[start : start + SLICE]))
            except (ValueError, PriorityError):  # a path that is not ASCII; priorities of a thousand streams
                await self._end(h2.errors.ErrorCodes.PROTOCOL_ERROR)

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if self.closed:
                return
            if not self._affords(event):
                self._entry.flooded()
                await self._end(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
                return
            stream_id = getattr(event, "stream_id", None)
            if isinstance(event, h2.events.DataReceived) and stream_id not in self.streams:
                # The rest of a body whose request has been answered. Its window is given back, or others starve.
                self.connection.acknowledge_received_data(event.flow_controlled_length, stream_id)
                await self._flush()
                continue
            if isinstance(event, h2.events.StreamReset) and stream_id in self.stream_buffers:
                # Complete: the sending task lets go of it. hypercorn keeps it until the connection ends.
                await self.stream_buffers[stream_id].close()
            await super()._handle_events([event])

    @property
    def is_receiving(self) -> bool:
        """Whether of every request that there is the body is still to come."""
        streams = (self.connection.streams.get(number) for number in self.streams)
        return all(stream is not None and stream.state_machine.state is StreamState.OPEN for stream in streams)

    async def stream_send(self, event: StreamEvent) -> None:
        if not isinstance(event, Body | EndBody):
            await super().stream_send(event)
            return
        self._entry.stalls()  # where the client's window is shut it waits here, and nothing in TCP shows it
        try:
            await super().stream_send(event)
        finally:
            self._entry.moves()

    async def _send_data(self, stream_id: int) -> None:
        self._credit += CREDIT_PER_CHUNK
        buffer = self.stream_buffers.get(stream_id)
        before = len(buffer.buffer) if buffer is not None else 0
        await super()._send_data(stream_id)
        if buffer is not None and len(buffer.buffer) < before:
            self._entry.takes()

    def _affords(self, event: h2.events.Event) -> bool:
        if isinstance(event, _FREE) or (isinstance(event, h2.events.DataReceived) and event.data):
            return True
        now = self.context.time()
        self._credit = min(self._credit + (now - self._credited_at) * CREDIT_PER_S, CREDIT)
        self._credited_at = now
        self._credit -= RESET_COSTS if isinstance(event, h2.events.StreamReset) else 1.0
        return self._credit >= 0

    async def _end(self, code: h2.errors.ErrorCodes) -> None:
        self.connection.close_connection(code)
        await self._flush()
        await self.handle(Closed())
        await self.send(Closed())
