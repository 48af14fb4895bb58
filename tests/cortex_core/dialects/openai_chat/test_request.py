"""Parsing chat completion requests: messages, tools, and the fields that only chat has."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_core.conversation import (
    ImagePart,
    Limits,
    Request,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolChoice,
    ToolDefinition,
    ToolResultPart,
    Turn,
)

from tests.cortex_core.dialects.openai_chat.harness import parse, refused

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "get_time"}}
PIXEL = "iVBORw0KGgo="


def turns(*messages: dict[str, Any]) -> tuple[Turn, ...]:
    return parse(messages=list(messages)).turns


def test_a_plain_request() -> None:
    assert parse() == Request(model="m", turns=(Turn("user", (TextPart("hi"),)),))


def test_roles_and_their_order_are_kept() -> None:
    assert turns(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "user", "content": "d", "name": "somebody"},
        {"role": "system", "content": "e"},
        {"role": "assistant", "content": "f"},
    ) == tuple(
        Turn(role, (TextPart(text),))  # type: ignore[arg-type]
        for role, text in [
            ("system", "a"),
            ("system", "b"),
            ("user", "c"),
            ("user", "d"),
            ("system", "e"),
            ("assistant", "f"),
        ]
    )


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_N23_all_ways_to_say_nothing_are_equal(role: str, content: Any) -> None:
    (turn,) = turns({"role": role, "content": content})
    assert turn.parts == ()
    assert turns({"role": role}) == (turn,)


def test_a_string_and_a_single_text_part_are_equal() -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {}}
    assert turns({"role": "user", "content": [part]}) == turns({"role": "user", "content": "hi"})


def test_several_parts_stay_apart() -> None:
    (turn,) = turns({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
    assert turn.parts == (TextPart("a"), TextPart("b"))


@pytest.mark.parametrize(
    ("image_url", "part"),
    [
        ({"url": "https://x.test/a.png", "detail": "low"}, ImagePart(url="https://x.test/a.png", detail="low")),
        ({"url": f"data:image/png;base64,{PIXEL}"}, ImagePart(data=PIXEL, media_type="image/png")),
        ({"url": f"data:image/JPEG;q=1;base64,{PIXEL}"}, ImagePart(data=PIXEL, media_type="image/jpeg")),
        ("http://x.test/a.png", ImagePart(url="http://x.test/a.png")),
    ],
)
def test_images(image_url: Any, part: ImagePart) -> None:
    (turn,) = turns({"role": "user", "content": [{"type": "image_url", "image_url": image_url}]})
    assert turn.parts == (part,)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "data:image/png,raw", "data:text/html;base64,AAAA", "data:image/png;base64,", "x"]
)
def test_an_image_that_is_neither_http_nor_base64_is_refused(url: str) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    assert refused(messages=[message]).param == "messages[0].content[0].image_url.url"


def test_tool_calls_and_results() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"a":1}'}}
    assert turns(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "wait", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "a"}]},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
    )[1:] == (
        Turn("assistant", (TextPart("wait"), ToolCallPart("call_1", "get_weather", '{"a":1}'))),
        Turn("tool", (ToolResultPart("call_1", (TextPart("sunny"),), name="get_weather"),)),
        Turn("tool", (ToolResultPart("call_1", (TextPart("a"),), name="get_weather"),)),
        Turn("tool", (ToolResultPart("call_2", ()),)),
    )


@pytest.mark.parametrize("content", [None, "", []])
def test_tool_calls_go_with_any_empty_content(content: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    (turn,) = turns({"role": "assistant", "content": content, "tool_calls": [call]})
    assert turn.parts == (ToolCallPart("c", "f", "{}"),)


@pytest.mark.parametrize("arguments", ['{"a": ', {"a": 1}])
def test_arguments_are_replayed_as_they_came(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (turn,) = turns({"role": "assistant", "tool_calls": [call]})
    text = arguments if isinstance(arguments, str) else '{"a": 1}'
    assert turn.parts == (ToolCallPart("c", "f", text),)


def test_legacy_and_custom_calls_in_the_history() -> None:
    custom = {"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}}
    assert turns(
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "done"},
        {"role": "assistant", "tool_calls": [custom]},
    ) == (
        Turn("assistant", (ToolCallPart("f", "f", "{}"),)),
        Turn("tool", (ToolResultPart("f", (TextPart("done"),), name="f"),)),
        Turn("assistant", (ToolCallPart("c", "sh", '{"input": "ls"}'),)),
    )


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_of_earlier_turns_is_kept(field: str) -> None:
    (turn,) = turns({"role": "assistant", "content": "a", field: "hm"})
    assert turn.parts == (ThinkingPart("hm"), TextPart("a"))


def test_refusals_are_text() -> None:
    assert turns({"role": "assistant", "content": None, "refusal": "no"})[0].parts == (TextPart("no"),)
    parts = [{"type": "refusal", "refusal": "no"}]
    assert turns({"role": "assistant", "content": parts})[0].parts == (TextPart("no"),)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "wizard", "content": "hi"}], "messages[0].role"),
        ([{"role": 1, "content": "hi"}], "messages[0].role"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "hologram"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].image_url"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "file"}]}], "messages[0].content[0].type"),
        ([{"role": "system", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}], "messages[1].tool_call_id"),
        ([{"role": "function", "content": "a"}], "messages[0].name"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a", "function": {}}]}],
            "messages[0].tool_calls[0].function.name",
        ),
        ([{"role": "assistant", "tool_calls": [{"id": "a", "type": "x"}]}], "messages[0].tool_calls[0].type"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "messages[0].tool_calls[0].id"),
    ],
)
def test_bad_messages_are_refused_with_their_path(messages: Any, param: str) -> None:
    assert refused(messages=messages).param == param


def test_the_wording_for_no_messages() -> None:
    assert refused(messages=[]).message == "messages: at least one message is required"


@pytest.mark.parametrize("model", [None, "", 3, ["m"]])
def test_model_is_required(model: Any) -> None:
    assert refused(model=model).param == "model"


def test_tool_definitions() -> None:
    full = {
        "type": "function",
        "function": {
            "name": "a.b-c",
            "description": "d",
            "strict": True,
            "parameters": {"$defs": {"x": {"const": 1}}, "anyOf": [{"$ref": "#/$defs/x"}]},
        },
        "cache_control": {"type": "ephemeral"},
    }
    assert parse(tools=[full, TIME]).tools == (
        ToolDefinition("a.b-c", "d", full["function"]["parameters"], True),  # type: ignore[index]
        ToolDefinition("get_time"),
    )


@pytest.mark.parametrize(
    ("tool_choice", "expected"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "get_time"}}, ToolChoice("named", "get_time")),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TIME]}},
            ToolChoice("auto", allowed=("get_time",)),
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME, WEATHER]}},
            ToolChoice("required", allowed=("get_time", "get_weather")),
        ),
    ],
)
def test_tool_choice(tool_choice: Any, expected: ToolChoice) -> None:
    assert parse(tools=[WEATHER, TIME], tool_choice=tool_choice).tool_choice == expected


@pytest.mark.parametrize("tool_choice", ["auto", "none"])
def test_a_choice_that_forces_nothing_needs_no_tools(tool_choice: str) -> None:
    assert parse(tool_choice=tool_choice).tool_choice.mode == tool_choice


def test_a_custom_tool_is_a_function_of_one_text_to_the_model() -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[0-9]+|x"}}
    tools = [
        {"type": "custom", "custom": {"name": "sh", "description": "A shell"}},
        {"type": "custom", "custom": {"name": "dial", "format": grammar}},
    ]
    shell, dial = parse(tools=tools).tools
    argument = {"type": "string"}
    parameters = {
        "type": "object",
        "properties": {"input": argument},
        "required": ["input"],
        "additionalProperties": False,
    }
    assert shell == ToolDefinition("sh", "A shell", parameters, is_freeform=True)
    assert dial.parameters is not None
    assert dial.parameters["properties"]["input"] == {
        "type": "string",
        "description": "Text that matches this regex grammar:\n[0-9]+|x",
        "pattern": "^(?:[0-9]+|x)$",
    }
    named = {"type": "custom", "custom": {"name": "dial"}}
    assert parse(tools=tools, tool_choice=named).tool_choice == ToolChoice("named", "dial")
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    assert parse(tools=tools, tool_choice=allowed).tool_choice == ToolChoice("required", allowed=("dial",))
    assert parse(tools=tools).client_param("tools[1].function.parameters") == "tools[1].custom.format"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TIME]}, "tool_choice"),
        ({"tool_choice": 1, "tools": [TIME]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TIME]},
            "tool_choice.function.name",
        ),
        ({"tool_choice": {"type": "function"}, "tools": [TIME]}, "tool_choice.function"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}, "tools": [TIME]}, "tool_choice.custom.name"),
        ({"tool_choice": {"type": "web", "web": {"name": "x"}}, "tools": [TIME]}, "tool_choice.type"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "tools": [TIME]},
            "tool_choice.allowed_tools.tools",
        ),
        (
            {
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": [TIME]}},
                "tools": [TIME],
            },
            "tool_choice.allowed_tools.mode",
        ),
        (
            {
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}},
                "tools": [TIME],
            },
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "custom": {"name": "x", "format": {}}}]}, "tools[0].custom.format.type"),
        (
            {"tools": [{"type": "custom", "custom": {"name": "x", "format": {"type": "grammar"}}}]},
            "tools[0].custom.format.grammar",
        ),
        ({"tools": [{"type": "teleport"}]}, "tools[0].type"),
        ({"tools": [{"function": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_bad_tools_are_refused_with_their_path(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_parallel_tool_calls() -> None:
    assert parse().parallel_tool_calls is True
    assert parse(parallel_tool_calls=None).parallel_tool_calls is True
    assert parse(parallel_tool_calls=False).parallel_tool_calls is False


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 7, "max_completion_tokens": None}, 7),
        ({"max_tokens": 128.0}, 128),
        ({"max_tokens": 10**30}, 2**31 - 1),
    ],
)
def test_N24_max_completion_tokens_wins(fields: dict[str, Any], max_tokens: int | None) -> None:
    assert parse(**fields).limits == Limits(max_tokens)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": True, "top_logprobs": None}, 0),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ],
)
def test_logprobs(fields: dict[str, Any], expected: int | None) -> None:
    assert parse(**fields).logprobs == expected


@pytest.mark.parametrize(
    "fields", [{"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}]
)
def test_bad_logprobs_are_refused(fields: dict[str, Any]) -> None:
    assert refused(**fields).param == "top_logprobs"


def test_a_final_assistant_message_is_history_unless_it_is_to_be_continued() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer"}]
    assert parse(messages=messages).continue_final_turn is False
    assert parse(messages=messages, continue_final_message=True).continue_final_turn is True
    assert refused(messages=messages[:1], continue_final_message=True).param == "continue_final_message"


def test_unknown_fields_are_ignored() -> None:
    assert parse(wibble={"deep": [1]}, client_metadata="x", safeguards=7, modalities=["text"]) == parse()
