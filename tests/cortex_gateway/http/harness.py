"""A server's side of one request: what is received and sent."""

from __future__ import annotations

import asyncio
from typing import Any

from cortex_gateway.http.asgi import Message
from cortex_gateway.http.body import RequestBody


class Server:
    """The two ends an ASGI server gives an application."""

    def __init__(self, *parts: bytes | None, then: Message | None = None) -> None:
        self.messages: list[Message] = [
            {"type": "http.disconnect"}
            if part is None
            else {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        self.sent: list[Message] = []
        self.num_received = 0

    async def receive(self) -> Message:
        self.num_received += 1
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)


def body_of(server: Server, **limits: Any) -> RequestBody:
    return RequestBody(server.receive, **{"max_bytes": 10, "timeout_s": 5.0, **limits})
