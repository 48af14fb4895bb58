"""A server on a real socket that speaks OpenAI chat and nothing else, and does what a test tells it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web
from cortex_core.gateway_config import NeuronEntry

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MODEL = "served/model"


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    document = {"id": "chatcmpl-up", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def usage_chunk(prompt: int = 11, completion: int = 7, cached: int = 3) -> bytes:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return b"data: " + json.dumps({"id": "chatcmpl-up", "choices": [], "usage": usage}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
EVENTS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "six by "}),
    chunk({"reasoning_content": "seven"}),
    chunk({"content": "4"}),
    b": a comment\n\n",
    chunk({"content": "2 \N{HONEYBEE}"}),
    chunk({}, "stop"),
    usage_chunk(),
    DONE,
]
TOOL_EVENTS = [
    chunk({"role": "assistant", "content": None}),
    chunk({"content": "Let me look."}),
    chunk({"tool_calls": [{"index": 0, "id": "call_a1", "function": {"name": "get_weather", "arguments": ""}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city"'}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": ': "Oslo"}'}}]}),
    chunk(
        {"tool_calls": [{"index": 1, "id": "b2", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]}
    ),
    chunk({}, "tool_calls"),
    usage_chunk(),
    DONE,
]
ANSWER = {
    "id": "chatcmpl-up",
    "object": "chat.completion",
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "42 \N{HONEYBEE}", "reasoning_content": "six by seven"},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 11, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}},
}


class FakeOpenAI:
    """State is public: tests set it and read it. `gate` is set by default; clearing it holds a stream in its middle."""

    def __init__(self, name: str = "other") -> None:
        self.name = name
        self.url = ""
        self.models: list[dict[str, Any]] = [{"id": MODEL, "object": "model", "created": 5}]
        self.key: str | None = None
        self.api_key: str | None = None
        self.headers: dict[str, str] = {}
        self.extensions = True
        self.forward_headers: tuple[str, ...] = ()
        self.polls: list[tuple[str, dict[str, str]]] = []
        self.health_status: int | None = None
        self.events: list[bytes] = list(EVENTS)
        self.can_stream = True
        self.count: int | None = None
        self.refusal: tuple[int, Any, dict[str, str]] | None = None
        self.answer: Handler | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.hold_before = len(EVENTS) - 3
        self.request_arrived = asyncio.Event()
        self.request_aborted = asyncio.Event()
        self.num_running = 0
        self.requests: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def entry(self) -> NeuronEntry:
        return NeuronEntry(
            name=self.name,
            endpoint=self.url + "/v1",
            kind="openai",
            api_key=self.api_key,
            headers=self.headers,
            extensions=self.extensions,
            forward_headers=self.forward_headers,
        )

    @property
    def last_body(self) -> Any:
        return json.loads(self.requests[-1][2])

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30, middlewares=[self._check])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_post("/tokenize", self._tokenize)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._inference)
        return app

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            return web.json_response({"error": {"message": f"Incorrect API key provided: {given}"}}, status=401)
        return await handler(request)

    async def _models(self, request: web.Request) -> web.Response:
        self._note_poll(request)
        return web.json_response({"object": "list", "data": self.models})

    async def _health(self, request: web.Request) -> web.Response:
        self._note_poll(request)
        return web.Response(status=self.health_status or 404)

    def _note_poll(self, request: web.Request) -> None:
        self.polls.append((request.path, {name.lower(): value for name, value in request.headers.items()}))

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.requests.append((request.path, dict(request.headers), await request.read()))
        if self.count is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response({"count": self.count, "max_model_len": 4096, "tokens": [1] * self.count})

    async def _inference(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.path, headers, body))
        self.request_arrived.set()
        self.num_running += 1
        try:
            if self.answer is not None:
                return await self.answer(request)
            if self.refusal is not None:
                status, document, extra = self.refusal
                text = document if isinstance(document, str) else json.dumps(document)
                return web.Response(text=text, status=status, headers=extra, content_type="application/json")
            if not (json.loads(body).get("stream") and self.can_stream):
                await self.gate.wait()
                return web.json_response(ANSWER, headers={"x-internal": "1"})
            return await self._stream(request)
        except (asyncio.CancelledError, ConnectionError):
            self.request_aborted.set()
            raise
        finally:
            self.num_running -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", "x-internal": "1"})
        await response.prepare(request)
        for index, event in enumerate(self.events):
            if index == self.hold_before:
                await self.gate.wait()
            await response.write(event)
        await response.write_eof()
        return response


@asynccontextmanager
async def listening(server: FakeOpenAI) -> AsyncIterator[FakeOpenAI]:
    """Serve on a free port of the loopback interface."""
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.gate.set()
        with suppress(Exception):
            await runner.cleanup()
