"""The Anthropic surfaces: messages and count_tokens."""

from __future__ import annotations

from cortex_core.dialects.errors import anthropic_error_body
from cortex_core.errors import ApiError

from cortex_gateway.http.framing import server_sent_events
from cortex_gateway.surfaces.surface import Surface

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def error_event(error: ApiError, request_id: str) -> bytes:
    return b"event: error\ndata: " + anthropic_error_body(error, request_id) + b"\n\n"


SURFACES = (
    Surface(
        name="messages",
        dialect="anthropic",
        upstream_path="/v1/messages",
        paths=("/v1/messages", "/messages"),
        framing=server_sent_events(PING, error_event),
    ),
    Surface(
        name="count_tokens",
        dialect="anthropic",
        upstream_path="/v1/messages/count_tokens",
        paths=("/v1/messages/count_tokens", "/messages/count_tokens"),
        framing=server_sent_events(PING, error_event),
        can_stream=False,
        generates=False,
    ),
)
