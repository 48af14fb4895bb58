"""Parsing messages requests, in the shapes that real clients send."""

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
from cortex_core.dialects import anthropic_messages, openai_chat
from cortex_core.errors import ApiError

WEATHER = {"name": "get_weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}
ATTRIBUTION = "x-anthropic-billing-header: cc_version=2.1.329.f09; cc_entrypoint=cli;"


def parse(**fields: Any) -> Request:
    body = {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}], **fields}
    return anthropic_messages.parse(json.dumps(body).encode())


def turns(*messages: dict[str, Any]) -> tuple[Turn, ...]:
    return parse(messages=list(messages)).turns


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param), "the envelope has no param: the message names it"
    return caught.value


def test_a_plain_request() -> None:
    assert parse() == Request(
        model="m",
        turns=(Turn("user", (TextPart("hi"),)),),
        limits=Limits(4096),
        reasoning=Reasoning("off", visible=False),
    )


# Roles and system prompts


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


def test_the_system_prompt_comes_first_its_blocks_joined() -> None:
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert parse(system=blocks).turns[0] == Turn("system", (TextPart("a\nb"),))
    assert parse(system="a").turns[0] == parse(system=[{"type": "text", "text": "a"}]).turns[0]


@pytest.mark.parametrize("system", [None, "", [], [{"type": "text", "text": ""}]])
def test_an_empty_system_prompt_is_no_turn(system: Any) -> None:
    assert parse(system=system).turns == parse().turns


@pytest.mark.parametrize(
    ("system", "rest"),
    [
        ([{"type": "text", "text": ATTRIBUTION}, {"type": "text", "text": "You are"}], "You are"),
        ([{"type": "text", "text": ATTRIBUTION}], None),
        (ATTRIBUTION, None),
        (f"{ATTRIBUTION}\nYou are", "You are"),
        ([{"type": "text", "text": "You are"}, {"type": "text", "text": ATTRIBUTION}], f"You are\n{ATTRIBUTION}"),
    ],
)
def test_the_attribution_line_is_dropped_from_the_head_alone(system: Any, rest: str | None) -> None:
    head = parse(system=system).turns[0]
    assert head == (Turn("user", (TextPart("hi"),)) if rest is None else Turn("system", (TextPart(rest),)))


def test_what_the_filter_took_is_said() -> None:
    assert parse(system=ATTRIBUTION).dropped == (anthropic_messages.ATTRIBUTION_FILTER,)
    assert parse(system="You are").dropped == parse().dropped == ()
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]})
    body = body[:-1] + f', "system": {json.dumps(ATTRIBUTION)}}}'
    for wanted, dialect in (
        ((), anthropic_messages.MessagesDialect(drops_attribution=False)),
        ((anthropic_messages.ATTRIBUTION_FILTER,), anthropic_messages.MessagesDialect()),
    ):
        asked = dialect.parse(body.encode())
        assert asked.dropped == wanted
        assert dialect.parse_count_tokens(body.encode()).turns == asked.turns


def test_errors_of_the_engine_speak_of_this_dialects_fields() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    asked = parse(tools=[search, WEATHER], output_config={"format": {"type": "json_schema", "schema": {}}})
    assert asked.client_param("tools[0].function.parameters") == "tools[1].input_schema"
    assert asked.client_param("response_format.json_schema.schema") == "output_config.format.schema"
    older = parse(output_format={"type": "json_schema", "schema": {}})
    assert older.client_param("response_format.json_schema.schema") == "output_format.schema"
    assert asked.client_param("messages") == "messages"


def test_the_attribution_line_can_be_kept() -> None:
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}], "system": ATTRIBUTION}
    kept = anthropic_messages.parse(json.dumps(body).encode(), drops_attribution=False)
    assert kept.turns[0] == Turn("system", (TextPart(ATTRIBUTION),))


# Content blocks


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


