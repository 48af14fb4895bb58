"""Tools of responses requests are flattened, and chosen by the names that their clients know."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_core.conversation import ToolChoice, ToolDefinition

from tests.cortex_core.dialects.openai_responses.harness import NAMESPACE, SHELL, WEATHER, parse, refused

TIME = {"type": "function", "name": "get_time"}


def test_tools_are_flattened_for_the_model() -> None:
    asked = parse(tools=[WEATHER, NAMESPACE, SHELL, {"type": "web_search"}, {"type": "something_new"}])
    assert [tool.name for tool in asked.tools] == ["get_weather", "mcp__js__eval", "mcp__js__script", "sh"]
    weather, evaluate, script, shell = asked.tools
    assert weather == ToolDefinition("get_weather", None, {"type": "object"}, strict=True)
    assert evaluate == ToolDefinition(
        "mcp__js__eval", "Run code\n\nEvaluate", {"type": "object"}, namespace="mcp__js", member="eval"
    )
    assert script.is_freeform and script.description == "Run code" and script.member == "script"
    assert shell.is_freeform and shell.namespace is None
    paths = [asked.client_param(f"tools[{index}].function.parameters") for index in range(4)]
    assert paths == [
        "tools[0].parameters",
        "tools[1].tools[0].parameters",
        "tools[1].tools[1].format",
        "tools[2].format",
    ]


def test_a_function_in_the_nested_form_of_chat_is_understood() -> None:
    nested = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    assert parse(tools=[nested]).tools == (ToolDefinition("f", "d", {"type": "object"}),)


def test_tools_that_items_bring_along_are_offered_and_replace_their_names() -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "additional_tools", "role": "developer", "tools": [TIME]},
        {"type": "tool_search_output", "call_id": "c", "tools": [{**WEATHER, "strict": False}, NAMESPACE]},
    ]
    asked = parse(input=items, tools=[WEATHER])
    assert [tool.name for tool in asked.tools] == ["get_weather", "get_time", "mcp__js__eval", "mcp__js__script"]
    assert not asked.tools[0].strict
    assert asked.client_param("tools[0].function.parameters") == "input[2].tools[0].parameters"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "get_weather"}, ToolChoice("named", "get_weather")),
        ({"type": "function", "function": {"name": "get_weather"}}, ToolChoice("named", "get_weather")),
        ({"type": "custom", "name": "sh"}, ToolChoice("named", "sh")),
        ({"type": "function", "name": "eval"}, ToolChoice("named", "mcp__js__eval")),
        ({"type": "function", "name": "eval", "namespace": "mcp__js"}, ToolChoice("named", "mcp__js__eval")),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]},
            ToolChoice("auto", allowed=("get_weather",)),
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "custom", "name": "sh"}, {"type": "namespace", "name": "mcp__js"}, {"type": "mcp"}],
            },
            ToolChoice("required", allowed=("sh", "mcp__js__eval", "mcp__js__script")),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}, ToolChoice("none")),
    ],
)
def test_tool_choices(choice: Any, expected: ToolChoice) -> None:
    assert parse(tools=[WEATHER, NAMESPACE, SHELL], tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TIME]}, "tool_choice"),
        ({"tool_choice": 1, "tools": [TIME]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [TIME]}, "tool_choice.name"),
        ({"tool_choice": {"type": "function"}, "tools": [TIME]}, "tool_choice.name"),
        ({"tool_choice": {"type": "web_search"}, "tools": [TIME]}, "tool_choice.type"),
        ({"tool_choice": {"type": "wish"}, "tools": [TIME]}, "tool_choice.type"),
        ({"tool_choice": {"type": "allowed_tools", "tools": [TIME]}, "tools": [TIME]}, "tool_choice.mode"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}, "tools": [TIME]},
            "tool_choice.tools",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [WEATHER]}, "tools": [TIME]},
            "tool_choice.tools[0].name",
        ),
        ({"tools": [{"name": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name"),
        ({"tools": [{**SHELL, "format": {"type": "grammar", "syntax": "bnf"}}]}, "tools[0].format.syntax"),
        ({"tools": [{**SHELL, "format": {"type": "grammar", "syntax": "lark"}}]}, "tools[0].format.definition"),
        ({"tools": [{**SHELL, "format": {"type": "grammar"}}]}, "tools[0].format.syntax"),
        ({"tools": [{"type": "namespace", "tools": []}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
    ],
)
def test_bad_tools_are_refused_with_their_path(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param
