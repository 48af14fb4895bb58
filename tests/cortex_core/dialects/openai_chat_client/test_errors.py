"""Errors of chat servers become ours, whatever words they choose."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.dialects.openai_chat_client import error_of
from cortex_core.errors import ApiError


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            404,
            b'{"error": {"message": "no such model", "code": "model_not_found", "param": "model"}}',
            ("not_found", "no such model", "model_not_found", "model"),
        ),
        (
            400,
            b'{"error": "too long", "code": "prompt_too_long"}',
            ("invalid_request", "too long", "prompt_too_long", None),
        ),
        (422, b'{"detail": "x"}', ("invalid_request", "x", None, None)),
        (422, b'{"detail": [{"loc": 1}]}', ("invalid_request", "The upstream server answered 422", None, None)),
        (503, b"<html>", ("overloaded", "The upstream server answered 503", None, None)),
        (418, b"\xff", ("internal", "The upstream server answered 418", None, None)),
        (500, b'{"error": {"code": 7}}', ("internal", "The upstream server answered 500", None, None)),
    ],
)
def test_upstream_errors(status: int, body: bytes, expected: tuple[Any, ...]) -> None:
    error = error_of(status, body, retry_after=2)
    assert isinstance(error, ApiError)
    assert (error.kind, error.message, error.code, error.param) == expected
    assert error.retry_after == 2


@pytest.mark.parametrize(
    "error",
    [
        {"message": "no", "code": "context_length_exceeded", "prompt_len": 5000, "max": 4096},
        {"message": "no", "type": "exceed_context_size_error", "n_prompt_tokens": 5000, "n_ctx": 4096},
        {"message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (…)"},
        {"message": "This model's maximum context length is 4096 tokens. However, they resulted in 5000 tokens"},
        {"message": "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it"},
        {"message": "prompt is too long: 5000 tokens > 4096 maximum"},
    ],
)
def test_a_prompt_that_does_not_fit_is_said_in_one_way(error: dict[str, Any]) -> None:
    found = error_of(400, json.dumps({"error": error}).encode())
    assert (found.code, found.status) == ("context_length_exceeded", 400)
    assert found.extras == {"prompt_len": 5000, "max": 4096}


def test_numbers_of_another_error_are_not_read_as_a_length() -> None:
    found = error_of(400, b'{"error": {"message": "n: at most 4096 choices, you requested 5000 tokens"}}')
    assert (found.code, found.extras) == (None, {})
