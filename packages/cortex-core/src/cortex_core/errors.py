"""One error type for every API surface; `dialects.errors` renders it in the caller's dialect."""

from __future__ import annotations

from typing import Any, Literal

ErrorKind = Literal[
    "invalid_request",
    "authentication",
    "permission",
    "not_found",
    "method_not_allowed",
    "conflict",
    "request_too_large",
    "rate_limit",
    "overloaded",
    "timeout",
    "internal",
]

STATUS_OF_KIND: dict[ErrorKind, int] = {
    "invalid_request": 400,
    "authentication": 401,
    "permission": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "request_too_large": 413,
    "rate_limit": 429,
    "overloaded": 503,
    "timeout": 504,
    "internal": 500,
}


REQUEST_KILLS_ENGINE = "request_kills_engine"
ENDED_ENGINE = "ended_engine"
"""Extra of an error: the engine that ended while it held the request, by a name that no other engine has."""


class ApiError(Exception):
    """An error a client is to read.

    kind decides the HTTP status and the dialect's error type. `code` is the machine-readable OpenAI code
    (`context_length_exceeded`, `model_not_found`, …), `param` the offending field as a path (`messages[0].role`),
    `retry_after` seconds until a retry makes sense (sent as a header), `extras` diagnostic numbers that go into
    the OpenAI error object. `status` overrides the kind's status where the reference demands another.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        extras: dict[str, Any] | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.extras = extras or {}
        self.status = STATUS_OF_KIND[kind] if status is None else status

    @property
    def is_retryable(self) -> bool:
        return self.retry_after is not None

    def __repr__(self) -> str:
        return f"ApiError({self.kind}, {self.message!r}, code={self.code!r}, param={self.param!r})"


def invalid(message: str, *, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError("invalid_request", message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    return ApiError(
        "not_found",
        f"The model `{model}` does not exist or is not available here.",
        code="model_not_found",
        param="model",
        extras={"model_id": model},
    )


def request_kills_engine(model: str, deaths: int, consequence: str) -> ApiError:
    """The request is the cause: processes ended whenever they held it. It would be the same elsewhere, so nobody is
    asked to retry, in a status that clients do not repeat."""
    return ApiError(
        "invalid_request",
        f"This request is not served: {deaths} processes that served `{model}` ended while they worked on it. "
        f"{consequence}",
        code=REQUEST_KILLS_ENGINE,
        extras={"model_id": model, "deaths": deaths},
    )


def prompt_too_long(num_tokens: int, limit: int, *, param: str = "messages") -> ApiError:
    """The wording is an API: Claude Code parses both numbers out of `N tokens > M maximum`, others read the code."""
    return ApiError(
        "invalid_request",
        f"prompt is too long: {num_tokens} tokens > {limit} maximum. This model's maximum context length is "
        f"{limit} tokens. However, your messages resulted in {num_tokens} tokens. Please reduce their length.",
        code="context_length_exceeded",
        param=param,
        extras={"prompt_len": num_tokens, "max": limit},
    )
