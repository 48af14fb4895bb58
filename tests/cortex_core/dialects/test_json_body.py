"""Bodies that are no request: each is a typed error, whatever the bytes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions
from cortex_core.dialects.json_body import Fields, decode_object, decode_struct
from cortex_core.dialects.limits import MAX_DEPTH
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cortex_core.dialects.rich_bodies import RICH_CHAT, RICH_MESSAGES

PARSERS = [
    openai_chat.parse,
    openai_completions.parse,
    anthropic_messages.parse,
    anthropic_messages.parse_count_tokens,
]

KEYS = (
    *openai_chat.MAPPED,
    *openai_chat.REFUSED,
    *openai_completions.MAPPED,
    *anthropic_messages.MAPPED,
    "role",
    "content",
    "type",
    "text",
    "name",
    "id",
    "function",
    "arguments",
    "parameters",
    "input",
    "input_schema",
    "tool_calls",
    "tool_call_id",
    "tool_use_id",
    "image_url",
    "url",
    "source",
    "data",
    "media_type",
    "json_schema",
    "schema",
    "allowed_tools",
    "mode",
    "format",
    "effort",
    "budget_tokens",
    "display",
    "tool",
    "definition",
    "clear_at",
    "detail",
    "1",
)
WORDS = (
    *openai_chat.request.ROLES,
    "text",
    "image_url",
    "image",
    "thinking",
    "tool_use",
    "tool_result",
    "function",
    "allowed_tools",
    "auto",
    "any",
    "required",
    "json_schema",
    "json_object",
    "enabled",
    "adaptive",
    "base64",
    "tool_addition",
    "tool_definition",
    "document",
    "custom",
    "x-anthropic-billing-header: a",
    "data:image/png;base64,AAAA",
    "https://x.test",
    "",
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.integers(-2, 5000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=6)
)
objects = st.recursive(
    scalars,
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), children, max_size=6)
    ),
    max_leaves=25,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(openai_chat.request.ROLES)},
        optional={
            "content": objects
            | st.lists(st.fixed_dictionaries({"type": st.sampled_from(WORDS)}, optional={"text": objects}), max_size=3),
            "tool_calls": objects,
            "tool_call_id": scalars,
            "reasoning_content": scalars,
        },
    ),
    max_size=3,
)
changes = st.dictionaries(st.sampled_from(KEYS), objects, max_size=3) | st.fixed_dictionaries({"messages": messages})


def outcome(parse: Any, body: bytes) -> Request | ApiError:
    try:
        result: Request = parse(body)
    except ApiError as error:
        assert error.status == 400
        assert error.message
        return error
    assert isinstance(result, Request)
    assert bool(result.turns) != bool(result.prompts)
    hash(result.turns)
    return result


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf{}")
@example(b'{"model": "\xff"}')
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"model":' + b"[" * 600 + b"]" * 600 + b"}")
@example(b'{"model":"m","max_tokens":' + b"9" * 5000 + b"}")
@example(b'{"model":"m","temperature":1e999}')
@example(b'{"model":"m","prompt":"\\ud800"}')
@example(b'{"model":"m","prompt":"x","temperature":NaN}')
@example(b'{"model":"m","prompt":"\x00"}')
def test_any_bytes_are_a_request_or_a_typed_error(body: bytes) -> None:
    for parse in PARSERS:
        outcome(parse, body)


@given(objects)
def test_any_json_is_a_request_or_a_typed_error(value: Any) -> None:
    for parse in PARSERS:
        outcome(parse, json.dumps(value).encode())


@given(changes)
def test_anything_that_is_almost_a_request_is_a_request_or_a_typed_error(fields: dict[str, Any]) -> None:
    base = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "max_tokens": 5}
    for parse in PARSERS:
        result = outcome(parse, json.dumps({**base, **fields}).encode())
        if isinstance(result, ApiError):
            assert result.param or result.code == "invalid_json", "the error names the field"


@given(st.data())
def test_a_wrong_type_anywhere_is_a_request_or_a_typed_error(data: st.DataObject) -> None:
    """One value of a rich valid body, at any depth, is replaced by something of any type."""
    parse, body = data.draw(
        st.sampled_from([(openai_chat.parse, RICH_CHAT), (anthropic_messages.parse, RICH_MESSAGES)])
    )
    copy = json.loads(json.dumps(body))
    node, key = copy, data.draw(st.sampled_from(sorted(copy)))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(objects)
    outcome(parse, json.dumps(copy).encode())


def test_the_rich_bodies_are_valid() -> None:
    assert openai_chat.parse(json.dumps(RICH_CHAT).encode()).tools
    assert anthropic_messages.parse(json.dumps(RICH_MESSAGES).encode()).tools


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"null", b"true", b"1.5"])
def test_a_body_that_is_no_object_is_named_so(parse: Any, body: bytes) -> None:
    with pytest.raises(ApiError, match="must be a JSON object") as caught:
        parse(body)
    assert caught.value.code == "invalid_type"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "trailing"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": 1e999}', "out of range"),
        (b"a=1&b=2", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\\ud83d"}', "lone surrogate"),
        (b'{"a": "\\udc00x"}', "lone surrogate"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper than 128"),
    ],
)
def test_malformed_bodies_say_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        decode_object(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def nested(depth: int) -> bytes:
    """An object whose deepest container is at `depth`."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_depth_is_bounded_exactly() -> None:
    assert decode_object(nested(MAX_DEPTH)).has("a")
    with pytest.raises(ApiError, match="nested deeper"):
        decode_object(nested(MAX_DEPTH + 1))


def test_a_repeated_key_takes_its_last_value() -> None:
    assert decode_object(b'{"a": 1, "a": 2}').values == {"a": 2}


def test_huge_integers_survive_where_any_json_is_allowed() -> None:
    call = b'{"type":"tool_use","id":"t","name":"f","input":{"n":%s}}'
    body = b'{"model":"m","max_tokens":1,"messages":[{"role":"assistant","content":[' + call + b"]}]}"
    request = anthropic_messages.parse(body % (b"9" * 400))
    assert request.turns[0].parts[0].arguments == '{"n": %s}' % ("9" * 400)  # type: ignore[union-attr]


def test_a_value_in_an_error_message_is_cut_short() -> None:
    with pytest.raises(ApiError) as caught:
        Fields({"role": "x" * 10_000}).choice("role", ("user",))
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("value", "described"),
    [(None, "null"), (True, "a boolean"), (1, "an integer"), (1.5, "a number"), ("x", "a string"), ([], "an array")],
)
def test_errors_name_the_json_type_found(value: Any, described: str) -> None:
    with pytest.raises(ApiError, match=f"expected an object, got {described}"):
        Fields.of(value, "a")


def test_a_struct_takes_whole_numbers_however_they_are_written() -> None:
    spec = decode_struct(
        b'{"model_id": "a/b", "tensor_parallel": 2.0, "devices": [0, 1.0], "debug": {"x": [3.0]}}', ModelSpec
    )
    assert (spec.tensor_parallel, spec.devices, spec.debug) == (2, (0, 1), {"x": [3]})
    for body in (
        b'{"model_id": "a/b", "tensor_parallel": 2.5}',
        b'{"model_id": 7}',
        b"[]",
        b"{",
        b'{"model_id": "\xff"}',
    ):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
            decode_struct(body, ModelSpec)
