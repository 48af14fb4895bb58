"""A real listener, served as both servers do it, and an application that remembers what it was asked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from cortex_core.serving.connection_table import ConnectionTable
from cortex_core.serving.http_connections import serve_http
from hypercorn.config import Config

OK, FULL = b"HTTP/1.1 200 ", b"HTTP/1.1 503 Service Unavailable"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Served:
    """num_asked: requests that reached the application, at_work: those that it has not answered; it answers none before
    `gate` is set, or none of the method `held` where there is one."""

    def __init__(self, table: ConnectionTable) -> None:
        self.table = table
        self.port = 0
        self.num_asked = 0
        self.at_work = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.held = ""
        self.stop = asyncio.Event()
        self.opened: list[asyncio.StreamWriter] = []
        self.answer = b"ok"

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        assert scope["type"] == "http"
        self.num_asked += 1
        self.at_work += 1
        gone = asyncio.ensure_future(self._until_gone(receive))
        try:
            if scope["method"].startswith(self.held):
                opened = asyncio.ensure_future(self.gate.wait())
                await asyncio.wait({gone, opened}, return_when="FIRST_COMPLETED")
                opened.cancel()
            length = (b"content-length", b"%d" % len(self.answer))
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": self.answer, "more_body": False})
        finally:
            gone.cancel()
            self.at_work -= 1

    @staticmethod
    async def _until_gone(receive: Callable[[], Any]) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    async def connect(self, sent: bytes = b"") -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.opened.append(writer)
        writer.write(sent)
        return reader, writer

    async def ask(self, connection: Connection | None = None) -> bytes:
        """The status line of one request, on a connection of its own if none is given."""
        reader, writer = connection or await self.connect()
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
        return head.split(b"\r\n")[0]


@asynccontextmanager
async def serving(
    *, limit: int = 100, idle_s: float = 75, head_s: float = 30, unread_s: float = 0
) -> AsyncIterator[Served]:
    clock = asyncio.get_running_loop().time
    table = ConnectionTable(limit, idle_s=idle_s, head_s=head_s, unread_s=unread_s, clock=clock)
    served, config, opened = Served(table), Config(), asyncio.Event()
    config.graceful_timeout = 5
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        served.port = listener.getsockname()[1]
        serve = serve_http(served, config, listener, table, served.stop, name="listener", on_open=opened.set)
        task = asyncio.create_task(serve)
        await opened.wait()
        try:
            yield served
        finally:
            served.gate.set()
            served.stop.set()
            await task
            for writer in served.opened:
                writer.close()


async def until(condition: Callable[[], bool]) -> None:
    """For what happens on the other side of a socket, which has no event to wait on."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
