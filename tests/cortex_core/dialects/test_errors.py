"""Errors as the SDKs of both vendors see them."""

from __future__ import annotations

import json
from typing import Any, get_args

import anthropic
import openai
import pytest
from cortex_core.dialects.errors import (
    ANTHROPIC_TYPES,
    OPENAI_TYPES,
    anthropic_error_body,
    dialect_of_path,
    error_body,
    headers_of,
    new_request_id,
    openai_error_body,
    status_of,
)
from cortex_core.errors import ApiError, ErrorKind, invalid, model_not_found, prompt_too_long


def test_the_openai_envelope_has_all_four_keys() -> None:
    error = invalid("messages[0].role: must be …", param="messages[0].role")
    assert json.loads(openai_error_body(error, None)) == {
        "error": {
            "message": "messages[0].role: must be …",
            "type": "invalid_request_error",
            "param": "messages[0].role",
            "code": "invalid_value",
        }
    }
    bare = json.loads(openai_error_body(ApiError("internal", "x"), None))["error"]
    assert bare == {"message": "x", "type": "server_error", "param": None, "code": None}


def test_extras_stand_in_the_error_object_and_override_nothing() -> None:
    error = ApiError("overloaded", "no room", extras={"free_mb": 3, "message": "x", "type": "y"}, retry_after=5)
    assert json.loads(openai_error_body(error, "req_1"))["error"] == {
        "free_mb": 3,
        "message": "no room",
        "type": "server_error",
        "request_id": "req_1",
        "param": None,
        "code": "service_unavailable",
    }


def test_the_anthropic_envelope() -> None:
    assert json.loads(anthropic_error_body(ApiError("internal", "x"), "req_1")) == {
        "type": "error",
        "error": {"type": "api_error", "message": "x"},
        "request_id": "req_1",
    }
    coded = json.loads(anthropic_error_body(invalid("x", param="y"), None))
    assert coded["error"]["details"] == {"error_code": "invalid_value"}
    lost = ApiError("overloaded", "x", code="engine_restarting", extras={"ended_engine": "a1-0", "other": 1})
    assert json.loads(anthropic_error_body(lost, None))["error"]["details"] == {
        "error_code": "engine_restarting",
        "ended_engine": "a1-0",
    }
    assert "request_id" not in coded


def test_every_kind_has_a_type_in_both_dialects() -> None:
    kinds = set(get_args(ErrorKind))
    assert set(OPENAI_TYPES) == set(ANTHROPIC_TYPES) == kinds


@pytest.mark.parametrize(
    ("kind", "status", "sdk_class"),
    [
        ("invalid_request", 400, openai.BadRequestError),
        ("authentication", 401, openai.AuthenticationError),
        ("permission", 403, openai.PermissionDeniedError),
        ("not_found", 404, openai.NotFoundError),
        ("method_not_allowed", 405, openai.APIStatusError),
        ("conflict", 409, openai.ConflictError),
        ("request_too_large", 413, openai.APIStatusError),
        ("rate_limit", 429, openai.RateLimitError),
        ("overloaded", 503, openai.InternalServerError),
        ("timeout", 504, openai.InternalServerError),
        ("internal", 500, openai.InternalServerError),
    ],
)
def test_the_openai_sdk_raises_its_class(kind: ErrorKind, status: int, sdk_class: type, openai_client: Any) -> None:
    error = ApiError(kind, "because", code="some_code", param="model")
    assert status_of(error, "openai") == status
    body = error_body(error, "openai", None)
    client: openai.OpenAI = openai_client(status, "application/json", body, {"x-request-id": "req_7"})
    with pytest.raises(openai.APIStatusError) as caught:
        client.models.list()
    assert type(caught.value) is sdk_class
    assert caught.value.request_id == "req_7"
    assert (caught.value.code, caught.value.param) == ("some_code", "model")


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "sdk_class"),
    [
        ("invalid_request", 400, "invalid_request_error", anthropic.BadRequestError),
        ("authentication", 401, "authentication_error", anthropic.AuthenticationError),
        ("permission", 403, "permission_error", anthropic.PermissionDeniedError),
        ("not_found", 404, "not_found_error", anthropic.NotFoundError),
        ("conflict", 409, "conflict_error", anthropic.ConflictError),
        ("request_too_large", 413, "request_too_large", anthropic.APIStatusError),
        ("rate_limit", 429, "rate_limit_error", anthropic.RateLimitError),
        ("overloaded", 529, "overloaded_error", anthropic.APIStatusError),
        ("timeout", 504, "timeout_error", anthropic.InternalServerError),
        ("internal", 500, "api_error", anthropic.InternalServerError),
    ],
)
def test_the_anthropic_sdk_raises_its_class(
    kind: ErrorKind, status: int, error_type: str, sdk_class: type, anthropic_client: Any
) -> None:
    error = ApiError(kind, "because", code="some_code")
    assert status_of(error, "anthropic") == status
    body = error_body(error, "anthropic", "req_7")
    client: anthropic.Anthropic = anthropic_client(status, "application/json", body, {"request-id": "req_7"})
    with pytest.raises(sdk_class, match="because") as caught:
        client.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "q"}])
    assert caught.value.request_id == "req_7"  # type: ignore[attr-defined]
    assert caught.value.body["error"]["type"] == error_type  # type: ignore[attr-defined]


