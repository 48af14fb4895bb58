"""Messages and their blocks become turns, in the shapes that real clients send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.conversation import ImagePart, TextPart, ThinkingPart, ToolCallPart, ToolResultPart, Turn
from cortex_core.dialects import openai_chat

from tests.cortex_core.dialects.anthropic_messages.harness import WEATHER, parse, refused, user


def turns(*messages: dict[str, Any]) -> tuple[Turn, ...]:
    return parse(messages=list(messages)).turns


def test_a_system_message_among_the_messages_stays_in_place() -> None:
    assert turns(
        {"role": "user", "content": "a"},
        {"role": "system", "content": [{"type": "text", "text": "b"}], "output_config": {"effort": "low"}},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ) == (
        Turn("user", (TextPart("a"),)),
        Turn("system", (TextPart("b"),)),
        Turn("assistant", (TextPart("c"),)),
        Turn("user", (TextPart("d"),)),
    )


def test_a_system_message_with_settings_alone_says_nothing() -> None:
    assert turns({"role": "user", "content": "a"}, {"role": "system", "output_config": {"effort": "low"}}) == (
        Turn("user", (TextPart("a"),)),
    )


def test_a_system_message_that_is_cleared_by_the_next_user_message_goes_then() -> None:
    note = {"role": "system", "content": "note", "clear_at": "next_user_message"}
    before = turns({"role": "user", "content": "a"}, note)
    assert [turn.role for turn in before] == ["user", "system"]
    after = turns({"role": "user", "content": "a"}, note, {"role": "user", "content": "b"})
    assert [turn.role for turn in after] == ["user", "user"]
    assert (
        len(turns({"role": "user", "content": "a"}, {**note, "clear_at": "never"}, {"role": "user", "content": "b"}))
        == 3
    )


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_string_content_and_a_single_text_block_are_equal(role: str) -> None:
    block = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "citations": None}
    user = {"role": "user", "content": "q"}
    assert turns(user, {"role": role, "content": [block]}) == turns(user, {"role": role, "content": "hi"})


def test_cache_control_leaves_no_trace() -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "r"}]}
    call = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {}}
    plain = parse(
        system=[{"type": "text", "text": "s"}],
        tools=[WEATHER],
        messages=[{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}],
    )
    marked = parse(
        **mark,
        system=[{"type": "text", "text": "s", **mark}],
        tools=[{**WEATHER, **mark}],
        messages=[
            {"role": "assistant", "content": [{**call, **mark}]},
            {"role": "user", "content": [{**result, "content": [{"type": "text", "text": "r", **mark}], **mark}]},
        ],
    )
    assert marked == plain


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (
            {"type": "base64", "media_type": "image/png", "data": "AAAA"},
            ImagePart(data="AAAA", media_type="image/png"),
        ),
        ({"type": "url", "url": "https://x.test/a.png"}, ImagePart(url="https://x.test/a.png")),
    ],
)
def test_images(source: Any, part: ImagePart) -> None:
    (turn,) = turns({"role": "user", "content": [{"type": "image", "source": source}]})
    assert turn.parts == (part,)


def test_tool_use_and_tool_results() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert turns(
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "wait"},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Köln", "n": 10**30}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and then"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [image], "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_9"},
            ],
        },
    )[1:] == (
        Turn(
            "assistant",
            (
                ThinkingPart("hm", "c2ln"),
                TextPart("wait"),
                ToolCallPart("toolu_1", "get_weather", '{"city": "Köln", "n": 1000000000000000000000000000000}'),
            ),
        ),
        Turn("tool", (ToolResultPart("toolu_1", (TextPart("sunny"),), name="get_weather"),)),
        Turn(
            "tool",
            (
                ToolResultPart(
                    "toolu_1", (ImagePart(data="AAAA", media_type="image/png"),), is_error=True, name="get_weather"
                ),
            ),
        ),
        Turn("tool", (ToolResultPart("toolu_9"),)),
        Turn("user", (TextPart("and then"),)),
    )


def test_both_dialects_say_the_same_conversation_in_the_same_turns() -> None:
    messages = parse(
        system="s",
        messages=[
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"a": 1}}],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "r"},
                    {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "r2"}]},
                ],
            },
        ],
    )
    call = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": '{"a": 1}'}}
    chat = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": "r"},
            {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "r2"}]},
        ],
    }
    assert messages.turns == openai_chat.parse(json.dumps(chat).encode()).turns


def test_a_tool_reference_shows_the_name_of_the_tool() -> None:
    references = [{"type": "tool_reference", "tool_name": name} for name in ("Read", "Edit")]
    (turn,) = turns({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": references}]})
    assert turn.parts == (ToolResultPart("t", (TextPart("Read\n"), TextPart("Edit\n"))),)


def test_traces_of_server_tools_are_passed_over() -> None:
    traces = [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "text", "text": "found"},
    ]
    assert turns({"role": "user", "content": "q"}, {"role": "assistant", "content": traces})[1].parts == (
        TextPart("found"),
    )


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ([{"type": "document", "source": {"type": "text", "data": "x"}}], "messages[0].content[0].type"),
        ([{"type": "search_result"}], "messages[0].content[0].type"),
        (
            [{"type": "text", "text": "x"}, {"type": "image", "source": {"type": "file", "file_id": "f"}}],
            "messages[0].content[1].source.type",
        ),
        (
            [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document"}]}],
            "messages[0].content[0].content[0].type",
        ),
    ],
)
def test_content_that_cannot_be_read_is_refused_by_name(content: Any, param: str) -> None:
    error = refused(messages=[{"role": "user", "content": content}])
    assert (error.param, error.code) == (param, "unsupported_parameter")


def assistant(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": list(blocks)}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ({}, "messages"),
        ([1], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "system", "content": "only"}, {"role": "x", "content": ""}], "messages[1].role"),
        ([{"role": "system", "output_config": {}}], "messages"),
        (user("x"), "messages[0].content[0]"),
        (user({}), "messages[0].content[0].type"),
        (user({"type": "hologram"}), "messages[0].content[0].type"),
        (user({"type": "text"}), "messages[0].content[0].text"),
        (user({"type": "text", "text": []}), "messages[0].content[0].text"),
        (user({"type": "tool_use", "id": "a", "name": "b", "input": {}}), "messages[0].content[0].type"),
        (user({"type": "thinking", "thinking": "a"}), "messages[0].content[0].type"),
        (user({"type": "image"}), "messages[0].content[0].source"),
        (user({"type": "image", "source": {"type": "magic"}}), "messages[0].content[0].source.type"),
        (
            user({"type": "image", "source": {"type": "base64", "media_type": "image/bmp", "data": "A"}}),
            "messages[0].content[0].source.media_type",
        ),
        (
            user({"type": "image", "source": {"type": "base64", "media_type": "image/png"}}),
            "messages[0].content[0].source.data",
        ),
        (user({"type": "image", "source": {"type": "url", "url": "file:///x"}}), "messages[0].content[0].source.url"),
        (user({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
        (
            user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "x"}]}),
            "messages[0].content[0].content[0].type",
        ),
        (user({"type": "tool_result", "tool_use_id": "t", "content": {}}), "messages[0].content[0].content"),
        (assistant({"type": "image"}), "messages[0].content[0].type"),
        (assistant({"type": "tool_use", "name": "b", "input": {}}), "messages[0].content[0].id"),
        (assistant({"type": "tool_use", "id": "a", "name": "b", "input": "{}"}), "messages[0].content[0].input"),
        (assistant({"type": "thinking"}), "messages[0].content[0].thinking"),
    ],
)
def test_bad_messages_are_refused_with_their_path(messages: Any, param: str) -> None:
    assert refused(messages=messages).param == param


def test_the_wording_for_no_messages() -> None:
    assert refused(messages=[]).message == "messages: at least one message is required"


@pytest.mark.parametrize(
    ("last", "is_prefilled"),
    [
        ({"role": "assistant", "content": "The answer is"}, True),
        ({"role": "assistant", "content": ""}, True),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}, False),
        ({"role": "user", "content": "more"}, False),
    ],
)
def test_a_last_assistant_turn_is_continued(last: dict[str, Any], is_prefilled: bool) -> None:
    request = parse(messages=[{"role": "user", "content": "q"}, last])
    assert request.continue_final_turn is is_prefilled


def test_consecutive_turns_of_one_role_are_tolerated() -> None:
    message = {"role": "user", "content": "a"}
    assert turns(message, message) == (Turn("user", (TextPart("a"),)),) * 2


def test_tools_defined_in_the_conversation_are_offered() -> None:
    addition = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": WEATHER}}
    reference = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "x"}}
    removal = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "x"}}
    request = parse(
        messages=[{"role": "user", "content": "a"}, {"role": "system", "content": [addition, reference, removal]}],
        tool_choice={"type": "tool", "name": "get_weather"},
    )
    assert [tool.name for tool in request.tools] == ["get_weather"]
