"""Admin routes to the captured exchanges: list them, look at one, forget them, switch them on and off."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from cortex_core.dialects.json_body import decode_struct
from cortex_core.errors import ApiError, invalid
from starlette.requests import Request
from starlette.responses import Response

from cortex_gateway.configuration.current import Current
from cortex_gateway.observability.captures import Captures, document_of, summary_of
from cortex_gateway.routes.admin import json


class CaptureSwitch(msgspec.Struct, frozen=True):
    """How many exchanges are kept from now on: 0 is none, null as many as the configuration says."""

    exchanges: Annotated[int, msgspec.Meta(ge=0, le=10_000)] | None


class CaptureRoutes:
    """The routes under `/admin/captures`."""

    def __init__(self, captures: Captures, current: Current) -> None:
        self._captures = captures
        self._current = current

    async def list(self, request: Request) -> Response:
        """What is kept, the newest last, and the bounds."""
        kept = self._captures.all()
        return json({**self._bounds(), "captures": [summary_of(exchanged) for exchanged in kept]})

    async def show(self, request: Request) -> Response:
        """One exchange: request, attempts, answer piece by piece."""
        request_id = request.path_params["request_id"]
        exchanged = self._captures.find(request_id)
        if exchanged is None:
            raise ApiError(
                "not_found",
                f"No exchange `{request_id[:64]}` is kept. Only the last {self._captures.max_exchanges} are.",
                code="capture_not_found",
            )
        return json(document_of(exchanged))

    async def switch(self, request: Request) -> Response:
        """Keep more or fewer from now on, until the gateway ends."""
        try:
            wanted = decode_struct(await request.body(), CaptureSwitch)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise invalid(f'The body must be {{"exchanges": number or null}}: {exc}', code="invalid_body") from None
        self._captures.adopt(wanted.exchanges)
        self._captures.trim()
        return json(self._bounds())

    async def clear(self, request: Request) -> Response:
        """Forget what is kept."""
        return json({"cleared": self._captures.clear()})

    def _bounds(self) -> dict[str, Any]:
        section = self._current.config.capture
        return {
            "exchanges": self._captures.max_exchanges,
            "configured": section.exchanges,
            "exchange_bytes": section.exchange_bytes,
            "total_bytes": section.total_bytes,
            "bytes": self._captures.num_bytes,
        }
