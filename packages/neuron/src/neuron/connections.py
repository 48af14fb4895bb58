"""A connection ends when its client has ended it, and not when its keep-alive time is over.

hypercorn 0.18 reads the end of the stream and then waits in its task group for the idle timer: 75 s in which the socket
stays in CLOSE_WAIT. A poller that opens a connection for each look would hold thousands.
"""

from __future__ import annotations

import functools

import hypercorn.asyncio.run as hypercorn_run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Event, Updated


class PromptTCPServer(TCPServer):  # type: ignore[misc]
    """hypercorn's connection, without an idle timer once there is nothing more to read."""

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated) and event.idle and self.reader.at_eof():
            return
        await super().protocol_send(event)


@functools.cache
def install() -> None:
    """Make hypercorn use it; there is no hook for that."""
    hypercorn_run.TCPServer = PromptTCPServer
