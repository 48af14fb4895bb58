"""The fleet's routes: what this host is, how it is, which models it has, and loading and unloading them.

All but load and unload answer from memory, whatever the engines are doing (F22).
"""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

import msgspec
from cortex_core.dialects.errors import error_body
from cortex_core.dialects.json_body import decode_struct
from cortex_core.dialects.models import (
    ModelEntry,
    anthropic_model_body,
    anthropic_models_body,
    model_body,
    models_body,
    parse_page,
)
from cortex_core.errors import ApiError, invalid, model_not_found
from cortex_core.fleet import HealthResponse, ModelInfo, ModelSpec, PinRequest, UnloadRequest

from neuron.daemon.api.exchange import Exchange
from neuron.daemon.api.inference import no_engine
from neuron.daemon.api.openapi import description
from neuron.daemon.api.services import Services
from neuron.daemon.common.config import HARNESS
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.observability.metrics import CONTENT_TYPE

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode

_UNLISTED = ("failed", "unloading")


class Control:
    """Handlers; each takes one exchange and answers it."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def root(self, exchange: Exchange) -> None:
        build = self._services.build
        await exchange.respond_json({"name": "neuron", "version": build.package_version, "status": "ok"})

    async def discovery(self, exchange: Exchange) -> None:
        await exchange.respond_json(self._services.hardware.discovery)

    async def version(self, exchange: Exchange) -> None:
        await exchange.respond_json(self._services.build)

    async def health(self, exchange: Exchange) -> None:
        services = self._services
        reading = services.hardware.reading
        await exchange.respond_json(
            HealthResponse(
                uptime_secs=int(time.monotonic() - services.began),
                devices=reading.devices,
                activation=services.activator.status,
                models=tuple(services.manager.loads()),
                draining=services.is_draining,
                memory_free_mb=reading.memory_free_mb,
                instance=services.instance,
            )
        )

    async def metrics(self, exchange: Exchange) -> None:
        await exchange.respond(200, self._services.metrics.render(), content_type=CONTENT_TYPE.encode())

    async def openapi(self, exchange: Exchange) -> None:
        await exchange.respond(200, description(self._services.build.package_version))

    # ------------------------------------------------------------------ models

    async def models(self, exchange: Exchange) -> None:
        await exchange.respond_json(self._services.manager.models())

    async def load(self, exchange: Exchange) -> None:
        spec = _decode(await exchange.read_body(), ModelSpec)
        if not self._services.config.has_engine:
            raise no_engine()
        if spec.harness != HARNESS:
            raise invalid(f"harness: there is no harness `{spec.harness}`, only `{HARNESS}`", param="harness")
        async with exchange.watched():
            if b"text/event-stream" in (exchange.header(b"accept") or b""):
                await self._follow_load(exchange, spec)
            else:
                await self._services.manager.load(spec)
                await exchange.respond_json({"status": "loaded"})

    async def _follow_load(self, exchange: Exchange, spec: ModelSpec) -> None:
        """Load with progress as events: `progress` whenever it moved, then `done` or `error`.

        A client that leaves does not end the load.
        """
        manager = self._services.manager
        loading = asyncio.create_task(manager.load(spec))
        loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if the client leaves first
        try:
            await asyncio.sleep(0)  # it is refused, answered or under way now
            model = manager.find(spec.model_id)
            if model is not None and not loading.done():
                await self._send_progress(exchange, model.id)
            await loading
            await _send_last(exchange, "done", _encode({"status": "loaded"}))
        except ApiError as exc:
            if not exchange.has_started:
                raise
            await _send_last(exchange, "error", error_body(exc, exchange.dialect, exchange.request_id))
        finally:
            loading.cancel()  # only the wait: the load goes on

    async def progress(self, exchange: Exchange) -> None:
        """`GET /models/{id}/progress`: `progress` events of a model that comes or goes, then `done` with its status."""
        model = self._known(exchange)
        async with exchange.watched():
            last = await self._send_progress(exchange, model.id)
            status = "absent" if last is None else last.status
            error = None if last is None else last.error
            await _send_last(exchange, "done", _encode({"status": status, "error": error}))

    async def _send_progress(self, exchange: Exchange, model_id: str) -> ModelInfo | None:
        """Events until the model has arrived, failed or gone; what it was at the end, None if it has gone."""
        last: ModelInfo | None = None
        await exchange.start_stream()
        beat_s = self._services.config.server.ping_interval_s
        async for info in self._services.manager.follow(model_id, beat_s=beat_s):
            if info is None:
                await exchange.send_chunk(b": ping\n\n")
                continue
            last = info
            body = {"status": info.status, "error": info.error, "progress": info.progress}
            await exchange.send_chunk(b"event: progress\ndata: " + _encode(body) + b"\n\n")
        return None if self._services.manager.find(model_id) is None else last

    async def unload(self, exchange: Exchange) -> None:
        request = _decode(await exchange.read_body(), UnloadRequest)
        async with exchange.watched():
            await self._services.manager.unload(request.model_id)
            await exchange.respond_json({"status": "unloaded"})

    async def pin(self, exchange: Exchange) -> None:
        request = _decode(await exchange.read_body(), PinRequest)
        model = self._services.manager.get(request.model_id)
        model.is_pinned = request.pinned
        await exchange.respond_json({"model_id": model.id, "pinned": model.is_pinned})

    async def endpoint(self, exchange: Exchange) -> None:
        model = self._known(exchange)
        if model.group is None:
            raise model_not_found(model.id)
        await exchange.respond_json({"url": f"http://localhost:{self._services.port}"})

    async def capabilities(self, exchange: Exchange) -> None:
        model = self._known(exchange)
        found = model.info().capabilities
        if not found:
            raise model_not_found(model.id)
        await exchange.respond_json({"capabilities": found})

    async def openai_models(self, exchange: Exchange) -> None:
        entries = [_entry(model) for model in self._services.manager.all() if model.state.phase not in _UNLISTED]
        render = anthropic_models_body if exchange.dialect == "anthropic" else models_body
        await exchange.respond(200, render(entries, parse_page(exchange.query)))

    async def openai_model(self, exchange: Exchange) -> None:
        render = anthropic_model_body if exchange.dialect == "anthropic" else model_body
        await exchange.respond(200, render(_entry(self._known(exchange))))

    def _known(self, exchange: Exchange) -> ServedModel:
        return self._services.manager.get(str(exchange.params["model_id"]))


async def _send_last(exchange: Exchange, name: str, data: bytes) -> None:
    if not exchange.has_started:
        await exchange.start_stream()
    await exchange.end_stream(b"event: " + name.encode() + b"\ndata: " + data + b"\n\n")


def _entry(model: ServedModel) -> ModelEntry:
    info = model.info()
    return ModelEntry(
        id=model.id,
        created=model.created,
        loaded=model.state.phase == "loaded",
        modalities=info.capabilities or ("text",),
        limit=info.limit,
        tool_call=info.tool_call,
        reasoning=info.reasoning,
    )


def _decode(body: bytes, type_: type[T]) -> T:
    """A control body. Raises `ApiError` 400."""
    try:
        return decode_struct(body, type_)
    except msgspec.ValidationError as exc:
        raise invalid(f"The body does not fit: {exc}", code="invalid_request_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise invalid(f"The body is not valid JSON: {exc}", code="malformed_json") from None


def method_not_allowed(method: str, allowed: str) -> ApiError:
    return ApiError("method_not_allowed", f"Method {method} is not allowed here; allowed: {allowed}.")


def unknown_path(method: str, path: str) -> ApiError:
    return ApiError("not_found", f"There is nothing at {method} {path}.", code="unknown_url")
