"""The fleet's routes: what this host is, how it is, which models it has, and loading and unloading them.

All but load and unload answer from memory, whatever the engines are doing (F22).
"""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec
from cortex_core.dialects.models import ModelEntry, model_body, models_body, parse_page
from cortex_core.errors import ApiError, invalid, model_not_found
from cortex_core.fleet import HealthResponse, ModelSpec, PinRequest, UnloadRequest

from neuron.api.exchange import Exchange
from neuron.api.inference import no_engine
from neuron.api.metrics import CONTENT_TYPE
from neuron.api.services import Services
from neuron.config import HARNESS
from neuron.lifecycle.served_model import ServedModel

T = TypeVar("T")

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
            )
        )

    async def metrics(self, exchange: Exchange) -> None:
        await exchange.respond(200, self._services.metrics.render(), content_type=CONTENT_TYPE.encode())

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
            await self._services.manager.load(spec)
            await exchange.respond_json({"status": "loaded"})

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
        await exchange.respond(200, models_body(entries, parse_page(exchange.query)))

    async def openai_model(self, exchange: Exchange) -> None:
        await exchange.respond(200, model_body(_entry(self._known(exchange))))

    def _known(self, exchange: Exchange) -> ServedModel:
        return self._services.manager.get(str(exchange.params["model_id"]))


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
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as exc:
        raise invalid(f"The body does not fit: {exc}", code="invalid_request_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise invalid(f"The body is not valid JSON: {exc}", code="malformed_json") from None


def method_not_allowed(method: str, allowed: str) -> ApiError:
    return ApiError("method_not_allowed", f"Method {method} is not allowed here; allowed: {allowed}.")


def unknown_path(method: str, path: str) -> ApiError:
    return ApiError("not_found", f"There is nothing at {method} {path}.", code="unknown_url")
