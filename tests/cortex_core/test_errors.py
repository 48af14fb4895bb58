"""The one error type: what decides its status, and the sentences that clients read numbers out of."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from cortex_core.errors import (
    REQUEST_KILLS_ENGINE,
    STATUS_OF_KIND,
    ApiError,
    ErrorKind,
    invalid,
    model_not_found,
    prompt_too_long,
    request_kills_engine,
)


@pytest.mark.parametrize("kind", get_args(ErrorKind))
def test_the_kind_decides_the_status_unless_one_is_given(kind: ErrorKind) -> None:
    assert ApiError(kind, "x").status == STATUS_OF_KIND[kind]
    assert 400 <= STATUS_OF_KIND[kind] <= 599 and STATUS_OF_KIND[kind] != 402
    assert ApiError(kind, "x", status=502).status == 502


def test_what_says_when_to_come_back_is_retryable() -> None:
    assert ApiError("overloaded", "x", retry_after=0).is_retryable
    assert not ApiError("overloaded", "x").is_retryable


def test_extras_of_one_error_are_not_anothers() -> None:
    first = ApiError("internal", "x")
    first.extras["max"] = 1
    assert ApiError("internal", "x").extras == {}


def test_a_refusal_of_a_field_is_a_400_that_names_it() -> None:
    error = invalid("top_p must be at most 1", param="top_p")
    assert (error.status, error.param, error.code) == (400, "top_p", "invalid_value")
    assert str(error) == "top_p must be at most 1"
    assert "top_p" in repr(error)


def test_the_numbers_of_a_prompt_that_is_too_long_are_where_clients_look() -> None:
    error = prompt_too_long(213462, 200000, param="input")
    found = re.search(r"prompt is too long: (\d+) tokens > (\d+) maximum", error.message)
    assert found is not None and found.groups() == ("213462", "200000")
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "input")
    assert error.extras == {"prompt_len": 213462, "max": 200000}


def test_an_unknown_model_is_named() -> None:
    error = model_not_found("org/name")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "`org/name`" in error.message and error.extras == {"model_id": "org/name"}


def test_who_kills_engines_is_not_asked_to_retry() -> None:
    error = request_kills_engine("org/name", 3, "It is refused from now on.")
    assert (error.status, error.code, error.is_retryable) == (400, REQUEST_KILLS_ENGINE, False)
    assert error.extras == {"model_id": "org/name", "deaths": 3}
    assert error.message.endswith("It is refused from now on.") and "3 processes" in error.message
