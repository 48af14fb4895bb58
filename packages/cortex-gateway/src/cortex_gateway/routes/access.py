"""The gateway's doors: which requests get in, whatever they ask for, and what those are answered that do not.

A request is looked at before its route and its body. Pages of other origins may use the API where the configuration
lists them, and with a key of their own where one is required: nothing else of a browser proves anything. The admin
routes and the metrics are for pages of this very origin alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from cortex_core.access.cors import answer_headers, preflight_headers
from cortex_core.access.host_names import own_names
from cortex_core.dialects.errors import dialect_of_path, error_body, status_of
from cortex_core.gateway_config import GatewayConfig
from cortex_core.http_access import (
    ORIGIN_NOT_ALLOWED,
    HostRules,
    OriginRules,
    Reason,
    Refused,
    is_loopback,
    read_visit,
)
from cortex_core.serving.log_lines import Sparing

from cortex_gateway.configuration.current import Current
from cortex_gateway.http.asgi import JSON_CONTENT_TYPE, RawHeaders, Receive, Scope, Send, header
from cortex_gateway.http.body import ClientGone, RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.http.headers import identity_headers
from cortex_gateway.observability.access_log import AccessLog, AccessRecord
from cortex_gateway.relay.request_state import CLIENT_GONE_STATUS, new_request_id

logger = logging.getLogger(__name__)

SERVER, WHERE = "gateway", "gateway"
MAX_SWALLOWED_BODY = 2**20
"""How much of a refused request's body is taken so that its sender gets to read why, in bytes; times eight."""

ADMIN_FORBIDDEN = "admin_forbidden"

Area = Literal["api", "admin", "metrics"]


class Admission(NamedTuple):
    """What the door decided about a request, for whoever answers it. cors: headers for every answer. needs_key: a key
    has to be valid whatever is asked for, since a page of another origin asks."""

    cors: RawHeaders
    needs_key: bool = False


ADMITTED = Admission([])


class Access:
    """on_refusal counts them. clock: monotonic seconds."""

    def __init__(
        self,
        current: Current,
        access_log: AccessLog,
        *,
        on_refusal: Callable[[Reason], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._current = current
        self._access_log = access_log
        self._on_refusal = on_refusal
        self._clock = clock
        self._sparing = Sparing()
        self._own_names = own_names(current.config.gateway.listen) | own_names(current.config.gateway.metrics_listen)
        self.adopt()

    def adopt(self) -> None:
        """Judge by the configuration that applies now."""
        settings = self._current.config.gateway
        self._hosts = HostRules(settings.allowed_hosts, self._own_names)
        self._origins = OriginRules(settings.allow_origins)

    def admit(self, scope: Scope, area: Area) -> Admission:
        """Raises `Refused`."""
        visit = read_visit(scope["headers"], scope["raw_path"])
        self._hosts.check(visit.host, server=SERVER, where=WHERE)
        page = visit.page
        if page is None:
            return ADMITTED
        if area == "api":
            if self._origins.allows(page):
                return Admission(answer_headers(page))
            if self._current.config.entitlements.require_auth:
                return Admission(answer_headers(page) if page else [], needs_key=True)
            raise self._origins.refused(page, server=SERVER, where=WHERE)
        code = ADMIN_FORBIDDEN if area == "admin" else ORIGIN_NOT_ALLOWED
        raise self._origins.refused(page, server=SERVER, where=None, code=code)

    def note(self, refused: Refused, scope: Scope) -> None:
        """Count it, and tell the operator, sparingly, what may be done."""
        self._on_refusal(refused.reason)
        line = self._sparing.line(refused.advice, self._clock())
        if line is not None:
            client = scope["client"][0] if scope.get("client") else "unknown"
            logger.warning("refused %s: %s", client, line)

    async def refuse(self, refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer in the dialect of the path; one access line. A WebSocket's handshake is refused as all of them are."""
        self.note(refused, scope)
        if scope["type"] != "http":
            await close_websocket(receive, send)
            return
        started_at = self._clock()
        error, request_id = refused.error, new_request_id()
        headers: RawHeaders = scope["headers"]
        dialect = dialect_of_path(
            scope["path"], has_anthropic_version=header(headers, b"anthropic-version") is not None
        )
        status = status_of(error, dialect)
        body = RequestBody(receive, max_bytes=MAX_SWALLOWED_BODY, timeout_s=0)
        try:
            answer = [*identity_headers(request_id), JSON_CONTENT_TYPE]
            await ClientWriter(send).answer(status, answer, error_body(error, dialect, request_id), unread=body)
        except ClientGone:
            status = CLIENT_GONE_STATUS
        self._access_log.write(
            AccessRecord(
                id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                outcome="rejected" if status != CLIENT_GONE_STATUS else "client_gone",
                duration_ms=round((self._clock() - started_at) * 1000, 2),
                client=scope["client"][0] if scope.get("client") else None,
                error=f"{error.code}: {error.message}",
                at=round(time.time(), 3),
            )
        )


def exposures(config: GatewayConfig, address: str, metrics_address: str) -> Iterator[str]:
    """What is open to a network. address, metrics_address: that are listened on."""
    settings, entitlements = config.gateway, config.entitlements
    if "*" in settings.allowed_hosts:
        yield "gateway.allowed_hosts holds `*`: pages that point a name of theirs here (DNS rebinding) are answered"
    if "*" in settings.allow_origins:
        yield "gateway.allow_origins holds `*`: every web page may use the models"
    if not is_loopback(metrics_address):
        yield f"whoever reaches {metrics_address} reads the metrics: narrow gateway.metrics_listen, or a firewall"
    if is_loopback(address):
        return
    if not entitlements.require_auth:
        yield (f"whoever reaches {address} may use every model: set entitlements.require_auth, or listen on 127.0.0.1")
    if any(entry.admin for entry in entitlements.keys):
        yield f"admin keys work from wherever {address} is reached, and travel in clear unless a proxy ends TLS"
    names = [name for name in settings.allowed_hosts if not is_loopback(name)]
    if entitlements.admin_from_loopback and names:
        yield (
            "admin routes answer this machine without a key, and a reverse proxy for "
            f"{', '.join(names)} may run on it: one that adds no x-forwarded-for needs "
            "entitlements.admin_from_loopback = false"
        )


async def close_websocket(receive: Receive, send: Send) -> None:
    """There are none here: the handshake is answered with 403."""
    await receive()
    await send({"type": "websocket.close", "code": 1000})


def options_headers(scope: Scope, admission: Admission) -> RawHeaders:
    """For OPTIONS: what may be asked here, and a preflight to a page that may ask it."""
    headers: RawHeaders = [(b"allow", b"GET, HEAD, POST, OPTIONS")]
    return headers + preflight_headers(scope["headers"]) if admission.cors else headers
