"""Whatever the body, the answer is an envelope or a typed 400."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from cortex_core.errors import ApiError
from cortex_gateway.surfaces.envelope import read_envelope, with_model
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


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


@pytest.mark.parametrize(
    ("body", "renamed"),
    [
        (b'{"model":"a"}', b'{"model":"b/c"}'),
        (
            b' {\n "stream" : true ,"model"\t: "a" , "x":[ 1.50, {"model": "a"}]}\n',
            b' {\n "stream" : true ,"model"\t: "b/c" , "x":[ 1.50, {"model": "a"}]}\n',
        ),
        (
            b'{"x": "\\"model\\": \\"a\\" } ,", "model": "a", "y": "\xc3\xa9"}',
            b'{"x": "\\"model\\": \\"a\\" } ,", "model": "b/c", "y": "\xc3\xa9"}',
        ),
        (b'{"mod\\u0065l": "a", "y": 1}', b'{"mod\\u0065l": "b/c", "y": 1}'),
        (b'{"\\"}": 1, "model": "\\u0061", "z": 1}', b'{"\\"}": 1, "model": "b/c", "z": 1}'),
    ],
)
def test_another_model_in_the_same_body(body: bytes, renamed: bytes) -> None:
    assert with_model(body, "b/c") == renamed


def test_another_model_where_a_key_comes_twice() -> None:
    for body in (b'{"model": "a", "model": "a"}', b'{"x": 1, "model": "z", "x": [2], "model": "a"}'):
        expected = {**json.loads(body), "model": "b"}
        assert json.loads(with_model(body, "b")) == expected


@given(
    st.dictionaries(TEXT, st.recursive(st.none() | TEXT, st.lists), max_size=4),
    st.integers(0, 4),
    st.booleans(),
    TEXT.filter(bool),
)
def test_any_body_with_another_model_is_otherwise_the_same(
    others: dict[str, Any], position: int, is_ascii: bool, name: str
) -> None:
    items = [(key, value) for key, value in others.items() if key != "model"]
    items.insert(position, ("model", "old"))
    body = json.dumps(dict(items), ensure_ascii=is_ascii, indent=position or None).encode()
    renamed = with_model(body, name)
    assert json.loads(renamed) == {**json.loads(body), "model": name}
    assert len(renamed) - len(body) == len(msgspec.json.encode(name)) - len(b'"old"')
