"""Fields of messages requests: the system prompt, limits, tools, thinking, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.conversation import (
    Limits,
    Reasoning,
    Request,
    ResponseFormat,
    Sampling,
    TextPart,
    ToolChoice,
    ToolDefinition,
    Turn,
)
from cortex_core.dialects import anthropic_messages

from tests.cortex_core.dialects.anthropic_messages.harness import WEATHER, parse, refused

ATTRIBUTION = "x-anthropic-billing-header: cc_version=2.1.329.f09; cc_entrypoint=cli;"


def test_a_plain_request() -> None:
    assert parse() == Request(
        model="m",
        turns=(Turn("user", (TextPart("hi"),)),),
        limits=Limits(4096),
        reasoning=Reasoning("off", visible=False),
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
