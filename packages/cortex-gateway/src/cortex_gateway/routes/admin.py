"""`/admin`: load and unload models, look at the fleet. For admin keys, and for operators on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import msgspec
from cortex_core.config import ConfigError
from cortex_core.dialects.errors import openai_error_body
from cortex_core.dialects.json_body import decode_struct
from cortex_core.errors import ApiError, invalid, model_not_found
from cortex_core.fleet import LoadProgress
from cortex_core.http_access import is_loopback, parse_authority
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from cortex_gateway.configuration.current import Current
from cortex_gateway.configuration.reload import Reloader
from cortex_gateway.fleet.neuron import NeuronError
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.fleet.snapshot import NodeSnapshot
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.identity.principal import Principal
from cortex_gateway.observability.access_log import KEPT_LINES, AccessLog
from cortex_gateway.placement.loads import Withdrawn, joined
from cortex_gateway.placement.placement import Placement


class ModelRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of load and unload. Without `node` the gateway chooses (load) or means all of them (unload)."""

    model: str
    node: str | None = None


class AdminRoutes:
    """The routes under `/admin` that change or show the fleet."""

    def __init__(
        self,
        fleet: Fleet,
        poller: Poller,
        placement: Placement,
        access_log: AccessLog,
        *,
        current: Current,
        reloader: Reloader | None,
    ) -> None:
        self._fleet = fleet
        self._poller = poller
        self._placement = placement
        self._access_log = access_log
        self._current = current
        self._reloader = reloader

    # ------------------------------------------------------------------------------------------ load

    async def load(self, request: Request) -> Response:
        """Load a model; answers when it is loaded, or with its progress as events if the client accepts them."""
        wanted = await read_request(request)
        model = self._placement.resolve(wanted.model)
        if wanted.node is not None:
            self._placement.managed(wanted.node)
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(
                self._load_events(model, wanted.node, request.state.request_id),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        return json(await self._load(model, wanted.node))

    async def _load(self, model: str, node: str | None) -> dict[str, str]:
        return {"model": model, "node": await self._placement.load(model, node), "status": "loaded"}

    async def _load_events(self, model: str, node: str | None, request_id: str) -> AsyncIterator[bytes]:
        """`progress` whenever it moved, `waiting` with what else is waited for, then `done` or `error`. A client that
        leaves does not cancel the load."""
        load: asyncio.Future[Any] = asyncio.ensure_future(self._load(model, node))
        shown: LoadProgress | None = None
        told: str | None = None
        try:
            while not load.done():
                changed = self._fleet.changed()
                where, progress = self._progress(model, node)
                if progress is not None and progress != shown:
                    shown = progress
                    yield event("progress", {"node": where, **msgspec.to_builtins(progress)})
                if where is None and (wait := self._placement.wait_of(model, node)) and wait.text != told:
                    told = wait.text
                    yield event("waiting", wait)
                with self._poller.watching(where) if where is not None else nullcontext():
                    await asyncio.wait({changed, load}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            yield event("done", load.result())
        except ApiError as error:
            yield b"event: error\ndata: " + openai_error_body(error, request_id) + b"\n\n"
        finally:
            load.cancel()

    def _progress(self, model: str, node: str | None) -> tuple[str | None, LoadProgress | None]:
        for snapshot in self._fleet.snapshot.nodes.values():
            if node is not None and snapshot.name != node:
                continue
            if snapshot.status(model) in ("fetching", "loading", "recovering"):
                info = snapshot.models.get(model)
                return snapshot.name, info.progress if info is not None else None
        return None, None

    # ------------------------------------------------------------------------------------------ unload

    async def unload(self, request: Request) -> Response:
        """Unload a model from one node or from all that have it."""
        wanted = await read_request(request)
        model = self._placement.resolve(wanted.model)
        nodes = self._managed_nodes(wanted.node)
        having = [node.name for node in nodes if node.status(model) not in (None, "unloaded")]
        if not having:
            raise model_not_found(wanted.model)
        try:
            await asyncio.gather(
                *(joined(self._placement.loads.unload(node, model, reason="admin")) for node in having)
            )
        except NeuronError as error:
            raise ApiError(
                "conflict" if error.status is not None else "internal",
                f"{model} was not unloaded: {error.message}",
                code="unload_failed",
                status=None if error.status is not None else 502,
            ) from error
        except Withdrawn:
            raise ApiError(
                "conflict", f"{model} was not unloaded: the configuration has changed meanwhile.", code="unload_failed"
            ) from None
        return json({"model": model, "nodes": having, "status": "unloaded"})

    # ------------------------------------------------------------------------------------------ pins

    async def pin(self, request: Request) -> Response:
        """From now on nothing displaces the model, and no idle time unloads it: on one node, or wherever it is."""
        return await self._pin(request, pinned=True)

    async def unpin(self, request: Request) -> Response:
        return await self._pin(request, pinned=False)

    async def _pin(self, request: Request, *, pinned: bool) -> Response:
        wanted = await read_request(request)
        model = self._placement.resolve(wanted.model)
        nodes = self._managed_nodes(wanted.node)
        having = [node.name for node in nodes if node.status(model) in ("loaded", "recovering", "reloading")]
        if not having:
            raise ApiError(
                "not_found",
                f"The model `{wanted.model}` is not loaded there: load it first, then pin it.",
                code="model_not_loaded",
                param="model",
            )
        try:
            kept = await asyncio.gather(*(self._placement.loads.pin(node, model, pinned=pinned) for node in having))
        except NeuronError as error:
            raise ApiError(
                "internal", f"{model} was not pinned: {error.message}", code="pin_failed", status=502
            ) from error
        return json(
            {
                "model": model,
                "nodes": having,
                "status": "pinned" if pinned else "unpinned",
                "kept_by": {
                    node: "neuron" if by_neuron else "gateway" for node, by_neuron in zip(having, kept, strict=True)
                },
            }
        )

    # ------------------------------------------------------------------------------------------ fleet

    async def fleet(self, request: Request) -> Response:
        """The snapshot. `?refresh=1` polls every node first."""
        if request.query_params.get("refresh", "") not in ("", "0", "false"):
            await self._poller.refresh_all()
        now = asyncio.get_running_loop().time()
        nodes = [self._node(node, now) for node in self._fleet.snapshot.nodes.values()]
        waiting = [
            {
                "model": queue.model,
                "requests": queue.num_requests,
                "waited_s": round(now - queue.since, 3),
                "for": self._placement.wait_of(queue.model),
            }
            for queue in self._placement.state().waiting.in_order()
        ]
        activity = self._fleet.activity
        return json(
            {
                "nodes": nodes,
                "in_flight": activity.total_in_flight(),
                "leaving": activity.leaving(self._fleet.snapshot.nodes),
                "waiting": waiting,
                "configuration": self._configuration(),
            }
        )

    def _node(self, node: NodeSnapshot, now: float) -> dict[str, Any]:
        models = []
        for model in sorted(node.models.keys() | node.operations.keys()):
            info = node.models.get(model)
            models.append(
                {
                    "id": model,
                    "status": node.status(model),
                    "in_flight": self._fleet.activity.in_flight(node.name, model),
                    "residency_priority": self._current.catalogue.residency(model),
                    "pinned": node.is_pinned(model),
                    "breaker": self._fleet.breakers.get(node.name, model).state,
                    "vram_used_mb": info.vram_used_mb if info is not None else None,
                    "devices": info.devices if info is not None else (),
                    "progress": info.progress if info is not None else None,
                    "servable": info.servable if info is not None else None,
                    "error": info.error if info is not None else None,
                    "load": node.loads.get(model),
                }
            )
        return {
            "name": node.name,
            "endpoint": node.endpoint,
            "kind": node.kind,
            "health": node.health,
            "misses": node.misses,
            "last_error": node.last_error,
            "refusal": node.refusal,
            "polled_s_ago": round(now - node.polled_at, 3) if node.polled_at else None,
            "uptime_secs": node.uptime_secs,
            "draining": node.is_draining,
            "lifecycle_cycles": node.lifecycle_cycles,
            "discovery": node.discovery,
            "devices": node.devices,
            "memory_free_mb": node.memory_free_mb,
            "activation": node.activation,
            "models": models,
        }

    def _managed_nodes(self, name: str | None) -> list[NodeSnapshot]:
        """The node asked for, or all on which models can be loaded and unloaded."""
        if name is not None:
            return [self._placement.managed(name)]
        return [node for node in self._fleet.snapshot.nodes.values() if node.can_load]

    # ------------------------------------------------------------------------------------------ configuration

    def _configuration(self) -> dict[str, Any]:
        """Whether what the files hold is what applies; if not, what is wrong there, or what they would take away."""
        refusal = self._reloader.refusal if self._reloader is not None else None
        if refusal is None:
            return {"valid": True}
        return {"valid": False, "faults": refusal.faults, "weaker": refusal.weaker}

    async def reload(self, request: Request) -> Response:
        """Read the configuration again; answers when it applies. Refused whole if anything is wrong with it."""
        if self._reloader is None:
            raise ApiError(
                "conflict", "This gateway was not started from configuration files.", code="no_configuration_file"
            )
        try:
            reloaded = await self._reloader.reload("admin")
        except ConfigError as error:
            raise ApiError(
                "conflict",
                f"The configuration was refused, the running one stays:\n{error}",
                code="configuration_refused",
                extras={"faults": error.faults},
            ) from None
        return json({**msgspec.to_builtins(reloaded), "summary": str(reloaded)})

    # ------------------------------------------------------------------------------------------ log

    async def log(self, request: Request) -> Response:
        """The last access lines, a JSON document each; with `follow=1` also those to come, until the client leaves."""
        query = request.query_params
        last = query.get("last", "100")
        if not (last.isascii() and last.isdigit()):
            raise invalid(f"`last` must be a number of lines, not {last[:64]!r}.", param="last")
        lines = self._access_log.last(int(last) if len(last) < 10 else KEPT_LINES)
        if query.get("follow") != "1":
            return Response(b"".join(line + b"\n" for line in lines), media_type="application/x-ndjson")
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(
            self._log_lines(lines, self._access_log.num_written), media_type="application/x-ndjson", headers=headers
        )

    async def _log_lines(self, lines: list[bytes], seen: int) -> AsyncIterator[bytes]:
        yield b"".join(line + b"\n" for line in lines)
        async for line in self._access_log.follow(seen):
            yield line + b"\n"


async def read_request(request: Request) -> ModelRequest:
    try:
        return decode_struct(await request.body(), ModelRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise invalid(f'The body must be {{"model": …, "node"?: …}}: {exc}', code="invalid_body") from None


FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""What a reverse proxy adds. Behind one on this machine the whole world comes from the loopback."""


def require_operator(request: Request, *, from_loopback: bool = True) -> None:
    """Admin routes answer admin keys, and the loopback unless that is turned off.

    The loopback is no proof for what a proxy passes on. Raises `ApiError` 403.
    """
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal is not None and principal.is_admin:
        return
    client = request.client.host if request.client is not None else ""
    if not from_loopback or not is_loopback(client) or any(name in request.headers for name in FORWARDED):
        raise ApiError(
            "permission",
            "Admin routes answer only admin keys" + (" and the loopback interface." if from_loopback else "."),
            code="admin_forbidden",
        )
    # A page whose name was pointed at this host reads from it as from its own: the name gives it away. Pages of other
    # origins do not get here.
    host = parse_authority(request.headers.get("host", "").encode("latin-1"))
    if host is None or not is_loopback(host.host):
        raise ApiError(
            "permission",
            "Without an admin key, admin routes answer only where they are asked for by a loopback name.",
            code="admin_forbidden",
        )


def event(name: str, data: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode("ascii"), msgspec.json.encode(data))


def json(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
