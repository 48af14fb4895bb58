"""A neuron on a real socket that speaks the border between gateway and neuron and does what a test tells it.

It stands in for a remote machine: what it is asked is recorded, and what it waits for is an event of the test.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def chunk(delta: dict[str, str]) -> bytes:
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


OPENAI_EVENTS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "4"}),
    b": ping\n\n",
    chunk({"content": "2 \N{HONEYBEE}\n: cortex-usage "}),
]
OPENAI_END = b"data: [DONE]\n\n"
ANTHROPIC_EVENTS = [
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message"}}\n\n',
    b'event: ping\ndata: {"type": "ping"}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"42"}}\n\n',
]
ANTHROPIC_END = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
USAGE_BLOCK = b': cortex-usage {"prompt_tokens":11,"completion_tokens":7,"cached_tokens":3}\n\n'
JSON_ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": '42, "prompt_tokens": 999'}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}},
    }
).encode()


class FakeNeuron:
    """State is public: tests set it and read it.

    `load_gate` and `answer_gate` are set by default; clearing one makes loads or answers wait for it. footprints: what
    models hold, others_mb: what programs hold that are nobody's business here.
    """

    def __init__(self, name: str = "alpha") -> None:
        self.name = name
        self.url = ""
        self.models: dict[str, dict[str, Any]] = {}
        self.loads: dict[str, dict[str, Any]] = {}
        self.devices: list[dict[str, Any]] = [
            {"index": 0, "name": "GPU", "vram_total_mb": 24000, "compute_capability": "8.9"}
        ]
        self.footprints: dict[str, int] = {}
        self.others_mb = 0
        self.discovery_extra: dict[str, Any] = {}
        self.health_extra: dict[str, Any] = {}
        self.is_down = False
        self.is_old = False
        self.features: list[str] = []
        self.version_status = 200
        self.models_hang = False
        self.num_loads = 0
        self.health_fails = False
        self.load_error: tuple[int, dict[str, Any]] | None = None
        self.unload_error: tuple[int, dict[str, Any]] | None = None
        self.enforce_memory = False
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.load_started = asyncio.Event()
        self.answer_gate = asyncio.Event()
        self.answer_gate.set()
        self.request_arrived = asyncio.Event()
        self.request_aborted = asyncio.Event()
        self.polled = asyncio.Event()
        self.num_running = 0
        self.calls: list[str] = []
        self.load_bodies: list[dict[str, Any]] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: Handler | None = None
        self._loading: dict[str, asyncio.Task[None]] = {}

    # ------------------------------------------------------------------------------------------ what tests say

    def have(self, model: str, *, status: str = "loaded", **fields: Any) -> None:
        self.models[model] = {"id": model, "harness": "candle", "status": status, "devices": [0], **fields}

    def count(self, call: str) -> int:
        return sum(1 for made in self.calls if made == call)

    @property
    def vram_free_mb(self) -> int:
        here = (model for model, info in self.models.items() if info["status"] != "failed")
        used = sum(self.footprints.get(model, 0) for model in here) + self.others_mb
        return sum(int(device["vram_total_mb"]) for device in self.devices) - used

    def _shortage(self, model: str) -> dict[str, Any]:
        """As a neuron says it (`lifecycle.fitting`)."""
        needed, free = self.footprints[model], self.vram_free_mb
        devices = [{"device": 0, "required_mb": needed, "available_mb": free}]
        return {
            "error": {
                "message": f"`{model}` does not fit: it needs {needed} MiB of device 0, and {free} MiB are available.",
                "type": "invalid_request_error",
                "code": "insufficient_vram",
                "kind": "insufficient_vram",
                "required_mb": needed,
                "free_mb": free,
                "devices": devices,
            }
        }

    # ------------------------------------------------------------------------------------------ control plane

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30, middlewares=[self._record])
        app.router.add_get("/discovery", self._discovery)
        app.router.add_get("/health", self._health)
        app.router.add_get("/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_post("/models/load", self._load)
        app.router.add_post("/models/unload", self._unload)
        if not self.is_old:
            app.router.add_post("/models/pin", self._pin)
        counting = ("/v1/messages/count_tokens", "/v1/responses/input_tokens")
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", *counting):
            app.router.add_post(path, self._inference)
        return app

    @web.middleware
    async def _record(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.is_down:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        self.calls.append(f"{request.method} {request.path}")
        return await handler(request)

    async def _discovery(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"hostname": self.name, "devices": self.devices, "harnesses": ["candle"], **self.discovery_extra}
        )

    async def _health(self, request: web.Request) -> web.Response:
        if self.health_fails:
            return web.json_response({"error": "no"}, status=500)
        free = self.vram_free_mb
        devices = [
            {"index": device["index"], "vram_used_mb": device["vram_total_mb"] - free, "vram_free_mb": free}
            for device in self.devices
        ]
        return web.json_response(
            {
                "uptime_secs": 5,
                "devices": devices,
                "models": [{"id": model, **load} for model, load in self.loads.items()],
                **self.health_extra,
            }
        )

    async def _models(self, request: web.Request) -> web.Response:
        self.polled.set()
        if self.models_hang:
            await asyncio.Event().wait()
        return web.json_response(list(self.models.values()))

    async def _version(self, request: web.Request) -> web.Response:
        document = {"package_version": "0.1.0", "features": self.features}
        return web.json_response(document, status=self.version_status)

    async def _load(self, request: web.Request) -> web.Response:
        spec = await request.json()
        self.load_bodies.append(spec)
        model = spec["model_id"]
        self.load_started.set()
        if self.models.get(model, {}).get("status") == "loaded":
            return web.json_response({"status": "loaded"})
        if self.load_error is not None:
            await self.load_gate.wait()
            status, document = self.load_error
            return web.json_response(document, status=status)
        if self.enforce_memory and self.footprints.get(model, 0) > self.vram_free_mb:
            document = {"error": {"kind": "insufficient_vram", "free_mb": self.vram_free_mb}}
            return web.json_response(document if self.is_old else self._shortage(model), status=422)
        task = self._loading.get(model)
        if task is None:
            task = self._loading[model] = asyncio.create_task(self._finish_load(model))
        await asyncio.shield(task)
        return web.json_response({"status": "loaded"})

    async def _finish_load(self, model: str) -> None:
        self.num_loads += 1
        self.have(model, status="loading", progress={"phase": "weights", "bytes_done": 1, "bytes_total": 4})
        try:
            await self.load_gate.wait()
            self.have(model)
        finally:
            del self._loading[model]

    async def _unload(self, request: web.Request) -> web.Response:
        model = (await request.json())["model_id"]
        if self.unload_error is not None:
            status, document = self.unload_error
            return web.json_response(document, status=status)
        if model not in self.models:
            return web.json_response({"error": f"model '{model}' not found"}, status=404)
        del self.models[model]
        return web.json_response({"status": "unloaded"})

    async def _pin(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.models[asked["model_id"]]["pinned"] = asked["pinned"]
        return web.json_response(asked)

    # ------------------------------------------------------------------------------------------ inference

    async def _inference(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.path, headers, body))
        self.request_arrived.set()
        self.num_running += 1
        try:
            if self.answer is not None:
                return await self.answer(request)
            return await self._default_answer(request, headers, body)
        except (asyncio.CancelledError, ConnectionError):
            self.request_aborted.set()
            raise
        finally:
            self.num_running -= 1

    async def _default_answer(self, request: web.Request, headers: dict[str, str], body: bytes) -> web.StreamResponse:
        model = headers.get("x-cortex-resolved-model") or json.loads(body)["model"]
        if self.models.get(model, {}).get("status") != "loaded":
            document = {
                "error": {"message": f"model {model}", "type": "x", "code": "model_not_found", "param": "model"}
            }
            return web.json_response(document, status=404)
        if not json.loads(body).get("stream"):
            await self.answer_gate.wait()
            return web.Response(body=JSON_ANSWER, content_type="application/json", headers={"server": "x"})
        anthropic = request.path.startswith("/v1/messages")
        response = await self.begin_stream(request)
        for event in ANTHROPIC_EVENTS if anthropic else OPENAI_EVENTS:
            await response.write(event)
        await self.answer_gate.wait()
        if headers.get("x-cortex-hop") == "1":
            await response.write(USAGE_BLOCK)
        await response.write(ANTHROPIC_END if anthropic else OPENAI_END)
        await response.write_eof()
        return response

    @staticmethod
    async def begin_stream(request: web.Request, **headers: str) -> web.StreamResponse:
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", **more})
        await response.prepare(request)
        return response


@asynccontextmanager
async def listening(neuron: FakeNeuron) -> AsyncIterator[FakeNeuron]:
    """Serve `neuron` on a free port of the loopback interface."""
    runner = web.AppRunner(neuron.app(), handler_cancellation=True, shutdown_timeout=1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    neuron.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield neuron
    finally:
        neuron.load_gate.set()
        neuron.answer_gate.set()
        with suppress(Exception):
            await runner.cleanup()
