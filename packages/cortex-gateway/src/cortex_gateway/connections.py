"""Connections that hypercorn has accepted: when they end, and who speaks HTTP/1 on them.

A connection ends when its client has ended it, and not when its keep-alive time is over: hypercorn 0.18 reads the end
of the stream and then waits in its task group for the idle timer, 75 s in which the socket stays in CLOSE_WAIT. A
poller that opens a connection for each look would hold thousands.

Where httptools is installed, HTTP/1 is spoken by `http1.connection`; hypercorn speaks it with h11 otherwise, and HTTP/2
always.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import time
from typing import Any

import hypercorn.asyncio.run as hypercorn_run
from cortex_core.config import ConfigError
from cortex_core.gateway_config import Http1Parser
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.utils import parse_socket_addr

from cortex_gateway.asgi import RawHeaders, Scope

MAX_READ = 2**24
"""More than a stream reader ever holds: what it has, all at once."""


class ServerConfig(Config):  # type: ignore[misc]
    """hypercorn's, and who speaks HTTP/1."""

    has_httptools = False
    _headers: tuple[int, RawHeaders] = (0, [])

    def response_headers(self, protocol: str) -> RawHeaders:
        """The date and whatever else goes on every answer, made once a second."""
        if protocol != "h11":
            headers: RawHeaders = super().response_headers(protocol)
            return headers
        second = int(time.time())
        if self._headers[0] != second:
            self._headers = (second, super().response_headers(protocol))
        return self._headers[1]


def has_httptools(wanted: Http1Parser) -> bool:
    """Whether httptools is to be used. Raises `ConfigError` where it is asked for by name and not installed."""
    if wanted == "h11":
        return False
    if importlib.util.find_spec("httptools") is not None:
        return True
    if wanted == "httptools":
        raise ConfigError(["gateway.http1_parser: httptools is not installed (extra `fast`)"])
    return False


class PromptTCPServer(TCPServer):  # type: ignore[misc]
    """hypercorn's connection, without an idle timer once there is nothing more to read."""

    async def run(self) -> None:
        if not self.config.has_httptools or await self._speak_http1():
            await super().run()

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated) and event.idle and self.reader.at_eof():
            return
        await super().protocol_send(event)

    async def _speak_http1(self) -> bool:
        """True if the connection is one for hypercorn, which finds in its reader all that has come of it."""
        from cortex_gateway.http1.connection import Http1Connection

        tls = self.writer.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() == "h2":
            return True
        terminated = asyncio.ensure_future(self.context.terminated.wait())
        connection: Http1Connection | None = None
        try:
            first = await self._first_bytes(terminated)
            # Nothing is awaited from here on until the connection has its protocol: no byte can get lost.
            if not first or self.writer.transport.is_closing():
                return False
            scope = self._scope(is_tls=tls is not None)
            connection = Http1Connection(self.app, self.config, scope, self.writer.transport, self.reader, self.loop)
            connection.data_received(first)
            if self.reader.at_eof() and not connection.ended.done():
                connection.eof_received()
            await asyncio.wait({terminated, connection.ended}, return_when=asyncio.FIRST_COMPLETED)
            if not connection.ended.done():
                connection.shut_down()
            is_handed_over = await connection.ended
            if connection.tasks:
                await asyncio.wait(connection.tasks)
            return is_handed_over
        except asyncio.CancelledError:
            if connection is not None:
                connection.abort()
            raise
        finally:
            terminated.cancel()
            if connection is None:
                self.writer.close()

    async def _first_bytes(self, terminated: asyncio.Future[Any]) -> bytes:
        """Empty where none come in time, or the server closes before."""

        def stop_reading(_: asyncio.Future[Any]) -> None:
            self.reader.feed_eof()

        terminated.add_done_callback(stop_reading)
        try:
            async with asyncio.timeout(self.config.keep_alive_timeout):
                first: bytes = await self.reader.read(MAX_READ)
                return first
        except OSError:  # a timeout is one, too
            return b""
        finally:
            terminated.remove_done_callback(stop_reading)

    def _scope(self, *, is_tls: bool) -> Scope:
        """What all requests of the connection have in common."""
        peer = self.writer.get_extra_info("socket")
        try:
            client = parse_socket_addr(peer.family, peer.getpeername())
        except OSError:
            client = None
        return {
            "type": "http",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "scheme": "https" if is_tls else "http",
            "root_path": self.config.root_path,
            "client": client,
            "server": parse_socket_addr(peer.family, peer.getsockname()),
            "state": self.state,
        }


@functools.cache
def install() -> None:
    """Make hypercorn use it; there is no hook for that."""
    hypercorn_run.TCPServer = PromptTCPServer
