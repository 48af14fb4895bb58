"""Metrics for Prometheus, on a listener of their own."""

from __future__ import annotations

from cortex_core.http_access import Refused

from cortex_gateway.http.asgi import Receive, Scope, Send
from cortex_gateway.http.body import RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.observability.metrics import CONTENT_TYPE, Metrics
from cortex_gateway.routes.access import Access, close_websocket

MAX_BODY = 2**20
BODY_TIMEOUT_S = 30.0


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
        body = RequestBody(receive, max_bytes=MAX_BODY, timeout_s=BODY_TIMEOUT_S)
        writer = ClientWriter(send)
        if scope["path"] != "/metrics":
            text = b"metrics are at /metrics\n"
            await writer.answer(404, [(b"content-type", b"text/plain")], text, unread=body)
        elif scope["method"] not in ("GET", "HEAD"):
            await writer.answer(405, [(b"allow", b"GET, HEAD")], b"", unread=body)
        else:
            await writer.answer(200, [(b"content-type", CONTENT_TYPE)], self._metrics.render(), unread=body)
