"""Ways between a gateway and a neuron that a test can cut without closing anything, as a network does."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Self
from urllib.parse import urlsplit

_REQUEST = re.compile(rb"^POST /v1/", re.M)
_REQUEST_ID = re.compile(rb"^x-request-id: *(\S+)\r$", re.M | re.I)
BACKLOG = 512


class Link:
    """A TCP proxy to one server, on a port of its own. Runs in the loop that it was opened in.

    Bytes that meet a cut wait, and arrive once it is healed, as TCP sends them again. num_requests: those
    with a body that have come here. tries: when each was first sent on to the server, by request id, in seconds of the
    loop's clock.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 0)
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._listener = socket.socket()
        self._listener.setblocking(False)
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting: asyncio.Task[None] | None = None
        self._filling: list[socket.socket] = []
        self._open: set[asyncio.Task[None]] = set()
        self.num_requests = 0
        self.tries: dict[str, float] = {}
        self.heal()

    async def __aenter__(self) -> Self:
        self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._open, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in (self._listener, *self._filling):
            each.close()

    # ------------------------------------------------------------------------------------------ connecting

    def accept(self) -> None:
        """Take new connections, those that wait for it, too."""
        if self._listener.fileno() == -1:
            return
        self._listener.listen(BACKLOG)
        for each in self._filling:
            each.close()
        self._filling.clear()
        if self._accepting is None:
            self._accepting = asyncio.create_task(self._accept())

    async def stop_accepting(self) -> None:
        """No new connection comes about, and none is refused: the backlog is full. Those that stand go on."""
        assert self._accepting is not None
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._accepting = None
        self._listener.listen(0)
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(self._listener.getsockname())
            self._filling.append(one)

    async def refuse(self) -> None:
        """As of a host where nothing listens any more; for the rest of this link's life."""
        await self.stop_accepting()
        self._listener.close()

    # ------------------------------------------------------------------------------------------ cutting

    def cut(self, *, there: bool = True, back: bool = True) -> None:
        """Of standing connections nothing arrives any more: at the server (there), or from it (back)."""
        if there:
            self._there.clear()
        if back:
            self._back.clear()

    def heal(self) -> None:
        self._there.set()
        self._back.set()

    # ------------------------------------------------------------------------------------------ passing

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            task = asyncio.create_task(self._carry(connection))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

    async def _carry(self, connection: socket.socket) -> None:
        near_reader, near = await asyncio.open_connection(sock=connection)
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await asyncio.open_connection(*self._target)
            await asyncio.gather(
                self._pass(near_reader, far, self._there, is_there=True), self._pass(far_reader, near, self._back)
            )
        except OSError:
            await self._back.wait()  # the end of a connection is news, too
        finally:
            for writer in (near, far):
                if writer is not None:
                    writer.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event, *, is_there: bool = False
    ) -> None:
        """Raises `ConnectionError` at the end of what is read: HTTP needs no half-closed connection."""
        while data := await reader.read(2**16):
            named = _REQUEST_ID.search(data) if is_there and _REQUEST.search(data) else None
            self.num_requests += named is not None
            await way.wait()
            if named is not None:
                self.tries.setdefault(named[1].decode(), asyncio.get_running_loop().time())
            writer.write(data)
            await writer.drain()
        await way.wait()
        raise ConnectionResetError
