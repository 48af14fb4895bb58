"""Gateway as one ASGI application: its parts put together, and its lifespan.

Inference goes straight from the path to the relay, everything else to the control plane.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
from cortex_core.catalogue import Catalogue
from cortex_core.gateway_config import GatewayConfig
from cortex_core.http_access import Refused

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
from cortex_gateway.http.asgi import Receive, Scope, Send
from cortex_gateway.identity.identity import Identity
from cortex_gateway.identity.opening import store_of
from cortex_gateway.observability.access_log import AccessLog
from cortex_gateway.observability.captures import Captures
from cortex_gateway.observability.metrics import Metrics
from cortex_gateway.observability.telemetry import Telemetry
from cortex_gateway.placement.fleet_gauges import FleetCollector
from cortex_gateway.placement.maintenance_loop import MaintenanceLoop
from cortex_gateway.placement.placement import Placement
from cortex_gateway.placement.queue import WaitingQueue
from cortex_gateway.relay.accounting import Accounting
from cortex_gateway.relay.relay import Relay
from cortex_gateway.routes.access import Access, close_websocket
from cortex_gateway.routes.admin import AdminRoutes
from cortex_gateway.routes.captures import CaptureRoutes
from cortex_gateway.routes.control_plane import ADMIN_PREFIX, ControlPlane, control_routes
from cortex_gateway.routes.health import HealthRoutes
from cortex_gateway.routes.models import ModelRoutes
from cortex_gateway.surfaces import anthropic, openai
from cortex_gateway.surfaces.surface import Surface

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


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
        self._control: ControlPlane
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
        admin = AdminRoutes(fleet, self._poller, placement, self.access_log, current=current, reloader=self.reloader)
        routes = control_routes(
            models, health, admin, CaptureRoutes(captures, current), current=current, inference=self._inference
        )
        self._control = ControlPlane(routes, self.identity, self.access_log, self._telemetry.tracing)
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
        logger.info("draining for up to %g s", grace_s)
        self.relay.is_draining = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.relay.wait_idle()
        finally:
            if self.relay.num_active:
                logger.warning("ending %d requests that outlasted the drain", self.relay.num_active)
                self.relay.end_all()

    async def _check_aliases(self) -> None:
        """Once every node was asked: name the aliases that lead nowhere."""
        while any(node.health == "unknown" for node in self.fleet.snapshot.nodes.values()):
            await self.fleet.changed()
        catalogue = self.current.catalogue
        for alias in dead_aliases(self.fleet.snapshot, catalogue):
            logger.warning("alias %s: no such model: %s", alias, catalogue.aliases[alias])

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
                await self._control.handle(scope, receive, send, admission)
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

    def _is_known(self, model: str) -> bool:
        return self.current.catalogue.profile(model) is not None or self.fleet.snapshot.has_model(model)
