"""Which headers cross the gateway, in either direction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cortex_core.hop import HOP_HEADER, RESOLVED_MODEL_HEADER
from multidict import CIMultiDict

from cortex_gateway.asgi import RawHeaders

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)

# Credentials are for the gateway. accept-encoding stays here because events are read on their way through;
# content-encoding is undone when the body is read. The ids are the gateway's own to give.
_DROP_FROM_REQUEST = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"content-encoding",
    b"accept-encoding",
    b"expect",
    b"authorization",
    b"x-api-key",
    b"cookie",
    b"x-request-id",
    b"request-id",
}
_DROP_FROM_RESPONSE = HOP_BY_HOP | {
    b"content-length",
    b"server",
    b"date",
    b"x-request-id",
    b"request-id",
    b"set-cookie",
    b"alt-svc",
}

_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

TRACE_HEADERS = frozenset((b"traceparent", b"tracestate", b"baggage"))

EVENT_STREAM_HEADERS: RawHeaders = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

CORS_HEADERS: RawHeaders = [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*")]
"""For requests with an `origin`: the API carries no ambient credentials, so any page may read it."""


def request_headers(
    headers: RawHeaders, *, request_id: str, model: str, principal: Iterable[tuple[str, str]] = ()
) -> CIMultiDict[str]:
    """The headers a neuron gets: the client's own without hop-by-hop, credentials and anything of ours.

    `principal` names who asks, as the gateway knows it: what a client says of itself under those names is dropped.
    """
    forwarded = _end_to_end(headers)
    for pair in principal:
        forwarded.add(*pair)
    forwarded.add("x-request-id", request_id)
    forwarded.add(HOP_HEADER, "1")
    if model.isprintable():
        forwarded.add(RESOLVED_MODEL_HEADER, model)
    return forwarded


def foreign_headers(
    headers: RawHeaders, *, request_id: str, is_translated: bool, secrets: Mapping[str, str]
) -> CIMultiDict[str]:
    """The headers for a server that is no neuron: nothing of ours, nothing of who asks, and its own credentials.

    is_translated: the request is ours and not the client's; of the client's headers only the trace goes along.
    """
    if is_translated:
        forwarded: CIMultiDict[str] = CIMultiDict({"content-type": "application/json", "accept": "text/event-stream"})
        forwarded.extend(_end_to_end([pair for pair in headers if pair[0] in TRACE_HEADERS]))
    else:
        forwarded = _end_to_end(headers)
    forwarded.add("x-request-id", request_id)
    for secret_name, secret in secrets.items():
        forwarded[secret_name] = secret
    return forwarded


def _end_to_end(headers: RawHeaders) -> CIMultiDict[str]:
    """The client's headers without hop-by-hop, credentials and anything of ours."""
    forwarded: CIMultiDict[str] = CIMultiDict()
    add = forwarded.add
    named_by_connection: frozenset[bytes] = frozenset()
    for name, value in headers:
        if name in _DROP_FROM_REQUEST:
            if name == b"connection" and value not in (b"keep-alive", b"close", b"Keep-Alive"):
                named_by_connection = frozenset(token.strip().lower() for token in value.split(b","))
            continue
        if name.startswith((b"x-cortex-", b"x-helexa-", b"proxy-")):
            continue
        text = value.decode("latin-1")
        if not text.isprintable() and _CONTROL_CHARACTER.search(text):
            continue  # Servers let them in, clients do not let them out: no reason to fail the request.
        add(name.decode("latin-1"), text)
    for token in named_by_connection:
        forwarded.popall(token.decode("latin-1"), None)
    return forwarded


def response_headers(raw_headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """A neuron's headers as the client gets them. `content-length` is set anew by whoever sends the body."""
    return [(lowered, value) for name, value in raw_headers if (lowered := name.lower()) not in _DROP_FROM_RESPONSE]


def identity_headers(
    request_id: str,
    *,
    node: str | None = None,
    model: str | None = None,
    route: str | None = None,
    translated: str | None = None,
) -> RawHeaders:
    """The headers on every answer: both spellings of the request id, and what was decided."""
    encoded = request_id.encode("ascii")
    headers = [(b"x-request-id", encoded), (b"request-id", encoded)]
    if node is not None:
        headers.append((b"x-cortex-node", node.encode("utf-8")))
    if model is not None and model.isprintable():
        headers.append((b"x-cortex-model", model.encode("utf-8")))
    if route is not None:
        headers.append((b"x-cortex-route", route.encode("ascii")))
    if translated is not None:
        headers.append((b"x-cortex-translated", translated.encode("ascii")))
    return headers
