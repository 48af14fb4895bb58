"""Errors in the words of each dialect: bodies, statuses, headers."""

from __future__ import annotations

import uuid
from typing import Any, Literal

import msgspec

from cortex_core.errors import ENDED_ENGINE, ApiError, ErrorKind

DialectName = Literal["openai", "anthropic"]

_encode = msgspec.json.Encoder().encode

OPENAI_TYPES: dict[ErrorKind, str] = {
    "invalid_request": "invalid_request_error",
    "authentication": "invalid_request_error",
    "permission": "permission_error",
    "not_found": "invalid_request_error",
    "method_not_allowed": "invalid_request_error",
    "conflict": "invalid_request_error",
    "request_too_large": "invalid_request_error",
    "rate_limit": "rate_limit_error",
    "overloaded": "server_error",
    "timeout": "server_error",
    "internal": "server_error",
}

OPENAI_CODES: dict[ErrorKind, str] = {
    "authentication": "invalid_api_key",
    "method_not_allowed": "method_not_supported",
    "rate_limit": "rate_limit_exceeded",
    "overloaded": "service_unavailable",
}
"""Codes for errors that carry none of their own."""

ANTHROPIC_TYPES: dict[ErrorKind, str] = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "method_not_allowed": "invalid_request_error",
    "conflict": "conflict_error",
    "request_too_large": "request_too_large",
    "rate_limit": "rate_limit_error",
    "overloaded": "overloaded_error",
    "timeout": "timeout_error",
    "internal": "api_error",
}

OPENAI_ROUTES = frozenset(("/chat/completions", "/completions", "/responses", "/responses/input_tokens"))

ANTHROPIC_OVERLOADED_STATUS = 529
"""Anthropic clients handle 529 as overload and 503 as any other server error."""


def new_request_id() -> str:
    return "req_" + uuid.uuid4().hex


def openai_error_body(err: ApiError, request_id: str | None) -> bytes:
    """`{"error": {message, type, param, code, …extras}}`; `param` and `code` are null when unset."""
    kind = "insufficient_quota" if err.code == "insufficient_quota" else OPENAI_TYPES[err.kind]
    error: dict[str, Any] = dict(err.extras)
    if request_id is not None:
        error["request_id"] = request_id
    error |= {
        "message": err.message,
        "type": kind,
        "param": err.param,
        "code": err.code or OPENAI_CODES.get(err.kind),
    }
    return _encode({"error": error})


def anthropic_error_body(err: ApiError, request_id: str | None) -> bytes:
    """`{"type": "error", "error": {type, message}, "request_id"}`, in Anthropic's wording where one exists."""
    error: dict[str, Any] = {"type": ANTHROPIC_TYPES[err.kind], "message": anthropic_message(err)}
    if err.code is not None:
        error["details"] = {"error_code": err.code}
        if ENDED_ENGINE in err.extras:
            error["details"][ENDED_ENGINE] = err.extras[ENDED_ENGINE]
    body: dict[str, Any] = {"type": "error", "error": error}
    if request_id is not None:
        body["request_id"] = request_id
    return _encode(body)


def anthropic_message(err: ApiError) -> str:
    """Agents match on these sentences: they compact on the first and drop the model on the second."""
    extras = err.extras
    if err.code == "context_length_exceeded" and "prompt_len" in extras and "max" in extras:
        return f"prompt is too long: {extras['prompt_len']} tokens > {extras['max']} maximum"
    if err.code == "model_not_found" and "model_id" in extras:
        return f"model: {extras['model_id']}"
    if err.param is not None and err.param not in err.message:
        return f"{err.param}: {err.message}"  # this envelope has no place for the field but the message
    return err.message


def error_body(err: ApiError, dialect: DialectName, request_id: str | None) -> bytes:
    """The body in either dialect."""
    render = anthropic_error_body if dialect == "anthropic" else openai_error_body
    return render(err, request_id)


def status_of(err: ApiError, dialect: DialectName) -> int:
    """The HTTP status."""
    if dialect == "anthropic" and err.kind == "overloaded" and err.status == 503:
        return ANTHROPIC_OVERLOADED_STATUS
    return err.status


def headers_of(err: ApiError) -> dict[str, str]:
    """`retry-after`, in whole seconds, on errors that are worth a retry.

    SDKs repeat every 429; `x-should-retry` keeps them from it where nothing would change.
    """
    if err.retry_after is not None:
        return {"retry-after": str(err.retry_after)}
    return {"x-should-retry": "false"} if err.status == 429 else {}


def dialect_of_path(path: str, *, has_anthropic_version: bool = False) -> DialectName:
    """Which dialect an answer on this path is to speak. A query is ignored, `/v1` is optional.

    has_anthropic_version: the request has that header. It decides for paths that both dialects share.
    """
    route = path.partition("?")[0].removeprefix("/v1")
    if route == "/messages" or route.startswith("/messages/"):
        return "anthropic"
    return "anthropic" if has_anthropic_version and route not in OPENAI_ROUTES else "openai"
