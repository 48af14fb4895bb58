"""A neuron's error that comes too late to be passed on as it is keeps what a client acts on."""

from __future__ import annotations

import pytest
from cortex_core.dialects.errors import anthropic_error_body, openai_error_body
from cortex_core.errors import invalid, prompt_too_long
from cortex_gateway.relay.errors import as_api_error


def test_code_field_and_message_survive_in_openais_dialect() -> None:
    error = as_api_error(400, openai_error_body(invalid("input: too odd", param="input"), "req_1"), None)
    assert (error.kind, error.code, error.param) == ("invalid_request", "invalid_value", "input")
    assert "too odd" in error.message
    long = as_api_error(400, openai_error_body(prompt_too_long(9, 5), None), None)
    assert (long.code, long.param) == ("context_length_exceeded", "messages")


def test_the_sentence_survives_in_anthropics() -> None:
    error = as_api_error(400, anthropic_error_body(prompt_too_long(9, 5), "req_1"), None)
    assert error.message == "prompt is too long: 9 tokens > 5 maximum" and error.param is None


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b'{"error": 7}', b'{"error": {"param": 7}}', b"<html>"])
def test_a_body_of_any_shape_is_an_error_without_a_field(body: bytes) -> None:
    error = as_api_error(400, body, None)
    assert error.status == 400 and error.param is None
