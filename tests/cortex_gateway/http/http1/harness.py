"""A server of HTTP/1 with an application that says what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from cortex_core.gateway_config import Http1Parser
from cortex_gateway import server
from cortex_gateway.http.asgi import Receive, Scope, Send

App = Callable[[Scope, Receive, Send], Awaitable[None]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """An application behind the gateway's own listener; `seen` is what reached it: method, path, query, body."""

    def __init__(self, parser: Http1Parser) -> None:
        self.parser = parser
        self.app: App = self.echo
        self.seen: list[tuple[str, str, bytes, bytes | None]] = []
        self.scopes: list[Scope] = []
        self.ended = asyncio.Event()
        self.stop = asyncio.Event()
        self.port = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.scopes.append(scope)
        try:
            await self.app(scope, receive, send)
        finally:
            self.ended.set()

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        body = b""
        is_whole = False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.append((scope["method"], scope["path"], scope["query_string"], None))
                return
            body += message["body"]
            is_whole = not message["more_body"]
        self.seen.append((scope["method"], scope["path"], scope["query_string"], body))
        answer = scope["path"].encode() + b" " + body
        headers = [(b"content-length", b"%d" % len(answer))] if scope["query_string"] == b"framed" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer, "more_body": False})

    async def connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes; the client does not."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            async with asyncio.timeout(20):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def serving(parser: Http1Parser) -> AsyncIterator[Server]:
    served = Server(parser)
    with server.bind("127.0.0.1:0") as listener:
        served.port = listener.getsockname()[1]
        task = server._start(served, listener, served.stop, "listener", parser)
        try:
            yield served
        finally:
            await server._close(task, served.stop)


def post(body: bytes = b"abc", *lines: bytes, path: bytes = b"/", framed: bool = True) -> bytes:
    length = [b"content-length: %d" % len(body)] if framed else []
    return (
        b"POST %b HTTP/1.1\r\nhost: x\r\n" % path
        + b"".join(b"%b\r\n" % line for line in (*lines, *length))
        + (b"\r\n" + body)
    )


CLOSING = b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


# ---------------------------------------------------------------------------------------------- refusals

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
