"""The processes of a round of `gateway.py`: a canned backend, the subjects, a load generator.

Run by name (`python tests/bench/gateway_processes.py _backend ...`), each on an event loop of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from cortex_core.gateway_config import Http1Parser

from tests.bench.canned_server import CannedServer

MODEL = "bench/model"
ANSWER = json.dumps(
    {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1760000000,
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "a" * 300}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120},
    }
).encode()
CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1760000000,'
    b'"model":"bench/model","choices":[{"index":0,"delta":{"content":"token "},"finish_reason":null}]}\n\n'
)
USAGE_BLOCK = b': cortex-usage {"prompt_tokens":20,"completion_tokens":100,"cached_tokens":0}\n\n'
FINISH = CHUNK.replace(b'{"content":"token "},"finish_reason":null', b'{},"finish_reason":"stop"')
DONE = b"data: [DONE]\n\n"
CLIENT_HEADERS = (
    b"user-agent: OpenAI/Python 2.0.0\r\naccept: application/json\r\naccept-encoding: gzip, deflate\r\n"
    b"content-type: application/json\r\nauthorization: Bearer none\r\nx-stainless-lang: python\r\n"
    b"x-stainless-package-version: 2.0.0\r\nx-stainless-os: Linux\r\nx-stainless-arch: x64\r\n"
    b"x-stainless-runtime: CPython\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
)

SURFACES: dict[str, tuple[str, dict[str, Any], bytes, bytes]] = {
    "chat": ("/v1/chat/completions", {}, b"data: {", b"[DONE]"),
    "messages": ("/v1/messages", {"max_tokens": 500}, b"event: content_block_delta", b"message_stop"),
    "responses": ("/v1/responses", {"max_output_tokens": 500}, b"event: response.output_text.delta", b'"completed"'),
}
"""Path, fields beside the common ones, what a chunk looks like, and what the last event holds."""


def body(kind: str, surface: str) -> bytes:
    """kind: request, chunk (a stream) or prompt (a long one, not streamed)."""
    text = "What is 12+30? " * 13_334 if kind == "prompt" else "What is 12+30? Answer in one word, please."
    prompt = {"input" if surface == "responses" else "messages": [{"role": "user", "content": text}]}
    return json.dumps({"model": MODEL, **prompt, **SURFACES[surface][1], "stream": kind == "chunk"}).encode()


# ---------------------------------------------------------------------------------------------- backend


class Backend(CannedServer):
    """A canned neuron: as little Python per request as possible."""

    events, interval_s = 100, 0.01

    def answer(self, head: bytes, content: bytes) -> None:
        if content.endswith(b'"stream": true}') or b'"stream":true' in content or b'"stream": true' in content[:2000]:
            self.start(self.stream(b"x-cortex-hop" in head))
        elif head.startswith(b"post"):
            self.json(ANSWER)
        elif head.startswith(b"get /v1/models "):
            self.json(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
        elif head.startswith(b"get /models "):
            self.json(json.dumps([{"id": MODEL, "harness": "candle", "status": "loaded", "devices": []}]).encode())
        else:
            self.json(b"{}")

    def json(self, document: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(document)
        self.transport.write(head + document)

    async def stream(self, is_hop: bool) -> None:
        write = self.transport.write
        write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        framed = b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK)
        for _ in range(self.events):
            write(framed)
            await asyncio.sleep(self.interval_s)
        last = FINISH + (USAGE_BLOCK if is_hop else b"") + DONE
        write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))


async def run_backend(events: int, interval_s: float) -> None:
    Backend.events, Backend.interval_s = events, interval_s
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# ---------------------------------------------------------------------------------------------- the floor


async def run_floor(backend: str, http1: Http1Parser) -> None:
    import aiohttp
    from cortex_core.serving.connection_table import ConnectionTable
    from cortex_core.serving.http_connections import serve_http
    from cortex_gateway.http.http1 import gateway_connection
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=300),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    dropped = {"host", "content-length", "connection", "accept-encoding", "transfer-encoding"}

    async def events(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for chunk in upstream.content.iter_any():
                yield chunk
        finally:
            upstream.close()

    async def proxy(request: Request) -> Response:
        content = await request.body()
        headers = {name: value for name, value in request.headers.items() if name not in dropped}
        upstream = await session.post(backend + request.url.path, data=content, headers=headers)
        answered = {name: value for name, value in upstream.headers.items() if name.lower() not in dropped}
        if upstream.content_type == "text/event-stream":
            return StreamingResponse(events(upstream), upstream.status, answered)
        return Response(await upstream.read(), upstream.status, answered)

    app = Starlette(routes=[Route("/v1/chat/completions", proxy, methods=["POST"])])
    import socket

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    config = Config() if http1 == "h11" else gateway_connection.ServerConfig()
    config.errorlog = None
    config.include_server_header = False
    config.keep_alive_max_requests = 10**9
    print(listener.getsockname()[1], flush=True)
    if http1 == "h11":
        config.bind = [f"fd://{listener.fileno()}"]
        await serve(app, config)
    else:
        config.has_httptools = gateway_connection.has_httptools(http1)
        table = ConnectionTable(10_000, idle_s=75, head_s=30, clock=asyncio.get_running_loop().time)
        stop = asyncio.Event()
        await serve_http(app, config, listener, table, stop, name="floor", speaker=gateway_connection.GatewayConnection)


# ---------------------------------------------------------------------------------------------- cortex


def entitlements(auth: str, scratch: str) -> Any:
    from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry

    if auth == "off":
        return EntitlementsSection()
    many = 10**12 if auth != "key" else None
    budgets = (Budget(tokens=10**15),) if auth == "budget" else ()
    entry = KeyEntry(key_id="bench", key="none", requests_per_minute=many, tokens_per_minute=many, budgets=budgets)
    store = "memory" if auth != "budget" else f"sqlite:{scratch}/bench-{os.getpid()}.db"
    return EntitlementsSection(require_auth=True, store=store, keys=(entry,))


GATEWAYS = ("_cortex", "_openai", "_traced", "_captured")


def run_cortex(backend: str, auth: str, scratch: str, role: str, http1: Http1Parser) -> None:
    """The real `serve`, with its logging and its signal handling; the port is found in its ready line.

    The backend stands in for a collector of traces, too: it answers whatever is posted.
    """
    from cortex_core.catalogue import Catalogue
    from cortex_core.gateway_config import CaptureSection, GatewayConfig, GatewaySection, NeuronEntry
    from cortex_core.telemetry import TelemetrySection
    from cortex_gateway.server import serve

    config = GatewayConfig(
        gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", http1_parser=http1),
        neurons=(NeuronEntry(name="bench", endpoint=backend, kind="openai" if role == "_openai" else "neuron"),),
        telemetry=TelemetrySection(traces=role == "_traced", endpoint=backend),
        capture=CaptureSection(exchanges=50 if role == "_captured" else 0),
        entitlements=entitlements(auth, scratch),
    )
    raise SystemExit(serve(config, Catalogue()))


# ---------------------------------------------------------------------------------------------- load


class Client(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it has its answer."""

    def __init__(self, request: bytes, stream: bool, surface: str, totals: list[int]) -> None:
        self.request, self.stream, self.totals = request, stream, totals
        self.chunk, self.end = SURFACES[surface][2:]
        self.buffer = b""
        self.is_stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.stream:
            self.totals[1] += data.count(self.chunk)
            tail = self.buffer + data
            self.buffer = tail[-1024:]
            if not tail.endswith(b"0\r\n\r\n"):
                return
            if b"cortex-usage" in tail or self.end not in tail:
                raise AssertionError(f"not a complete stream: {tail[-200:]!r}")
        else:
            self.buffer += data
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0 or len(self.buffer) < end + 4 + len(ANSWER):
                return
            is_chunked = b"transfer-encoding: chunked" in self.buffer[:end].lower()
            if is_chunked and not self.buffer.endswith(b"\r\n0\r\n\r\n"):
                return
            if not self.buffer.startswith(b"HTTP/1.1 200") or ANSWER not in self.buffer:
                raise AssertionError(f"not the answer: {self.buffer[:300]!r}")
        self.buffer = b""
        self.totals[0] += 1
        if not self.is_stopping:
            self.transport.write(self.request)


