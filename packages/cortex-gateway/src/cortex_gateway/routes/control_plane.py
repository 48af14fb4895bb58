"""Control plane: models, health, admin and captures, with whatever all of their requests have in common.

It is Starlette, which is clearer than the relay and whose cost does not matter here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from cortex_core.dialects.errors import dialect_of_path, error_body, headers_of, status_of
from cortex_core.errors import ApiError
from cortex_core.trace_context import read_trace_context
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cortex_gateway.configuration.current import Current
from cortex_gateway.http.asgi import JSON_CONTENT_TYPE, Message, RawHeaders, Receive, Scope, Send, header
from cortex_gateway.http.body import ClientGone, RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.http.headers import identity_headers
from cortex_gateway.identity.identity import Identity
from cortex_gateway.observability.access_log import AccessLog, AccessRecord
from cortex_gateway.relay.request_state import CLIENT_GONE_STATUS, new_request_id
from cortex_gateway.routes.access import Admission, options_headers
from cortex_gateway.routes.admin import AdminRoutes, require_operator
from cortex_gateway.routes.captures import CaptureRoutes
from cortex_gateway.routes.health import HealthRoutes
from cortex_gateway.routes.models import ModelRoutes, speaks_anthropic
from cortex_gateway.routes.openapi import description

if TYPE_CHECKING:
    from cortex_gateway.observability.tracing import RequestTrace, Tracing

MAX_BODY = 2**20
BODY_TIMEOUT_S = 30.0
QUIET_PATHS = frozenset(("/", "/health", "/api/hello"))
"""Probes: they need no key, and their access lines are written at DEBUG."""
WATCHING_PATHS = QUIET_PATHS | {"/admin/fleet", "/admin/log"}
"""Looks at the gateway itself (`cortex top`, `cortex logs`): lines of them would push out what is looked for."""
ADMIN_PREFIX = "/admin/"
OPEN_PATHS = QUIET_PATHS | {"/openapi.json"}
"""What needs no key. The document tells of the API and nothing of the fleet."""

Endpoint = Callable[[Request], Awaitable[Response]]


class ControlPlane:
    """Requests of the control plane: who may ask, bodies within limits, ids on answers, one access line for each."""

    def __init__(
        self, app: Starlette, identity: Identity, access_log: AccessLog, tracing: Tracing | None = None
    ) -> None:
        self._app = app
        self._identity = identity
        self._access_log = access_log
        self._tracing = tracing
        self.routes = app.routes

    async def handle(self, scope: Scope, receive: Receive, send: Send, admission: Admission) -> None:
        """One control request: its body read within limits, ids on its answer, one access line."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        request_id = new_request_id()
        headers: RawHeaders = scope["headers"]
        own_headers = identity_headers(request_id) + admission.cors
        status = 0
        context = read_trace_context(headers)
        trace_id = context.trace_id if context is not None else None
        trace: RequestTrace | None = None
        tracing = self._tracing
        if tracing is not None and scope["path"] not in WATCHING_PATHS:
            trace = tracing.begin(scope, route=self._route_of(scope["path"]), started_at=started_at)
            trace_id = trace.trace_id

        async def send_with_ids(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *own_headers]
            try:
                await send(message)
            except OSError:
                raise ClientGone from None

        body = RequestBody(receive, max_bytes=MAX_BODY, timeout_s=BODY_TIMEOUT_S)
        try:
            if scope["method"] == "OPTIONS":
                writer = ClientWriter(send_with_ids)
                await writer.start(204, options_headers(scope, admission))
                await writer.end()
                return
            principal = None
            if admission.needs_key or (scope["path"] not in OPEN_PATHS and not self._identity.is_off):
                # Admin routes have their own rule: `require_operator`.
                is_required = not scope["path"].startswith(ADMIN_PREFIX)
                principal = await self._identity.authenticate(headers, is_required=is_required)
            payload = await body.read(headers)
            pending: list[Message] = [{"type": "http.request", "body": payload, "more_body": False}]

            async def receive_read() -> Message:
                return pending.pop() if pending else await receive()

            scope["state"] = {**scope.get("state", {}), "request_id": request_id, "principal": principal}
            await self._app(scope, receive_read, send_with_ids)
        except ClientGone:
            status = CLIENT_GONE_STATUS
        except ApiError as error:
            is_anthropic = header(headers, b"anthropic-version") is not None
            dialect = dialect_of_path(scope["path"], has_anthropic_version=is_anthropic)
            answer: RawHeaders = [JSON_CONTENT_TYPE]
            text = error_body(error, dialect, request_id)
            await ClientWriter(send_with_ids).answer(status_of(error, dialect), answer, text, unread=body)
        finally:
            now = loop.time()
            if trace is not None:
                attributes = {"http.response.status_code": status or None, "cortex.request_id": request_id}
                trace.end(attributes, error_type=str(status) if status >= 500 else None, error=None, now=now)
            self._log(scope, request_id, status, now - started_at, trace_id)

    def _route_of(self, path: str) -> str | None:
        """The path without what clients put into it; None where it is none of ours."""
        for prefix in ("/v1/models/", "/models/"):
            if path.startswith(prefix):
                return f"{prefix}{{model}}"
        return path if any(isinstance(route, Route) and route.path == path for route in self.routes) else None

    def _log(self, scope: Scope, request_id: str, status: int, duration: float, trace_id: str | None) -> None:
        quiet = scope["path"] in WATCHING_PATHS and status < (500 if scope["path"] in QUIET_PATHS else 400)
        self._access_log.write(
            AccessRecord(
                id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                outcome="client_gone" if status == CLIENT_GONE_STATUS else "ok" if status < 400 else "rejected",
                duration_ms=round(duration * 1000, 2),
                client=scope["client"][0] if scope.get("client") else None,
                trace_id=trace_id,
                at=round(time.time(), 3),
            ),
            logging.DEBUG if quiet else logging.INFO,
        )