def user(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


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


# Prefill, limits, sampling


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


@pytest.mark.parametrize(("max_tokens", "limit"), [(1, 1), (0, 1), (128_000, 128_000), (10**20, 2**31 - 1)])
def test_max_tokens(max_tokens: int, limit: int) -> None:
    assert parse(max_tokens=max_tokens).limits.max_tokens == limit


@pytest.mark.parametrize("max_tokens", [None, -1, "5", 1.5, True])
def test_max_tokens_is_required(max_tokens: Any) -> None:
    assert refused(max_tokens=max_tokens).param == "max_tokens"


def test_sampling_and_stop_sequences() -> None:
    request = parse(temperature=1, top_p=0.9, top_k=5, stop_sequences=["\n\n", "END"])
    assert request.sampling == Sampling(1.0, 0.9, 5)
    assert request.limits.stop == ("\n\n", "END")


@pytest.mark.parametrize(
    ("fields", "param", "limit"),
    [
        ({"temperature": 1.1}, "temperature", "at most 1"),
        ({"temperature": -0.1}, "temperature", "at least 0"),
        ({"top_p": 2}, "top_p", "at most 1"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"stop_sequences": "END"}, "stop_sequences", "an array"),
        ({"stop_sequences": [1]}, "stop_sequences[0]", "a string"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "empty"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences", "at most 64"),
        ({"stream": "yes"}, "stream", "a boolean"),
        ({"model": ""}, "model", "empty"),
        ({"system": 5}, "system", "a string"),
        ({"system": [{"type": "image"}]}, "system[0].type", "text"),
    ],
)
def test_bad_fields_are_refused_with_field_and_limit(fields: dict[str, Any], param: str, limit: str) -> None:
    error = refused(**fields)
    assert error.param == param
    assert limit in error.message


# Tools


def test_tool_definitions() -> None:
    custom = {**WEATHER, "type": "custom", "strict": True, "eager_input_streaming": True}
    assert parse(tools=[WEATHER, custom]).tools == (
        ToolDefinition("get_weather", "d", {"type": "object", "properties": {}}),
        ToolDefinition("get_weather", "d", {"type": "object", "properties": {}}, True),
    )


def test_server_tools_and_the_deferred_placeholder_are_passed_over() -> None:
    tools = [
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
        {"name": "DeferredToolPlaceholder", "input_schema": {}, "defer_loading": True},
        {**WEATHER, "defer_loading": True},
    ]
    assert [tool.name for tool in parse(tools=tools).tools] == ["get_weather"]


def test_tools_defined_in_the_conversation_are_offered() -> None:
    addition = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": WEATHER}}
    reference = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "x"}}
    removal = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "x"}}
    request = parse(
        messages=[{"role": "user", "content": "a"}, {"role": "system", "content": [addition, reference, removal]}],
        tool_choice={"type": "tool", "name": "get_weather"},
    )
    assert [tool.name for tool in request.tools] == ["get_weather"]