def test_the_anthropic_message_names_the_field_for_want_of_another_place() -> None:
    def said(error: ApiError) -> str:
        return str(json.loads(anthropic_error_body(error, None))["error"]["message"])

    assert said(invalid("cannot see images", param="messages")) == "messages: cannot see images"
    assert said(invalid("max_tokens: must be at least 0", param="max_tokens")) == "max_tokens: must be at least 0"
    assert said(invalid("no")) == "no"


@pytest.mark.parametrize(
    ("path", "has_version", "dialect"),
    [
        ("/v1/messages?beta=true", False, "anthropic"),
        ("/messages/count_tokens", False, "anthropic"),
        ("/v1/models", False, "openai"),
        ("/v1/models", True, "anthropic"),
        ("/v1/models/org/name", True, "anthropic"),
        ("/v1/files", True, "anthropic"),
        ("/v1/responses", True, "openai"),
        ("/chat/completions", True, "openai"),
    ],
)
def test_the_header_decides_where_the_path_does_not(path: str, has_version: bool, dialect: str) -> None:
    assert dialect_of_path(path, has_anthropic_version=has_version) == dialect


def test_the_sentences_that_agents_match_on() -> None:
    too_long = prompt_too_long(213462, 200000)
    message = json.loads(anthropic_error_body(too_long, None))["error"]["message"]
    assert message == "prompt is too long: 213462 tokens > 200000 maximum"
    openai_error = json.loads(openai_error_body(too_long, None))["error"]
    assert openai_error["message"].startswith("prompt is too long: 213462 tokens > 200000 maximum.")
    assert (openai_error["code"], openai_error["prompt_len"], openai_error["max"]) == (
        "context_length_exceeded",
        213462,
        200000,
    )
    assert json.loads(anthropic_error_body(model_not_found("a/b"), None))["error"]["message"] == "model: a/b"
    assert json.loads(openai_error_body(model_not_found("a/b"), None))["error"]["code"] == "model_not_found"


def test_a_spent_quota_is_its_own_type() -> None:
    error = ApiError("rate_limit", "spent", code="insufficient_quota")
    assert json.loads(openai_error_body(error, None))["error"]["type"] == "insufficient_quota"
    assert json.loads(openai_error_body(ApiError("rate_limit", "x"), None))["error"]["code"] == "rate_limit_exceeded"


def test_a_status_of_its_own_is_kept_in_both_dialects() -> None:
    error = ApiError("overloaded", "bad gateway", status=502)
    assert status_of(error, "openai") == status_of(error, "anthropic") == 502


def test_retry_after() -> None:
    assert headers_of(ApiError("overloaded", "x", retry_after=5)) == {"retry-after": "5"}
    assert headers_of(ApiError("overloaded", "x")) == {}


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", "anthropic"),
        ("/v1/messages?beta=true", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/messages", "anthropic"),
        ("/messages/count_tokens?beta=true", "anthropic"),
        ("/v1/messages2", "openai"),
        ("/v1/chat/completions", "openai"),
        ("/v1/models", "openai"),
        ("/", "openai"),
        ("", "openai"),
    ],
)
def test_the_path_decides_the_dialect(path: str, dialect: str) -> None:
    assert dialect_of_path(path) == dialect


def test_request_ids() -> None:
    assert new_request_id().startswith("req_")
    assert new_request_id() != new_request_id()
