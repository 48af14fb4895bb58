"""Parsing chat completion requests: every field, its limits, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.conversation import (
    ImagePart,
    Limits,
    Reasoning,
    Request,
    ResponseFormat,
    Sampling,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolChoice,
    ToolDefinition,
    ToolResultPart,
    Turn,
)
from cortex_core.dialects import openai_chat
from cortex_core.errors import ApiError

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "get_time"}}
PIXEL = "iVBORw0KGgo="


def parse(**fields: Any) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return openai_chat.parse(json.dumps(body).encode())


def turns(*messages: dict[str, Any]) -> tuple[Turn, ...]:
    return parse(messages=list(messages)).turns


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param), "the message names the field"
    return caught.value


def test_a_plain_request() -> None:
    assert parse() == Request(model="m", turns=(Turn("user", (TextPart("hi"),)),))


# Messages


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


# Tools


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


# Constraints, sampling, limits


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}},
            ResponseFormat("json_schema", {"type": "object"}, "n", True),
        ),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, ResponseFormat("json_object", name="n")),
    ],
)
def test_response_format(response_format: Any, expected: ResponseFormat | None) -> None:
    assert parse(response_format=response_format).response_format == expected


def test_guided_json_is_the_older_way_to_ask_for_a_schema() -> None:
    assert parse(guided_json={"type": "object"}).response_format == ResponseFormat("json_schema", {"type": "object"})


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, "response_format.json_schema.schema"),
    ],
)
def test_a_bad_response_format_is_refused(response_format: Any, param: str) -> None:
    assert refused(response_format=response_format).param == param


def test_sampling() -> None:
    assert parse(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.1,
        logit_bias={"15496": -100, "7": 1.5},
        seed=-3,
    ).sampling == Sampling(0.0, 0.5, 40, 0.05, -2.0, 2.0, 1.1, {15496: -100.0, 7: 1.5}, -3)
    unset = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "logit_bias", "seed", "presence_penalty"))
    assert parse(**unset).sampling == Sampling()
    assert parse(top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", 2.01, "at most 2"),
        ("temperature", -0.1, "at least 0"),
        ("top_p", 1.01, "at most 1"),
        ("top_p", -1, "at least 0"),
        ("min_p", 1.5, "at most 1"),
        ("presence_penalty", 2.5, "at most 2"),
        ("presence_penalty", -2.5, "at least -2"),
        ("frequency_penalty", 3, "at most 2"),
        ("repetition_penalty", 0, "greater than 0"),
        ("top_k", -2, "at least -1"),
        ("max_tokens", 0, "at least 1"),
        ("max_completion_tokens", -5, "at least 1"),
        ("n", 0, "at least 1"),
        ("n", 129, "at most 128"),
        ("seed", 2**64, "at most"),
        ("stop", ["x"] * 65, "at most 64"),
    ],
)
def test_what_is_out_of_range_is_refused_with_field_and_limit(field: str, value: Any, limit: str) -> None:
    error = refused(**{field: value})
    assert error.param == field
    assert error.code == "invalid_value"
    assert limit in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "warm"),
        ("temperature", True),
        ("top_k", 1.5),
        ("max_tokens", "100"),
        ("n", [1]),
        ("seed", {}),
        ("logit_bias", []),
        ("stream", 1),
        ("stream_options", True),
        ("stop", 3),
        ("logprobs", 1),
        ("top_logprobs", True),
        ("parallel_tool_calls", "yes"),
        ("chat_template_kwargs", []),
        ("enable_thinking", "yes"),
        ("ignore_eos", 0),
        ("reasoning_effort", 3),
        ("thinking", "on"),
    ],
)
def test_a_wrong_type_is_refused_with_the_field(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert error.param == field
    assert error.code == "invalid_type"


@pytest.mark.parametrize(
    ("logit_bias", "param"),
    [
        ({"a": 1}, "logit_bias.a"),
        ({"-1": 1}, "logit_bias.-1"),
        ({"٣": 1}, "logit_bias.٣"),
        ({"99999999999": 1}, "logit_bias.99999999999"),
        ({"1": 101}, "logit_bias.1"),
        ({"1": None}, "logit_bias.1"),
        ({"1": "x"}, "logit_bias.1"),
    ],
)
def test_a_bad_logit_bias_is_refused(logit_bias: Any, param: str) -> None:
    assert refused(logit_bias=logit_bias).param == param


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
    ("stop", "expected"),
    [(None, ()), ("END", ("END",)), (["a", "b", "a"], ("a", "b")), ([], ()), ([str(i) for i in range(20)],) * 2],
)
def test_stop(stop: Any, expected: Any) -> None:
    assert parse(stop=stop).limits.stop == tuple(expected)


@pytest.mark.parametrize(("stop", "param"), [("", "stop[0]"), (["a", ""], "stop[1]"), (["a", 3], "stop[1]")])
def test_a_bad_stop_is_refused(stop: Any, param: str) -> None:
    assert refused(stop=stop).param == param


def test_n_and_ignore_eos() -> None:
    assert parse(n=3).num_choices == 3
    assert parse(n=None).num_choices == 1
    assert parse(ignore_eos=True).limits.ignore_eos is True


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


def test_stream_options() -> None:
    assert parse(stream=True).include_usage is False
    asked = parse(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert (asked.stream, asked.include_usage) == (True, True)


# Reasoning


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({}, Reasoning()),
        ({"reasoning_effort": "none"}, Reasoning("off")),
        ({"reasoning_effort": "high"}, Reasoning("on", "high")),
        ({"reasoning_effort": "xhigh"}, Reasoning("on", "xhigh")),
        ({"thinking": {"type": "disabled"}}, Reasoning("off")),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, Reasoning("on", budget_tokens=2048)),
        ({"enable_thinking": False}, Reasoning("off")),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, Reasoning("on")),
        ({"reasoning_effort": "low", "enable_thinking": False}, Reasoning("off", "low")),
        ({"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True}, Reasoning("off")),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, Reasoning("on")),
    ],
)
def test_reasoning(fields: dict[str, Any], reasoning: Reasoning) -> None:
    assert parse(**fields).reasoning == reasoning


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"thinking": {}}, "thinking.type"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
    ],
)
def test_bad_reasoning_is_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_template_kwargs_are_handed_on_whole() -> None:
    kwargs = {"enable_thinking": False, "date": "today", "nested": {"a": [1]}}
    assert parse(chat_template_kwargs=kwargs).template_kwargs == kwargs


def test_a_final_assistant_message_is_history_unless_it_is_to_be_continued() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer"}]
    assert parse(messages=messages).continue_final_turn is False
    assert parse(messages=messages, continue_final_message=True).continue_final_turn is True
    assert refused(messages=messages[:1], continue_final_message=True).param == "continue_final_message"


# Refused and ignored


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")


def test_unknown_fields_are_ignored() -> None:
    assert parse(wibble={"deep": [1]}, client_metadata="x", safeguards=7, modalities=["text"]) == parse()
