"""Choice of a connection's HTTP/1 parser: `http1.connection` where httptools is installed, else hypercorn with h11.

HTTP/2 is always hypercorn's.
"""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

from cortex_core.config import ConfigError
from cortex_core.gateway_config import Http1Parser
from cortex_core.serving.http_connections import HttpConnection
from hypercorn.config import Config
from hypercorn.utils import parse_socket_addr

from cortex_gateway.http.asgi import RawHeaders, Scope

MAX_READ = 2**24
"""More than a stream reader ever holds: what it has, all at once."""


class ServerConfig(Config):  # type: ignore[misc]
    """hypercorn's, and who speaks HTTP/1."""

    has_httptools = False
    answer_headers: tuple[int, RawHeaders] = (0, [])
    """The date and whatever else goes on every answer of ours in HTTP/1, with the second that they were made in."""


def has_httptools(wanted: Http1Parser) -> bool:
    """Whether httptools is to be used. Raises `ConfigError` where it is asked for by name and not installed."""
    if wanted == "h11":
        return False
    if importlib.util.find_spec("httptools") is not None:
        return True
    if wanted == "httptools":
        raise ConfigError(["gateway.http1_parser: httptools is not installed (extra `fast`)"])
    return False


class GatewayConnection(HttpConnection):
    """One client's connection, with either parser."""

    async def run(self) -> None:
        if not self.config.has_httptools or await self._speak_http1():
            await super().run()

    async def _speak_http1(self) -> bool:
        """True if the connection is one for hypercorn, which finds in its reader all that has come of it."""
        from cortex_gateway.http.http1.connection import Http1Connection

        terminated = asyncio.ensure_future(self.context.terminated.wait())
        connection: Http1Connection | None = None
        try:
            first = await self._first_bytes(terminated)
            # Nothing is awaited from here on until the connection has its protocol: no byte can get lost.
            if not first or self.writer.transport.is_closing():
                return False
            connection = Http1Connection(
                *(self.app, self.config, self._scope(), self.writer.transport, self.reader, self.loop, self.connection)
            )
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
        """Empty where the client ends before there are any, or the server does."""

        def stop_reading(_: asyncio.Future[Any]) -> None:
            self.reader.feed_eof()

        terminated.add_done_callback(stop_reading)
        try:
            first: bytes = await self.reader.read(MAX_READ)
            return first
        except OSError:
            return b""
        finally:
            terminated.remove_done_callback(stop_reading)

    def _scope(self) -> Scope:
        """What all requests of the connection have in common."""
        peer = self.writer.get_extra_info("socket")
        try:
            client = parse_socket_addr(peer.family, peer.getpeername())
        except OSError:
            client = None
        return {
            "type": "http",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "scheme": "http",
            "root_path": self.config.root_path,
            "client": client,
            "server": parse_socket_addr(peer.family, peer.getsockname()),
            "state": self.state,
        }