def _for_operators(endpoint: Endpoint, current: Current) -> Endpoint:
    async def guarded(request: Request) -> Response:
        require_operator(request, from_loopback=current.config.entitlements.admin_from_loopback)
        return await endpoint(request)

    return guarded


def control_routes(
    models: ModelRoutes,
    health: HealthRoutes,
    admin: AdminRoutes,
    captures: CaptureRoutes,
    *,
    current: Current,
    inference: Iterable[str],
) -> Starlette:
    """The table of all routes but those of inference, whose paths are `inference`."""
    routes = [
        Route("/", health.health, methods=["GET"]),
        Route("/health", health.health, methods=["GET"]),
        Route("/api/hello", health.hello, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]
    for prefix in ("/v1", ""):
        routes.append(Route(f"{prefix}/models", models.catalogue, methods=["GET"]))
        routes.append(Route(f"{prefix}/models/{{model:path}}", models.retrieve, methods=["GET"]))
    for path, endpoint, method in (
        ("/admin/models/load", admin.load, "POST"),
        ("/admin/models/unload", admin.unload, "POST"),
        ("/admin/models/pin", admin.pin, "POST"),
        ("/admin/models/unpin", admin.unpin, "POST"),
        ("/admin/fleet", admin.fleet, "GET"),
        ("/admin/log", admin.log, "GET"),
        ("/admin/captures", captures.list, "GET"),
        ("/admin/captures", captures.switch, "POST"),
        ("/admin/captures", captures.clear, "DELETE"),
        ("/admin/captures/{request_id}", captures.show, "GET"),
        ("/admin/reload", admin.reload, "POST"),
    ):
        routes.append(Route(path, _for_operators(endpoint, current), methods=[method]))
    # Only to answer other methods with 405: a POST never gets here.
    routes.extend(Route(path, refuse_method, methods=["POST"]) for path in inference)
    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_fault},
    )
    app.router.redirect_slashes = False
    return app


async def openapi(request: Request) -> Response:
    return Response(description(), media_type="application/json")


async def refuse_method(request: Request) -> Response:
    raise HTTPException(405)


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    dialect = dialect_of_path(request.url.path, has_anthropic_version=speaks_anthropic(request))
    return Response(
        error_body(error, dialect, request.state.request_id),
        status_code=status_of(error, dialect),
        headers=headers_of(error),
        media_type="application/json",
    )


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, in the dialect of the path."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        translated = ApiError("method_not_allowed", f"{where}: this method is not allowed here.")
    elif error.status_code == 404:
        translated = ApiError("not_found", f"{where}: there is no such route.", code="unknown_url")
    else:
        translated = ApiError("invalid_request", str(error.detail), status=error.status_code)
    response = await on_api_error(request, translated)
    response.headers.update(error.headers or {})
    return response


async def on_fault(request: Request, error: Exception) -> Response:
    return await on_api_error(
        request, ApiError("internal", "The gateway failed on this request.", code="internal_error")
    )
