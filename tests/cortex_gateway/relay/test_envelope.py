"""Whatever the body, the answer is an envelope or a typed 400."""

from __future__ import annotations

import json

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.relay.envelope import read_envelope
from hypothesis import given
from hypothesis import strategies as st


def test_model_and_stream_are_read_and_the_rest_is_ignored() -> None:
    envelope = read_envelope(json.dumps({"messages": [{"x": [1, {}]}], "model": "a/b", "stream": True}).encode())
    assert (envelope.model, envelope.stream) == ("a/b", True)
    assert read_envelope(b'{"model":"m","stream":null}').stream is None


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"not json", "invalid_json", None),
        (b'{"model":"m"} trailing', "invalid_json", None),
        (b'{"model":"m","messages":"\xff\xfe"}', "invalid_json", None),
        (b'{"model":"\xff"}', "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b'"text"', "invalid_type", None),
        (b"null", "invalid_type", None),
        (b"12", "invalid_type", None),
        (b"{}", "missing_model_field", "model"),
        (b'{"model":""}', "missing_model_field", "model"),
        (b'{"model":null}', "invalid_type", "model"),
        (b'{"model":["m"]}', "invalid_type", "model"),
        (b'{"model":"' + b"m" * 600 + b'"}', "invalid_value", "model"),
        (b'{"model":"m","stream":"yes"}', "invalid_type", "stream"),
        (b'{"model":"m","messages":' + b"[" * 100_000, "invalid_json", None),
        (b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", None),
    ],
)
def test_bad_bodies_are_refused_with_a_code(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        read_envelope(body)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, param)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    try:
        assert read_envelope(body).model
    except ApiError as error:
        assert error.status == 400
