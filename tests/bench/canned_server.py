"""What stands behind a gateway in a measurement: HTTP/1 with as little Python per request as possible."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class CannedServer(asyncio.Protocol):
    """One connection. Subclasses answer on `transport`, at once or in a task of `start`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""
        self.tasks: set[asyncio.Task[None]] = set()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            position = head.find(b"content-length: ")
            length = int(head[position + 16 :].split(b"\r", 1)[0]) if position >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            content = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head, content)

    def answer(self, head: bytes, content: bytes) -> None:
        """head: in lower case."""
        raise NotImplementedError

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` until it is done or the connection is lost."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self.tasks:
            task.cancel()
