"""HTTP on accepted connections, by hypercorn: one listener from its opening to the end of its last connection.

Five things are not as hypercorn 0.18 has them. Its accept loop is replaced (`door`). HTTP/2 is bounded (`http2`). An
upgrade to h2c is not heeded: a reverse proxy that passes such a wish on takes what follows for the other protocol's and
looks at none of it, so whoever sent it would speak as the proxy does, unfiltered and without `x-forwarded-for`. A
connection ends when its client has ended it: hypercorn reads the end of the stream and then waits in its task group for
the idle timer, 75 s in which the socket stays in CLOSE_WAIT. And no connection has an idle timer of its own, which is a
task for each request: the table of connections knows which ones are idle, and closes them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import h11
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H2ProtocolAssumedError, H11Protocol
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app

from cortex_core.serving.connection_table import Connection, ConnectionTable
from cortex_core.serving.door import Door
from cortex_core.serving.http2 import BoundedH2

MAX_RECV = 2**16

App = Callable[..., Awaitable[None]]


class HttpConnection(TCPServer):  # type: ignore[misc]
    """One client. The table hears from it when a head begins, when there is a request, and when there is none."""

    protocol: _Protocols

    def __init__(
        self,
        app: Any,
        config: Config,
        context: WorkerContext,
        connection: Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        super().__init__(app, asyncio.get_running_loop(), config, context, {}, reader, writer)
        self.connection = connection
        self._high_water = writer.transport.get_write_buffer_limits()[1]

    async def run(self) -> None:
        peer = self.writer.get_extra_info("socket")
        try:
            client = parse_socket_addr(peer.family, peer.getpeername())
            server = parse_socket_addr(peer.family, peer.getsockname())
            async with TaskGroup(self.loop) as task_group:
                self._task_group = task_group
                self.protocol = _Protocols(
                    *(self.app, self.config, self.context, task_group, ConnectionState(self.state)),
                    *(False, client, server, self.protocol_send, "http/1.1"),
                )
                self.protocol.entry = self.connection
                await self.protocol.initiate()
                await self._read_data()
        except OSError:
            pass
        finally:
            await self._close()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self._write(event.data)
        elif not isinstance(event, Updated):
            await super().protocol_send(event)
        elif not event.idle:
            # Of HTTP/1 it is not known before all is looked at that has been read.
            self.connection.works(is_receiving=self.protocol.is_http2 and self.protocol.is_receiving)
        elif self.context.terminated.is_set():
            self._task_group.spawn(self._initiate_server_close)
        else:
            self.connection.rests()

    async def _write(self, data: bytes) -> None:
        is_unread = False
        async with self.send_lock:
            try:
                self.writer.write(data)
                if self.writer.transport.get_write_buffer_size() > self._high_water:
                    is_unread = True
                    self.connection.stalls()
                await self.writer.drain()
            except (ConnectionError, RuntimeError):
                await self.protocol.handle(Closed())
            finally:
                if is_unread:
                    self.connection.moves()

    async def _read_data(self) -> None:
        while not self.reader.at_eof():
            try:
                data = await self.reader.read(MAX_RECV)
            except OSError:
                break
            if not self.protocol.is_http2:  # whose clients may ping while they are idle
                self.connection.head_began()
            await self.protocol.handle(RawData(data))
            if self.connection.state != "idle":
                self.connection.works(is_receiving=self.protocol.is_receiving)
        await self.protocol.handle(Closed())


class _Http1(H11Protocol):  # type: ignore[misc]
    """HTTP/1 that is left for HTTP/2 by its preface alone, which is the first thing of a connection or nothing."""

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.method == b"PRI" and not self.keep_alive_requests:
            await super()._check_protocol(event)


class _Protocols(ProtocolWrapper):  # type: ignore[misc]
    """HTTP/1 until the client speaks HTTP/2."""

    entry: Connection
    protocol: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.protocol = _Http1(
            *(self.app, self.config, self.context, self.task_group, self.state),
            *(self.ssl, self.client, self.server, self.send),
        )

    @property
    def is_http2(self) -> bool:
        return isinstance(self.protocol, BoundedH2)

    @property
    def is_receiving(self) -> bool:
        """Whether of every request that there is the body is still to come."""
        if isinstance(self.protocol, BoundedH2):
            return self.protocol.is_receiving
        return isinstance(self.protocol.connection, h11.Connection) and (
            self.protocol.connection.their_state is h11.SEND_BODY
        )

    async def handle(self, event: Event) -> None:
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as preface:
            self.protocol = BoundedH2(
                *(self.app, self.config, self.context, self.task_group, self.state),
                *(self.ssl, self.client, self.server, self.send),
                entry=self.entry,
            )
            await self.protocol.initiate()
            # hypercorn takes the preface for a request that never ends.
            await self.send(Updated(idle=self.protocol.idle))
            if preface.data:
                await self.protocol.handle(RawData(preface.data))


async def serve_http(
    app: App,
    config: Config,
    listener: socket.socket,
    table: ConnectionTable,
    stop: asyncio.Event,
    *,
    name: str,
    on_open: Callable[[], None] = lambda: None,
    speaker: type[HttpConnection] = HttpConnection,
) -> None:
    """Serve an ASGI application, without its lifespan, on a listener that is bound and stays the caller's.

    Returns after `stop`, when every connection has ended, or `config.graceful_timeout` later. name: of the listener in
    the log. on_open: called when connections are accepted.
    """
    context = WorkerContext(None)
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: Connection) -> None:
        await speaker(wrapped, config, context, connection, reader, writer).run()

    door = Door(listener, table, speak, name=name)
    door.open()
    on_open()
    try:
        await stop.wait()
    finally:
        await context.terminated.set()
        door.close()
        table.close_idle()
        await door.ended(config.graceful_timeout)
