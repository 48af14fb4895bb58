"""Read an error answer of any server that calls itself OpenAI-compatible."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from cortex_core.dialects.limits import MAX_FOREIGN_ERROR_BYTES
from cortex_core.errors import ApiError, ErrorKind

_decode = msgspec.json.Decoder().decode

_COUNT = r"(?<!\d)(\d{1,12})(?!\d)"
_LIMIT = re.compile(rf"maximum context length (?:is|of) {_COUNT}|> {_COUNT} maximum|context size \({_COUNT} tokens\)")
_ASKED = re.compile(
    rf"{_COUNT} (?:tokens )?in the messages|resulted in {_COUNT} tokens"
    rf"|(?:contains|has) (?:at least )?{_COUNT} input tokens|too long: {_COUNT} tokens"
    rf"|request \({_COUNT} tokens\)|requested (?:about )?{_COUNT} tokens"
)
"""How servers say that a prompt does not fit. Agents compact on it, and so need it in their own dialect's words."""

_KIND_OF_STATUS: dict[int, ErrorKind] = {
    400: "invalid_request",
    401: "authentication",
    403: "permission",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    422: "invalid_request",
    429: "rate_limit",
    503: "overloaded",
    504: "timeout",
    529: "overloaded",
}


def error_of(status: int, body: bytes, *, retry_after: int | None = None) -> ApiError:
    """An upstream error answer, whatever its shape, as the error to pass on; its status is kept where it has a kind.

    A prompt that does not fit is `context_length_exceeded` with both numbers, where the server gives them.
    """
    kind = _KIND_OF_STATUS.get(status, "internal")
    message, code, param = f"The upstream server answered {status}", None, None
    try:
        value = _decode(body) if len(body) <= MAX_FOREIGN_ERROR_BYTES else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else value
    fields: dict[str, Any] = {}
    if isinstance(error, str) and error:
        message = error
        code = _string(value.get("code")) if isinstance(value, dict) else None
    elif isinstance(error, dict):
        fields = error
        message = _string(error.get("message")) or _string(error.get("detail")) or message
        code = _string(error.get("code"))
        param = _string(error.get("param"))
    found = ApiError(kind, message, code=code, param=param, retry_after=retry_after)
    if kind in ("invalid_request", "request_too_large"):
        _name_overflow(found, fields)
    return found


def _name_overflow(error: ApiError, fields: dict[str, Any]) -> None:
    """Say `context_length_exceeded` with its numbers, whatever words the server found for it."""
    num_tokens = _count(fields, "prompt_len", "n_prompt_tokens")
    limit = _count(fields, "max", "n_ctx")
    if num_tokens is None or limit is None:
        asked, bound = _ASKED.search(error.message), _LIMIT.search(error.message)
        if asked is None or bound is None:
            return
        num_tokens, limit = _matched(asked), _matched(bound)
    error.kind, error.status = "invalid_request", 400
    error.code = "context_length_exceeded"
    error.param = error.param or "messages"
    error.extras = {"prompt_len": num_tokens, "max": limit}


def _count(fields: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if type(value := fields.get(name)) is int), None)


def _matched(match: re.Match[str]) -> int:
    return next(int(group) for group in match.groups() if group)


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
