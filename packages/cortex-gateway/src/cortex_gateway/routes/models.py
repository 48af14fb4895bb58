"""`GET /v1/models` and `GET /v1/models/{id}`: for all clients at once, and for Anthropic's in their own shape."""

from __future__ import annotations

import time

from cortex_core.dialects.models import (
    ModelEntry,
    anthropic_model_body,
    anthropic_models_body,
    model_body,
    models_body,
    parse_page,
)
from cortex_core.errors import model_not_found
from starlette.requests import Request
from starlette.responses import Response

from cortex_gateway.configuration.current import Current
from cortex_gateway.fleet.merge import merge_models
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.identity.principal import Principal


def speaks_anthropic(request: Request) -> bool:
    """Only that dialect's clients send this header, and all of them do."""
    return "anthropic-version" in request.headers


class ModelRoutes:
    """Answers from the snapshot: cheap, and never waiting for a neuron."""

    def __init__(self, fleet: Fleet, current: Current) -> None:
        self._fleet = fleet
        self._current = current
        self._created = int(time.time())
        self._entries: list[ModelEntry] = []
        self._version = -1

    async def catalogue(self, request: Request) -> Response:
        render = anthropic_models_body if speaks_anthropic(request) else models_body
        body = render(self._visible(request), parse_page(request.query_params))
        return Response(body, media_type="application/json")

    async def retrieve(self, request: Request) -> Response:
        wanted: str = request.path_params["model"]
        for entry in self._visible(request):
            if entry.id == wanted:
                render = anthropic_model_body if speaks_anthropic(request) else model_body
                return Response(render(entry), media_type="application/json")
        raise model_not_found(wanted)

    def _visible(self, request: Request) -> list[ModelEntry]:
        """What the key that asks may use; everything for those without one."""
        entries = self._listed()
        principal: Principal | None = getattr(request.state, "principal", None)
        if principal is None or principal.may_use_all:
            return entries
        aliases = self._current.catalogue.aliases
        return [entry for entry in entries if principal.may_use(entry.id, aliases.get(entry.id, entry.id))]

    def _listed(self) -> list[ModelEntry]:
        snapshot = self._fleet.snapshot
        if snapshot.version != self._version:
            self._entries = merge_models(snapshot, self._current.catalogue, self._created)
            self._version = snapshot.version
        return self._entries
