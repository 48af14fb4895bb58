"""`GET /health` and what clients use to warm a connection: `GET /`, `HEAD /`, `HEAD /api/hello`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cortex_gateway.configuration.reload import Reloader
from cortex_gateway.fleet.snapshot import FleetSnapshot
from cortex_gateway.fleet.state import Fleet


class NodeCount(msgspec.Struct, frozen=True):
    """Nodes that answer their polls, and all of them."""

    healthy: int
    total: int


class Unservable(msgspec.Struct, frozen=True):
    """A model that is resident and refuses every request (F24): liveness is not serviceability."""

    node: str
    model: str
    reason: str | None = None
    detail: str | None = None


class Refusing(msgspec.Struct, frozen=True):
    """A node that is there and does not answer this gateway. reason: a code."""

    node: str
    reason: str | None = None


class NotLoaded(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that its node was to load at its start and has not (H7). retry_at: Unix seconds."""

    node: str
    model: str
    error: str
    retry_at: int | None = None


class FleetHealth(msgspec.Struct, frozen=True, omit_defaults=True):
    """`status`: ok, impaired (a resident model cannot be served, one that was to be loaded is not, a node refuses),
    degraded (no healthy node), draining.

    configuration: that the files were refused, and the gateway runs with what it had; `/admin/fleet` says why.
    """

    status: str
    nodes: NodeCount
    unservable: tuple[Unservable, ...] = ()
    configuration: Literal["refused"] | None = None
    refusing: tuple[Refusing, ...] = ()
    not_loaded: tuple[NotLoaded, ...] = ()


def fleet_health(snapshot: FleetSnapshot, *, is_draining: bool, is_config_refused: bool = False) -> FleetHealth:
    nodes = [node for node in snapshot.nodes.values() if node.is_routable]
    unservable = tuple(
        Unservable(node=node.name, model=model, reason=info.servable.reason, detail=info.servable.detail)
        for node in nodes
        for model, info in node.models.items()
        if info.servable is not None and not info.servable.ok
    )
    refusing = tuple(
        Refusing(node=node.name, reason=node.refusal) for node in snapshot.nodes.values() if node.health == "refusing"
    )
    not_loaded = tuple(
        NotLoaded(node=node.name, model=failure.model_id, error=failure.error, retry_at=failure.retry_at)
        for node in nodes
        for failure in node.activation.failed
        if failure.model_id not in node.models
    )
    if is_draining:
        status = "draining"
    elif not nodes:
        status = "degraded"
    else:
        status = "impaired" if unservable or refusing or not_loaded else "ok"
    return FleetHealth(
        status=status,
        nodes=NodeCount(healthy=len(nodes), total=len(snapshot.nodes)),
        unservable=unservable,
        configuration="refused" if is_config_refused else None,
        refusing=refusing,
        not_loaded=not_loaded,
    )


class HealthRoutes:
    """`/health`, `GET /`, `HEAD /` and `HEAD /api/hello`."""

    def __init__(self, fleet: Fleet, is_draining: Callable[[], bool], reloader: Reloader | None) -> None:
        self._fleet = fleet
        self._is_draining = is_draining
        self._reloader = reloader

    async def health(self, request: Request) -> Response:
        """200 while the gateway takes work, whatever the fleet's state; 503 once it drains, so balancers move on."""
        is_draining = self._is_draining()
        is_refused = self._reloader is not None and self._reloader.refusal is not None
        health = fleet_health(self._fleet.snapshot, is_draining=is_draining, is_config_refused=is_refused)
        return Response(
            msgspec.json.encode(health), status_code=503 if is_draining else 200, media_type="application/json"
        )

    async def hello(self, request: Request) -> Response:
        return Response(b"{}", media_type="application/json")
