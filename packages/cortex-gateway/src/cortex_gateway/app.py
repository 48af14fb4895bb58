"""The gateway as one ASGI application: its collaborators, its routes, its lifespan.

Inference goes straight from the path to the relay. Everything else (models, health, admin) is Starlette, which is
clearer and whose cost does not matter there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
from cortex_core.catalogue import Catalogue
from cortex_core.dialects.errors import dialect_of_path, error_body, headers_of, status_of
from cortex_core.errors import ApiError
from cortex_core.gateway_config import GatewayConfig
from cortex_core.http_access import Refused
from cortex_core.trace_context import read_trace_context
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.configuration.current import NO_TEXTS, Configuration, Current, texts_now, with_secrets
from cortex_gateway.configuration.reload import Reloader
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.clients import client_of
from cortex_gateway.fleet.facts import price, widest_limit
from cortex_gateway.fleet.merge import dead_aliases
from cortex_gateway.fleet.neuron import NeuronClient, open_session
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.http.asgi import JSON_CONTENT_TYPE, Message, RawHeaders, Receive, Scope, Send, header
from cortex_gateway.http.body import ClientGone, RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.http.headers import identity_headers
from cortex_gateway.identity.identity import Identity
from cortex_gateway.identity.opening import store_of
from cortex_gateway.observability.access_log import AccessLog, AccessRecord
from cortex_gateway.observability.captures import Captures
from cortex_gateway.observability.metrics import CONTENT_TYPE, Metrics
from cortex_gateway.observability.telemetry import Telemetry
from cortex_gateway.placement.fleet_gauges import FleetCollector
from cortex_gateway.placement.maintenance_loop import MaintenanceLoop
from cortex_gateway.placement.placement import Placement
from cortex_gateway.placement.queue import WaitingQueue
from cortex_gateway.relay.accounting import Accounting
from cortex_gateway.relay.relay import Relay
from cortex_gateway.relay.request_state import CLIENT_GONE_STATUS, new_request_id
from cortex_gateway.routes.access import Access, Admission, close_websocket, options_headers
from cortex_gateway.routes.admin import AdminRoutes, require_operator
from cortex_gateway.routes.captures import CaptureRoutes
from cortex_gateway.routes.health import HealthRoutes
from cortex_gateway.routes.models import ModelRoutes, speaks_anthropic
from cortex_gateway.routes.openapi import description
from cortex_gateway.surfaces import anthropic, openai
from cortex_gateway.surfaces.surface import Surface

if TYPE_CHECKING:
    from cortex_gateway.observability.tracing import RequestTrace

log = logging.getLogger(__name__)

MAX_CONTROL_BODY = 2**20
CONTROL_BODY_TIMEOUT_S = 30.0
QUIET_PATHS = frozenset(("/", "/health", "/api/hello"))
"""Probes: they need no key, and their access lines are written at DEBUG."""
WATCHING_PATHS = QUIET_PATHS | {"/admin/fleet", "/admin/log"}
"""Looks at the gateway itself (`cortex top`, `cortex logs`): lines of them would push out what is looked for."""
ADMIN_PREFIX = "/admin/"
OPEN_PATHS = QUIET_PATHS | {"/openapi.json"}
"""What needs no key. The document tells of the API and nothing of the fleet."""

Endpoint = Callable[[Request], Awaitable[Response]]


class Gateway:
    """One gateway. `startup` and `shutdown` are also what the ASGI lifespan calls; both belong to one event loop."""

    def __init__(
        self, config: GatewayConfig, catalogue: Catalogue | None = None, *, config_path: Path | str | None = None
    ) -> None:
        """config_path: the file that both were read from, to be read again when it changes. Raises `ConfigError` where
        a server's secrets are not there."""
        is_file = config_path is not None and Path(config.models_config).exists()
        self.current = Current(
            with_secrets(
                config,
                Catalogue() if catalogue is None else catalogue,
                has_catalogue_file=is_file,
                texts=texts_now(config_path, config) if config_path is not None else NO_TEXTS,
            )
        )
        self.metrics = Metrics()
        self._body_workers = BodyWorkers(self.metrics.body_worker_ended)
        self.access_log = AccessLog()
        self.fleet = Fleet(config.neurons, Activity(), config.breaker)
        self._waiting = WaitingQueue()
        self.metrics.observe(FleetCollector(self.fleet, self._waiting, self._is_known))
        self._inference: dict[str, Surface] = {
            path: surface for surface in (*openai.SURFACES, *anthropic.SURFACES) for path in surface.paths
        }
        self.identity = Identity(
            config.entitlements,
            store_of(config.entitlements),
            limit_of=lambda model: widest_limit(model, self.fleet.snapshot, self.current.catalogue),
            cost_of=lambda model: price(model, self.current.catalogue),
            on_refusal=lambda key, reason: self.metrics.key_refused(key.account_id, key.key_id, reason),
        )
        self.access = Access(self.current, self.access_log, on_refusal=self.metrics.access_refused)
        self.reloader: Reloader | None = None
        if config_path is not None:
            self.reloader = Reloader(
                config_path, self.current, apply=self.apply, on_outcome=self.metrics.config_reloaded
            )
        self._session: aiohttp.ClientSession | None = None
        self._neurons: dict[str, NeuronClient] = {}
        self._telemetry: Telemetry
        self.captures: Captures
        self._poller: Poller
        self.placement: Placement
        self.upkeep: MaintenanceLoop
        self.relay: Relay
        self._control: Starlette
        self._checking: asyncio.Task[None]

    # ------------------------------------------------------------------------------------------ lifespan

    async def startup(self) -> None:
        """Raises `ConfigError` where traces are on and cannot be, `StoreError` where keys and budgets are not there."""
        self._telemetry = Telemetry(self.current.config.telemetry, clock=asyncio.get_running_loop().time)
        try:
            await self.identity.start()
        except BaseException:
            await self._telemetry.close()
            raise
        loop = asyncio.get_running_loop()
        fleet, current = self.fleet, self.current
        self._session = open_session(connect_timeout_s=current.config.gateway.upstream_connect_timeout_s)
        neurons = self._neurons
        neurons.update(self._clients(self._session, current.value))
        self._poller = Poller(fleet, neurons, current)
        placement = self.placement = Placement(
            fleet,
            neurons,
            self._poller,
            self.metrics,
            current=current,
            waiting=self._waiting,
            clock=loop.time,
        )
        self.upkeep = MaintenanceLoop(fleet, placement.loads, placement.state)
        captures = self.captures = Captures(current, clock=loop.time)
        accounting = Accounting(self.metrics, self.access_log, captures, self._telemetry.tracing)
        self.relay = Relay(self.identity, placement, self._poller, accounting, self._body_workers, current)
        models = ModelRoutes(fleet, current)
        health = HealthRoutes(fleet, lambda: self.relay.is_draining, self.reloader)
        admin = AdminRoutes(
            fleet, self._poller, placement.loads, placement, self.access_log, current=current, reloader=self.reloader
        )
        self._control = self._control_routes(models, health, admin, CaptureRoutes(captures, current))
        self._poller.start()
        self.upkeep.start()
        self._checking = asyncio.create_task(self._check_aliases())
        if self.reloader is not None:
            self.reloader.start()

    def _clients(self, session: aiohttp.ClientSession, value: Configuration) -> dict[str, NeuronClient]:
        """A client for each server. What is as it was keeps the one it has."""
        before = self.current.value
        known = {entry.name: entry for entry in before.config.neurons}
        clients = {}
        for entry in value.config.neurons:
            secrets = value.secret_headers[entry.name]
            client = self._neurons.get(entry.name)
            if client is None or known[entry.name] != entry or before.secret_headers[entry.name] != secrets:
                client = client_of(session, entry, secrets)
            clients[entry.name] = client
        return clients

    def apply(self, value: Configuration) -> None:
        """From here on this is the configuration, for whoever decides something next. In one step: nothing is awaited.

        Requests that have been sent to a neuron go on there, whatever becomes of it; those that wait are decided anew.
        """
        assert self._session is not None
        before, clients = self.current.value, self._clients(self._session, value)
        replaced = {name for name, client in self._neurons.items() if clients.get(name) is not client}
        self.current.value = value
        self.access.adopt()
        self.captures.adopt()
        self._neurons.clear()
        self._neurons.update(clients)
        self.identity.adopt(value.config.entitlements)
        self.fleet.reconfigure(value.config.neurons, value.config.breaker)
        self.placement.loads.withdraw(replaced)
        self._poller.follow()
        if value.canonical != before.canonical:
            self._poller.nudge_all()
        if value.catalogue.aliases != before.catalogue.aliases:
            self._checking.cancel()
            self._checking = asyncio.create_task(self._check_aliases())

    async def shutdown(self) -> None:
        if self._session is None:
            return
        self._checking.cancel()
        if self.reloader is not None:
            await self.reloader.stop()
        await self.upkeep.stop()
        await self._poller.stop()
        await self.placement.loads.stop()
        await self._body_workers.close()
        await self._session.close()
        await self.identity.stop()
        await self._telemetry.close()
        self._session = None

    async def drain(self, grace_s: float) -> None:
        """Take no more work, let what runs finish within `grace_s`, or until this is cancelled, then end it in its own
        dialect."""
        log.info("draining for up to %g s", grace_s)
        self.relay.is_draining = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.relay.wait_idle()
        finally:
            if self.relay.num_active:
                log.warning("ending %d requests that outlasted the drain", self.relay.num_active)
                self.relay.end_all()

    async def _check_aliases(self) -> None:
        """Once every node was asked: name the aliases that lead nowhere."""
        while any(node.health == "unknown" for node in self.fleet.snapshot.nodes.values()):
            await self.fleet.changed()
        catalogue = self.current.catalogue
        for alias in dead_aliases(self.fleet.snapshot, catalogue):
            log.warning("alias %s: no such model: %s", alias, catalogue.aliases[alias])

    # ------------------------------------------------------------------------------------------ requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(receive, send)
            return
        path: str = scope["path"]
        try:
            admission = self.access.admit(scope, "admin" if path.startswith(ADMIN_PREFIX) else "api")
        except Refused as refused:
            await self.access.refuse(refused, scope, receive, send)
            return
        if kind == "http":
            surface = self._inference.get(path)
            if surface is not None and scope["method"] == "POST":
                await self.relay.handle(surface, scope, receive, send, admission.cors)
            else:
                await self._handle_control(scope, receive, send, admission)
        else:
            await close_websocket(receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.startup()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _handle_control(self, scope: Scope, receive: Receive, send: Send, admission: Admission) -> None:
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
        tracing = self._telemetry.tracing
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

        body = RequestBody(receive, max_bytes=MAX_CONTROL_BODY, timeout_s=CONTROL_BODY_TIMEOUT_S)
        try:
            if scope["method"] == "OPTIONS":
                writer = ClientWriter(send_with_ids)
                await writer.start(204, options_headers(scope, admission))
                await writer.end()
                return
            principal = None
            if admission.needs_key or (scope["path"] not in OPEN_PATHS and not self.identity.is_off):
                # Admin routes have their own rule: `require_operator`.
                is_required = not scope["path"].startswith(ADMIN_PREFIX)
                principal = await self.identity.authenticate(headers, is_required=is_required)
            payload = await body.read(headers)
            pending: list[Message] = [{"type": "http.request", "body": payload, "more_body": False}]

            async def receive_read() -> Message:
                return pending.pop() if pending else await receive()

            scope["state"] = {**scope.get("state", {}), "request_id": request_id, "principal": principal}
            await self._control(scope, receive_read, send_with_ids)
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
            self._log_control(scope, request_id, status, now - started_at, trace_id)

    def _is_known(self, model: str) -> bool:
        return self.current.catalogue.profile(model) is not None or self.fleet.snapshot.has_model(model)

    def _route_of(self, path: str) -> str | None:
        """The path without what clients put into it; None where it is none of ours."""
        for prefix in ("/v1/models/", "/models/"):
            if path.startswith(prefix):
                return f"{prefix}{{model}}"
        return path if any(isinstance(route, Route) and route.path == path for route in self._control.routes) else None

    def _log_control(self, scope: Scope, request_id: str, status: int, duration: float, trace_id: str | None) -> None:
        quiet = scope["path"] in WATCHING_PATHS and status < (500 if scope["path"] in QUIET_PATHS else 400)
        self.access_log.write(
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

    def _for_operators(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            require_operator(request, from_loopback=self.current.config.entitlements.admin_from_loopback)
            return await endpoint(request)

        return guarded

    def _control_routes(
        self, models: ModelRoutes, health: HealthRoutes, admin: AdminRoutes, captures: CaptureRoutes
    ) -> Starlette:
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
            routes.append(Route(path, self._for_operators(endpoint), methods=[method]))
        # Only to answer other methods with 405: a POST never gets here.
        routes.extend(Route(path, refuse_method, methods=["POST"]) for path in self._inference)
        app = Starlette(
            routes=routes,
            exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_fault},
        )
        app.router.redirect_slashes = False
        return app


class MetricsApp:
    """`GET /metrics`, on a listener of its own."""

    def __init__(self, metrics: Metrics, access: Access) -> None:
        self._metrics = metrics
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        try:
            self._access.admit(scope, "metrics")
        except Refused as refused:
            await self._access.refuse(refused, scope, receive, send)
            return
        if scope["type"] != "http":
            await close_websocket(receive, send)
            return
        body = RequestBody(receive, max_bytes=MAX_CONTROL_BODY, timeout_s=CONTROL_BODY_TIMEOUT_S)
        writer = ClientWriter(send)
        if scope["path"] != "/metrics":
            text = b"metrics are at /metrics\n"
            await writer.answer(404, [(b"content-type", b"text/plain")], text, unread=body)
        elif scope["method"] not in ("GET", "HEAD"):
            await writer.answer(405, [(b"allow", b"GET, HEAD")], b"", unread=body)
        else:
            await writer.answer(200, [(b"content-type", CONTENT_TYPE)], self._metrics.render(), unread=body)


# ---------------------------------------------------------------------------------------------- control plane


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