@pytest.mark.parametrize(
    ("tool_choice", "expected", "is_parallel"),
    [
        (None, ToolChoice(), True),
        ({"type": "auto"}, ToolChoice("auto"), True),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice("auto"), False),
        ({"type": "any"}, ToolChoice("required"), True),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required"), False),
        ({"type": "tool", "name": "get_weather"}, ToolChoice("named", "get_weather"), True),
        ({"type": "none"}, ToolChoice("none"), True),
    ],
)
def test_tool_choice(tool_choice: Any, expected: ToolChoice, is_parallel: bool) -> None:
    request = parse(tools=[WEATHER], tool_choice=tool_choice)
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, is_parallel)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "some"}, "tools": [WEATHER]}, "tool_choice.type"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "x", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": {}}, "tools"),
    ],
)
def test_bad_tools_are_refused_with_their_path(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


# Thinking and output


@pytest.mark.parametrize(
    ("thinking", "reasoning"),
    [
        (None, Reasoning("off", visible=False)),
        ({"type": "disabled"}, Reasoning("off", visible=False)),
        ({"type": "between_tools"}, Reasoning("off", visible=False)),
        ({"type": "enabled", "budget_tokens": 2048}, Reasoning("on", budget_tokens=2048)),
        (
            {"type": "enabled", "budget_tokens": 2048, "display": "omitted"},
            Reasoning("on", budget_tokens=2048, omit_text=True),
        ),
        ({"type": "adaptive"}, Reasoning("on")),
        ({"type": "adaptive", "display": "summarized"}, Reasoning("on")),
        ({"type": "adaptive", "display": "updates"}, Reasoning("on")),
        ({"type": "adaptive", "display": "omitted"}, Reasoning("on", omit_text=True)),
    ],
)
def test_thinking(thinking: Any, reasoning: Reasoning) -> None:
    assert parse(thinking=thinking).reasoning == reasoning


@pytest.mark.parametrize(
    ("thinking", "param"),
    [
        ("on", "thinking"),
        ({}, "thinking.type"),
        ({"type": "deep"}, "thinking.type"),
        ({"type": "enabled"}, "thinking.budget_tokens"),
        ({"type": "enabled", "budget_tokens": 1023}, "thinking.budget_tokens"),
        ({"type": "enabled", "budget_tokens": 4096}, "max_tokens"),
        ({"type": "adaptive", "display": "loud"}, "thinking.display"),
    ],
)
def test_bad_thinking_is_refused(thinking: Any, param: str) -> None:
    assert refused(thinking=thinking).param == param


def test_effort_goes_with_any_thinking() -> None:
    assert parse(output_config={"effort": "max"}).reasoning == Reasoning("off", "max", visible=False)
    assert parse(output_config={"effort": "low"}, thinking={"type": "adaptive"}).reasoning == Reasoning("on", "low")
    assert refused(output_config={"effort": "some"}).param == "output_config.effort"


def test_output_format_in_both_places() -> None:
    schema_format = {"type": "json_schema", "schema": {"type": "object"}}
    expected = ResponseFormat("json_schema", {"type": "object"}, strict=True)
    assert parse(output_config={"format": schema_format}).response_format == expected
    assert parse(output_format=schema_format).response_format == expected
    assert parse(output_config={"format": None}).response_format is None
    assert refused(output_config={"format": {"type": "xml"}}).param == "output_config.format.type"
    assert refused(output_format={"type": "json_schema"}).param == "output_format.schema"
    assert refused(output_format={"type": "json_schema", "schema": "x"}).param == "output_format.schema"


# Counting, unknown fields, a real body


def test_count_tokens_renders_what_messages_renders() -> None:
    body: dict[str, Any] = {
        "model": "m",
        "system": [{"type": "text", "text": ATTRIBUTION}, {"type": "text", "text": "s"}],
        "tools": [WEATHER],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "messages": [{"role": "user", "content": "hi"}],
    }
    counted = anthropic_messages.parse_count_tokens(json.dumps(body).encode())
    billed = anthropic_messages.parse(json.dumps({**body, "max_tokens": 2000}).encode())
    assert counted.limits.max_tokens is None
    assert (counted.turns, counted.tools, counted.reasoning) == (billed.turns, billed.tools, billed.reasoning)


def test_count_tokens_body() -> None:
    assert json.loads(anthropic_messages.count_tokens_body(42)) == {"input_tokens": 42}


def test_what_claude_code_sends_is_understood() -> None:
    request = parse(
        stream=True,
        max_tokens=128_000,
        system=[
            {"type": "text", "text": ATTRIBUTION},
            {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "\nBe brief.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "<reminder/>"}, {"type": "text", "text": "hi"}]},
            {"role": "system", "content": [{"type": "text", "text": "# MCP"}], "output_config": {"effort": "high"}},
        ],
        tools=[{**WEATHER, "input_schema": {"$schema": "x", "type": "object"}, "allowed_callers": ["direct"]}],
        thinking={"type": "adaptive", "display": "updates"},
        output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": '{"session_id":"x"}'},
        safeguards={"a": 1},
        diagnostics={"previous_message_id": None},
    )
    assert [turn.role for turn in request.turns] == ["system", "user", "system"]
    assert request.turns[0].text() == "You are Claude Code.\n\nBe brief."
    assert request.limits.max_tokens == 128_000
    assert request.reasoning == Reasoning("on", "high")
    assert request.stream is True