async def run_load(port: int, kind: str, clients: int, seconds: float, surface: str) -> None:
    """Prints a line once it has warmed up, and at the end the requests and chunks completed since."""
    stream = kind == "chunk"
    content = body(kind, surface)
    request = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n%scontent-length: %d\r\n\r\n%s" % (
        SURFACES[surface][0].encode(),
        port,
        CLIENT_HEADERS,
        len(content),
        content,
    )
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()

    def fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not failed.done():
            failed.set_exception(context.get("exception") or RuntimeError(context["message"]))

    loop.set_exception_handler(fail)
    totals = [0, 0]
    gateway_connection = [
        (await loop.create_connection(lambda: Client(request, stream, surface, totals), "127.0.0.1", port))[1]
        for _ in range(clients)
    ]
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(failed), seconds / 4)
    print("warm", flush=True)
    before = list(totals)
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(failed), seconds)
    print(totals[0] - before[0], totals[1] - before[1], flush=True)
    for connection in gateway_connection:
        connection.is_stopping = True
        connection.transport.abort()


# ---------------------------------------------------------------------------------------------- by name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["_backend", "_floor", "_floor-h11", *GATEWAYS, "_load"])
    parser.add_argument("--backend", default="")
    parser.add_argument("--auth", default="off")
    parser.add_argument("--scratch", default="")
    parser.add_argument("--http1", default="auto")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--interval", type=float, default=0.02)
    parser.add_argument("--port", type=int)
    parser.add_argument("--kind", default="request")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--surface", default="chat", choices=SURFACES)
    given = parser.parse_args()
    if given.role in GATEWAYS:
        run_cortex(given.backend, given.auth, given.scratch, given.role, given.http1)
    import uvloop

    if given.role == "_backend":
        uvloop.run(run_backend(given.events, given.interval))
    elif given.role == "_load":
        uvloop.run(run_load(given.port, given.kind, given.clients, given.seconds, given.surface))
    else:
        uvloop.run(run_floor(given.backend, given.http1))


if __name__ == "__main__":
    main()
