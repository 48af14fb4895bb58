"""The internal request in its own words, and errors in those of the client."""

from __future__ import annotations

import pytest
from cortex_core.conversation import (
    ImagePart,
    Part,
    Request,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    Turn,
)
from cortex_core.errors import ApiError, invalid
from msgspec import msgpack

RENAMED = Request("m", param_names={"messages": "input", "tools[0].function.parameters": "tools[1].format"})


def test_the_text_of_a_turn_is_its_text_parts_alone() -> None:
    turn = Turn("assistant", (ThinkingPart("hm"), TextPart("a"), ToolCallPart("1", "f", "{}"), TextPart("b")))
    assert turn.text() == "ab"
    assert Turn("user", (ImagePart(url="http://x"),)).text() == ""


@pytest.mark.parametrize(
    ("param", "said"),
    [
        ("messages", "input"),
        ("tools[0].function.parameters", "tools[1].format"),
        ("messages[0]", "messages[0]"),
        ("temperature", "temperature"),
        (None, None),
    ],
)
def test_a_field_is_named_as_its_client_wrote_it(param: str | None, said: str | None) -> None:
    assert RENAMED.client_param(param) == said


def test_errors_raised_in_our_words_leave_in_the_clients() -> None:
    with pytest.raises(ApiError) as caught, RENAMED.own_words():
        raise invalid("no", param="messages")
    assert caught.value.param == "input"
    with pytest.raises(ApiError) as caught, RENAMED.own_words():
        raise ApiError("overloaded", "not now")
    assert caught.value.param is None


def test_what_is_no_answer_to_the_client_passes_untouched() -> None:
    fault = RuntimeError("messages")
    with pytest.raises(RuntimeError) as caught, RENAMED.own_words():
        raise fault
    assert caught.value is fault


def test_parts_keep_their_kinds_across_a_border() -> None:
    """Requests go to the text workers as bytes; parts have fields in common, and tell themselves apart by tags."""
    parts: tuple[Part, ...] = (
        TextPart("a"),
        ImagePart(data="aGk=", media_type="image/png"),
        ThinkingPart("a", "signature"),
        ToolCallPart("1", "f", "{}"),
        ToolResultPart("1", (TextPart("b"), ImagePart(url="http://x")), True, "f"),
    )
    request = Request("m", turns=(Turn("tool", parts),), template_kwargs={"x": [1, None]})
    assert msgpack.decode(msgpack.encode(request), type=Request) == request
