"""The neuron's door: which requests get in, whatever they ask for, and what of them is believed.

A request is looked at before its route and its body. Pages of other origins may use the API under `/v1` where the
configuration lists them, and nothing else: models are loaded and unloaded by gateways. Where there is a secret of the
fleet, what only a gateway may say is dropped from the headers of everybody who does not know it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator

from cortex_core.access.cors import answer_headers, preflight_headers
from cortex_core.access.host_names import own_names
from cortex_core.errors import ApiError
from cortex_core.fleet_secret import Standing, places_of, without_claims
from cortex_core.hop import HOP_HEADER, SECRET_HEADER
from cortex_core.http_access import (
    SECRET_MISSING,
    SECRET_WRONG,
    HostRules,
    OriginRules,
    Reason,
    Refused,
    is_loopback,
    read_visit,
)
from cortex_core.serving.log_lines import Sparing

from neuron.daemon.api.asgi import RawHeaders, Scope
from neuron.daemon.api.fleet_secret import WHERE as SECRET_WHERE
from neuron.daemon.api.fleet_secret import FleetSecret
from neuron.daemon.common.config import NeuronConfig

logger = logging.getLogger(__name__)

SERVER, WHERE = "neuron", "server"
SHARED_PREFIX = "/v1/"
"""What may be opened to pages."""
OPEN_PATHS = frozenset(("/",))
"""What is answered without the secret: that there is a neuron, and of which version. A probe needs no more, and a
secret in the configuration of every probe would soon be none. `/health` and `/metrics` tell of models: not open."""

_HOP = HOP_HEADER.encode()


class Access:
    """on_refusal and on_warning count. clock: monotonic seconds. Raises `ConfigError` where a secret is missing."""

    def __init__(
        self,
        config: NeuronConfig,
        *,
        on_refusal: Callable[[Reason], None],
        on_warning: Callable[[Reason], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = config.server
        self._hosts = HostRules(settings.allowed_hosts, own_names(config.host))
        self._origins = OriginRules(settings.allow_origins)
        self.secret = FleetSecret(settings.secret, settings.secret_mode, environ=os.environ)
        self._on_refusal = on_refusal
        self._on_warning = on_warning
        self._clock = clock
        self._sparing = Sparing()

    def admit(self, scope: Scope) -> RawHeaders:
        """Leaves in the scope only headers that are believed. Returns what every answer is to carry for the page that
        asks. Raises `Refused`."""
        headers: RawHeaders = scope["headers"]
        visit = read_visit(headers, scope["raw_path"])
        self._hosts.check(visit.host, server=SERVER, where=WHERE)
        cors: RawHeaders = []
        is_shared = scope["path"].startswith(SHARED_PREFIX)
        # No page sends a header like this one without being allowed to by a preflight, and none is: it is a gateway of
        # an older version, which passes on what its client's browser said.
        is_hop = is_shared and any(name == _HOP for name, _ in headers)
        if visit.page is not None and not is_hop:
            if not (is_shared and self._origins.allows(visit.page)):
                raise self._origins.refused(visit.page, server=SERVER, where=WHERE if is_shared else None)
            cors = answer_headers(visit.page)
        if not self.secret.is_configured:
            scope["headers"] = without_claims(headers, is_believed=True)
            return cors
        standing = self.secret.standing(headers)
        if standing != "proven" and scope["path"] not in OPEN_PATHS and not _is_preflight(scope, cors):
            self._demand(standing, scope)
        scope["headers"] = without_claims(headers, is_believed=standing == "proven")
        return cors

    def _demand(self, standing: Standing, scope: Scope) -> None:
        """Raises `Refused` where the secret is required."""
        refused = _without_secret(standing)
        if self.secret.mode == "require":
            raise refused
        if self.secret.mode == "warn":
            self._on_warning(refused.reason)
            self._write(f"would be refused once {WHERE}.secret_mode is `require`: {refused.advice}", scope)

    def note(self, refused: Refused, scope: Scope) -> None:
        """Count a refusal, and tell the operator, sparingly, what may be done."""
        self._on_refusal(refused.reason)
        self._write(f"refused: {refused.advice}", scope)

    def _write(self, text: str, scope: Scope) -> None:
        client = scope["client"][0] if scope.get("client") else "unknown"
        line = self._sparing.line(f"{client} {text}", self._clock())
        if line is not None:
            logger.warning("%s", line)


def exposures(config: NeuronConfig, address: str) -> Iterator[str]:
    """What is open to a network. address: that is listened on."""
    server = config.server
    if "*" in server.allowed_hosts:
        yield "server.allowed_hosts holds `*`: pages that point a name of theirs here (DNS rebinding) are answered"
    if "*" in server.allow_origins:
        yield "server.allow_origins holds `*`: every web page may use the models of this neuron"
    if is_loopback(address):
        return
    if not places_of(server.secret):
        yield (
            f"whoever reaches {address} may load, unload and use models and say whose requests are whose: set "
            "server.secret, or listen on 127.0.0.1"
        )
    elif server.secret_mode != "require":  # noqa: S105  (a mode)
        yield f"requests without the secret are still served on {address}: server.secret_mode is `{server.secret_mode}`"


def preflight_answer(scope: Scope) -> RawHeaders:
    return [(b"allow", b"GET, HEAD, POST, OPTIONS"), *preflight_headers(scope["headers"])]


def _is_preflight(scope: Scope, cors: RawHeaders) -> bool:
    """A browser asks whether a page may send its secret: it cannot send it yet."""
    return bool(cors) and scope.get("method") == "OPTIONS"


def _without_secret(standing: Standing) -> Refused:
    if standing == "missing":
        reason: Reason = "secret_missing"
        message, code = f"This neuron answers to its own fleet: `{SECRET_HEADER}` is missing.", SECRET_MISSING
        advice = f"without `{SECRET_HEADER}`: a gateway sends it where its gateway.secret names the same"
    else:
        reason = "secret_wrong"
        message = f"This neuron answers to its own fleet: `{SECRET_HEADER}` holds none of the secrets it knows."
        code, advice = SECRET_WRONG, f"with a `{SECRET_HEADER}` that is none of those in {SECRET_WHERE}"
    return Refused(reason, ApiError("authentication", message, code=code), advice=advice)
