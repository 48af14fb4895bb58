"""The OpenAI surfaces: chat completions, completions, responses."""

from __future__ import annotations

import msgspec
from cortex_core.dialects.errors import openai_error_body
from cortex_core.errors import ApiError

from cortex_gateway.routes.surface import Surface

PING = b": ping\n\n"


def error_event(error: ApiError, request_id: str) -> bytes:
    """Chat and completions: a bare `data:` event, and no `[DONE]` after it."""
    return b"data: " + openai_error_body(error, request_id) + b"\n\n"


def responses_error_event(error: ApiError, request_id: str) -> bytes:
    """Responses: an `error` event, flat, as that API's stream events are."""
    event = {
        "type": "error",
        "code": error.code or error.kind,
        "message": error.message,
        "param": error.param,
        "sequence_number": 0,
    }
    return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"


SURFACES = (
    Surface(
        name="chat_completions",
        dialect="openai",
        upstream_path="/v1/chat/completions",
        paths=("/v1/chat/completions", "/chat/completions"),
        ping=PING,
        error_event=error_event,
    ),
    Surface(
        name="completions",
        dialect="openai",
        upstream_path="/v1/completions",
        paths=("/v1/completions", "/completions"),
        ping=PING,
        error_event=error_event,
    ),
    # A neuron that serves it answers; one that does not says so itself, in the OpenAI envelope.
    Surface(
        name="responses",
        dialect="openai",
        upstream_path="/v1/responses",
        paths=("/v1/responses", "/responses"),
        ping=PING,
        error_event=responses_error_event,
    ),
)
