"""Headers that cross the gateway, in either direction: by lists of what passes, never of what does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

from cortex_core.hop import CACHE_SALT_HEADER, HOP_HEADER, PRIORITY_HEADER, RESOLVED_MODEL_HEADER
from multidict import CIMultiDict

from cortex_gateway.http.asgi import RawHeaders

SESSION_HEADERS = (
    b"x-claude-code-session-id",
    b"x-session-affinity",
    b"x-session-id",
    b"thread-id",
    b"session-id",
    b"session_id",
)
"""The first of these that is there. `x-client-request-id` is not among them: most clients make a new one each time."""

AGENT_HEADER = b"x-claude-code-agent-id"
"""Agents of one Claude Code session have prompts of their own."""

TO_NEURON = frozenset(
    (
        b"content-type",
        b"accept",
        b"anthropic-version",
        b"anthropic-beta",
        b"traceparent",
        b"tracestate",
        b"baggage",
        AGENT_HEADER,
        *SESSION_HEADERS,
    )
)
"""Of a client's headers, those that mean something to a neuron. Whatever is not listed stays here: credentials, what a
proxy says of the client, what a browser says of the page that asks (it was judged at our door, and would be foreign at
the next one), what other servers may take for an order. Who asks is said by the gateway, as it knows it."""

TO_FOREIGN = frozenset((b"content-type", b"accept", b"traceparent", b"tracestate"))
"""Of a client's headers, those that go to a server that is no neuron; `neurons[].forward_headers` names more. `baggage`
is not among them: what clients put there is for their own systems."""

TO_FOREIGN_TRANSLATED = frozenset((b"traceparent", b"tracestate"))
"""Where the request is the gateway's own: of the client's, its trace goes along."""

FROM_NEURON = frozenset(
    (b"content-type", b"content-encoding", b"cache-control", b"retry-after", b"x-should-retry", b"x-accel-buffering")
)
"""Of a neuron's headers, those that the client gets. Cookies, CORS, ids and whatever speaks of a connection are the
gateway's own to say, or nobody's."""

FROM_FOREIGN = frozenset((b"content-type", b"content-encoding"))
"""What else such a server says is between it and the gateway."""

_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

USER_AGENT = "cortex-gateway"
"""Servers behind some firewalls answer nobody who has none; the client's own stays here."""


def request_headers(
    headers: RawHeaders,
    *,
    request_id: str,
    model: str,
    principal: Iterable[tuple[str, str]] = (),
    secrets: Mapping[str, str] = MappingProxyType({}),
    cache_salt: str = "",
    priority: str = "normal",
) -> CIMultiDict[str]:
    """The headers a neuron gets: those of the client's that are listed, and ours.

    `principal` names who asks, as the gateway knows it: what a client says of itself under those names is dropped.
    `secrets` are what that neuron knows the gateway by.
    """
    forwarded = _listed(headers, TO_NEURON)
    for pair in principal:
        forwarded.add(*pair)
    forwarded.add("x-request-id", request_id)
    forwarded.add(HOP_HEADER, "1")
    if cache_salt:
        forwarded.add(CACHE_SALT_HEADER, cache_salt)
    if priority != "normal":
        forwarded.add(PRIORITY_HEADER, priority)
    forwarded.update(secrets)
    if model.isprintable():
        forwarded.add(RESOLVED_MODEL_HEADER, model)
    return forwarded


def foreign_headers(
    headers: RawHeaders,
    *,
    request_id: str,
    is_translated: bool,
    secrets: Mapping[str, str],
    also: Set[bytes] = frozenset(),
) -> CIMultiDict[str]:
    """The headers for a server that is no neuron: those of the client's that are listed, and its own credentials.

    is_translated: the request is ours and not the client's. also: more names (in lower case) that the configuration of
    this server lists.
    """
    if is_translated:
        forwarded = _listed(headers, TO_FOREIGN_TRANSLATED | also)
        forwarded["content-type"] = "application/json"
        forwarded["accept"] = "text/event-stream"
    else:
        forwarded = _listed(headers, TO_FOREIGN | also if also else TO_FOREIGN)
    forwarded.setdefault("user-agent", USER_AGENT)
    forwarded["accept-encoding"] = "identity"
    forwarded["x-request-id"] = request_id
    for secret_name, secret in secrets.items():
        forwarded[secret_name] = secret
    return forwarded


def _listed(headers: RawHeaders, names: Set[bytes]) -> CIMultiDict[str]:
    """The client's headers of these names, without those that its `connection` header claims for this hop."""
    forwarded: CIMultiDict[str] = CIMultiDict()
    add = forwarded.add
    for name, value in headers:
        if name not in names:
            if name == b"connection" and value not in (b"keep-alive", b"close", b"Keep-Alive"):
                names = names - {token.strip().lower() for token in value.split(b",")}
                for nominated in [sent for sent in forwarded if sent.lower().encode("latin-1") not in names]:
                    forwarded.popall(nominated, None)
            continue
        text = value.decode("latin-1")
        if not text.isprintable() and _CONTROL_CHARACTER.search(text):
            continue  # Servers let them in, clients do not let them out: no reason to fail the request.
        add(name.decode("latin-1"), text)
    return forwarded


def response_headers(raw_headers: Iterable[tuple[bytes, bytes]], *, is_foreign: bool = False) -> RawHeaders:
    """The headers of a neuron's answer, or of another server's, that the client gets. `content-length` is set anew by
    whoever sends the body."""
    names = FROM_FOREIGN if is_foreign else FROM_NEURON
    return [(lowered, value) for name, value in raw_headers if (lowered := name.lower()) in names]


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
