"""The ASGI application: the table of routes, and the one place where what went wrong becomes an answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

from cortex_core.dialects import openai_chat, openai_completions, openai_responses
from cortex_core.dialects.anthropic_messages import MessagesDialect
from cortex_core.errors import ApiError
from cortex_core.http_access import Refused
from cortex_core.serving.log_lines import shown
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from neuron.daemon.api.access import preflight_answer
from neuron.daemon.api.asgi import ClientGone, RawHeaders, Receive, Scope, Send
from neuron.daemon.api.control import Control, method_not_allowed, unknown_path
from neuron.daemon.api.exchange import Exchange
from neuron.daemon.api.inference import Inference
from neuron.daemon.api.services import Services
from neuron.daemon.api.tokens import Tokens

logger = logging.getLogger(__name__)
requests = logging.getLogger("neuron.request")

Handler = Callable[[Exchange], Awaitable[None]]

_EXCHANGE = "neuron.exchange"
MAX_PATH = 256
"""Characters of a path in a log line."""


class NeuronApp:
    """Everything a client gets goes through here: an answer, or an error in its dialect, never a traceback."""

    def __init__(self, services: Services) -> None:
        self._limits = services.config.server
        self._lines = services.lines
        self._access = services.access
        self.routes = tuple(_routes(services))
        self._router = Router(routes=self.routes, redirect_slashes=False, default=_not_found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        try:
            cors = self._access.admit(scope)
        except Refused as refused:
            self._access.note(refused, scope)
            if scope["type"] == "http":
                with suppress(ClientGone):
                    await self._fail(Exchange(scope, receive, send, self._limits), refused.error)
                return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = Exchange(scope, receive, send, self._limits, cors=cors)
        scope[_EXCHANGE] = exchange
        scope["app"] = self  # with it, the router raises a wrong method instead of answering in plain text
        try:
            if cors and exchange.method == "OPTIONS":
                await exchange.respond_empty(preflight_answer(scope))
                return
            await self._router(scope, receive, send)
        except ClientGone:
            return
        except ApiError as exc:
            await self._fail(exchange, exc)
        except HTTPException as exc:
            allowed = (exc.headers or {}).get("Allow", "")
            await self._fail(exchange, method_not_allowed(exchange.method, allowed), [(b"allow", allowed.encode())])
        except Exception:
            logger.exception("unexpected error path=%s req_id=%s", exchange.path, exchange.request_id)
            if not exchange.has_started:
                await exchange.fail(ApiError("internal", "The neuron failed on this request.", code="internal_error"))

    async def _fail(self, exchange: Exchange, error: ApiError, headers: RawHeaders | None = None) -> None:
        if self._lines.admits(error.code or error.kind):
            requests.warning(
                "request rejected path=%s status=%d code=%s req_id=%s detail=%s extras=%s",
                shown(exchange.path, MAX_PATH),
                error.status,
                error.code,
                exchange.request_id,
                error.message,
                str(error.extras),
            )
        if not exchange.has_started:
            await exchange.fail(error, headers)


class _Endpoint:
    """A handler of exchanges, as the ASGI application that a route wants."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[_EXCHANGE]
        exchange.params = scope["path_params"]
        await self._handler(exchange)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    exchange: Exchange = scope[_EXCHANGE]
    raise unknown_path(exchange.method, exchange.path)


def _routes(services: Services) -> Iterator[Route]:
    messages = MessagesDialect(drops_attribution=services.config.prompt_filters.claude_code_attribution)
    control, tokens = Control(services), Tokens(services)
    dialect_routes: list[tuple[str, str, Handler]] = [
        ("POST", "/chat/completions", Inference(services, openai_chat, route="chat_completion")),
        ("POST", "/responses", Inference(services, openai_responses, route="responses")),
        ("POST", "/messages", Inference(services, messages, route="messages")),
        ("POST", "/completions", Inference(services, openai_completions, route="completion")),
        ("POST", "/messages/count_tokens", tokens.count),
        ("POST", "/responses/input_tokens", tokens.count_input),
        ("POST", "/tokenize", tokens.tokenize),
        ("POST", "/detokenize", tokens.detokenize),
    ]
    for prefix in ("/v1", ""):
        for method, path, handler in dialect_routes:
            yield _route(method, prefix + path, handler)
    yield _route("GET", "/", control.root)
    yield _route("GET", "/discovery", control.discovery)
    yield _route("GET", "/health", control.health)
    yield _route("GET", "/version", control.version)
    yield _route("GET", "/metrics", control.metrics)
    yield _route("GET", "/openapi.json", control.openapi)
    yield _route("GET", "/models", control.models)
    yield _route("POST", "/models/load", control.load)
    yield _route("POST", "/models/unload", control.unload)
    yield _route("POST", "/models/pin", control.pin)
    yield _route("GET", "/models/{model_id:path}/endpoint", control.endpoint)
    yield _route("GET", "/models/{model_id:path}/capabilities", control.capabilities)
    yield _route("GET", "/models/{model_id:path}/progress", control.progress)
    yield _route("GET", "/v1/models", control.openai_models)
    yield _route("GET", "/v1/models/{model_id:path}", control.openai_model)
    yield _route("GET", "/models/{model_id:path}", control.openai_model)


def _route(method: str, path: str, handler: Handler) -> Route:
    return Route(path, endpoint=_Endpoint(handler), methods=[method])


async def _lifespan(receive: Receive, send: Send) -> None:
    """Start and stop are the daemon's own business; the server only wants to be answered."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
