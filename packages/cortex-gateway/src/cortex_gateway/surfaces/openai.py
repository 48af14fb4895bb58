"""The OpenAI surfaces: chat completions, completions, responses."""

from __future__ import annotations

from cortex_core.dialects import openai_responses
from cortex_core.dialects.errors import openai_error_body
from cortex_core.errors import ApiError

from cortex_gateway.http.framing import server_sent_events
from cortex_gateway.surfaces.surface import Surface

PING = b": ping\n\n"


def error_event(error: ApiError, request_id: str) -> bytes:
    """Chat and completions: a bare `data:` event, and no `[DONE]` after it."""
    return b"data: " + openai_error_body(error, request_id) + b"\n\n"


def responses_error_event(error: ApiError, request_id: str) -> bytes:
    """Responses: an `error` event; a response that could fail has not been created yet, or not by the gateway."""
    return openai_responses.error_event(error)


SURFACES = (
    Surface(
        name="chat_completions",
        dialect="openai",
        upstream_path="/v1/chat/completions",
        paths=("/v1/chat/completions", "/chat/completions"),
        framing=server_sent_events(PING, error_event),
    ),
    Surface(
        name="completions",
        dialect="openai",
        upstream_path="/v1/completions",
        paths=("/v1/completions", "/completions"),
        framing=server_sent_events(PING, error_event),
    ),
    Surface(
        name="responses",
        dialect="openai",
        upstream_path="/v1/responses",
        paths=("/v1/responses", "/responses"),
        framing=server_sent_events(PING, responses_error_event),
    ),
    Surface(
        name="responses_input_tokens",
        dialect="openai",
        upstream_path="/v1/responses/input_tokens",
        paths=("/v1/responses/input_tokens", "/responses/input_tokens"),
        framing=server_sent_events(PING, responses_error_event),
        can_stream=False,
        generates=False,
    ),
)
