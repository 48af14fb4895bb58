"""Errors of servers that are no neurons, in the dialect of the one who asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from cortex_core.dialects.openai_chat_client import error_of
from cortex_core.errors import ApiError, invalid

RETRY_BUSY_S = 2
"""Where a server does not say when to come back."""

MAX_RETRY_S = 3600


class UpstreamFault(Exception):
    """The server broke off in the middle of an answer, or said there that something went wrong."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def refused(status: int, body: bytes, retry_after: str | None) -> ApiError:
    """An error answer, its status kept where it is about the request. What is worth a retry says when.

    Credentials are between the gateway and the server: that they are refused is no matter of the caller's.
    """
    if status in (401, 402, 403):
        return ApiError(
            "internal",
            "The server behind the gateway refused the gateway's own credentials.",
            code="upstream_unauthorized",
            status=502,
        )
    error = error_of(status, body, retry_after=retry_seconds(retry_after))
    if error.kind == "internal":
        error.status = status if status >= 500 else 502
    is_busy = error.kind in ("rate_limit", "overloaded", "timeout") or error.status == 502
    if is_busy and error.retry_after is None and error.code != "insufficient_quota":
        error.retry_after = RETRY_BUSY_S
    return error


def retry_advice(headers: Mapping[str, str]) -> str | None:
    """`Retry-After` of an answer. A date becomes seconds from the answer's own: the clocks of both ends may differ."""
    advice, sent = headers.get("retry-after"), headers.get("date")
    if advice is None or sent is None:
        return advice
    try:
        return f"{(parsedate_to_datetime(advice) - parsedate_to_datetime(sent)).total_seconds():.0f}"
    except (ValueError, TypeError):
        return advice


def retry_seconds(value: str | None) -> int | None:
    """`Retry-After` in whole seconds: a number of them, or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    if not math.isfinite(seconds):
        return None
    return min(max(math.ceil(seconds), 0), MAX_RETRY_S)


def cannot_count(name: str) -> ApiError:
    return invalid(
        f"{name}: the model is on a server that speaks only OpenAI chat and has no /tokenize that takes messages; "
        "its tokens cannot be counted beforehand.",
        code="count_not_supported",
    )
