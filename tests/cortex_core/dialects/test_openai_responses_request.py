"""Parsing responses requests: items into turns, tools flattened, every field and its limits."""

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
from cortex_core.dialects import openai_responses
from cortex_core.dialects.reasoning_signature import unwrap, wrap
from cortex_core.errors import ApiError
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_core.dialects.rich_bodies import RICH_RESPONSES

PIXEL = "iVBORw0KGgo="
WEATHER = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": True}
TIME = {"type": "function", "name": "get_time"}
SHELL = {"type": "custom", "name": "sh"}
NAMESPACE = {
    "type": "namespace",
    "name": "mcp__js",
    "description": "Run code",
    "tools": [
        {"type": "function", "name": "eval", "description": "Evaluate", "parameters": {"type": "object"}},
        {"type": "custom", "name": "script"},
        {"type": "hologram", "name": "x"},
    ],
}


def parse(**fields: Any) -> Request:
    return openai_responses.parse(json.dumps({"model": "m", "input": "hi", **fields}).encode())


def turns(*items: Any) -> tuple[Turn, ...]:
    return parse(input=list(items)).turns


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param), "the message names the field"
    return caught.value


def test_a_string_is_a_user_turn() -> None:
    asked = parse()
    assert asked.turns == (Turn("user", (TextPart("hi"),)),)
    assert asked.reasoning == Reasoning() and asked.tools == () and not asked.stream


def test_instructions_come_first_and_system_items_stay_in_place() -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "role": "user", "content": "hi", "id": "msg_1", "status": "completed", "phase": "x"},
        {"type": "message", "role": "system", "content": "c"},
    ]
    assert parse(instructions="Be brief.", input=items).turns == (
        Turn("system", (TextPart("Be brief."),)),
        Turn("system", (TextPart("a"), TextPart("b"))),
        Turn("user", (TextPart("hi"),)),
        Turn("system", (TextPart("c"),)),
    )


def test_the_items_of_an_answer_are_one_turn_again() -> None:
    assert turns(
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"a":1}', "status": "x"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "sh", "input": "ls"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "message", "role": "assistant", "content": "Done"},
    ) == (
        Turn("user", (TextPart("hi"),)),
        Turn(
            "assistant",
            (
                ThinkingPart("hm"),
                TextPart("So"),
                ToolCallPart("c1", "f", '{"a":1}'),
                ToolCallPart("c2", "sh", '{"input": "ls"}'),
            ),
        ),
        Turn("tool", (ToolResultPart("c1", (TextPart("1"),), name="f"),)),
        Turn("tool", (ToolResultPart("c2", (TextPart("2"),), name="sh"),)),
        Turn("assistant", (TextPart("Done"),)),
    )


def test_two_messages_of_the_assistant_in_a_row_were_two_turns() -> None:
    message = {"type": "message", "role": "assistant", "content": "a"}
    assert turns(message, message) == (Turn("assistant", (TextPart("a"),)),) * 2


@pytest.mark.parametrize(
    ("item", "thought"),
    [
        ({"content": [{"type": "reasoning_text", "text": "raw"}], "summary": [{"text": "s", "type": "x"}]}, "raw"),
        ({"summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]}, "ab"),
        ({"summary": [], "encrypted_content": wrap("carried")}, "carried"),
        ({"summary": [], "content": None, "encrypted_content": "gAAAAB…of another server"}, None),
        ({"encrypted_content": 7}, None),
        ({"summary": []}, None),
    ],
)
def test_reasoning_comes_back_as_it_was_given(item: dict[str, Any], thought: str | None) -> None:
    given = turns({"role": "user", "content": "hi"}, {"type": "reasoning", **item}, {"role": "user", "content": "x"})
    middle = () if thought is None else (Turn("assistant", (ThinkingPart(thought),)),)
    assert given[1:-1] == middle


def test_what_is_carried_is_only_read_where_it_is_ours() -> None:
    assert unwrap(wrap("hm é 😀")) == "hm é 😀"
    assert [unwrap(text) for text in (None, "", "x", "cortex1.!", "cortex1./w==")] == [None] * 5


def test_N21_bare_and_unknown_items_are_accepted() -> None:
    assert turns(
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "assistant", "content": []},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}},
        {"type": "something_new", "payload": 1},
        {"type": "agent_message", "role": "user", "content": "hello"},
        {"foo": 1},
    ) == (Turn("user"), Turn("user"), Turn("assistant"), Turn("user", (TextPart("hello"),)))


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("plain", "plain"),
        ({"temperature": 14}, '{"temperature": 14}'),
        ([1, 2], "[1, 2]"),
        (7, "7"),
        (None, None),
        ([], None),
    ],
)
def test_results_of_any_shape_are_shown_to_the_model(output: Any, text: str | None) -> None:
    (turn,) = turns({"type": "function_call_output", "call_id": "c", "output": output})
    assert turn == Turn("tool", (ToolResultPart("c", () if text is None else (TextPart(text),)),))


def test_images_by_url_and_by_data() -> None:
    parts = [
        {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "low"},
        {"type": "input_image", "image_url": "https://x/y.png"},
    ]
    (turn,) = turns({"role": "user", "content": parts})
    assert turn.parts == (
        ImagePart(data=PIXEL, media_type="image/png", detail="low"),
        ImagePart(url="https://x/y.png"),
    )


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        (7, "input"),
        (None, "input"),
        (["x"], "input[0]"),
        ([{"role": "wizard", "content": "x"}], "input[0].role"),
        ([{"type": "message", "content": "x"}], "input[0].role"),
        ([{"role": "user", "content": 7}], "input[0].content"),
        ([{"role": "user", "content": [{"text": "x"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "hologram"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}], "input[0].content[0].file_id"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0].image_url"),
        (
            [{"role": "system", "content": [{"type": "input_image", "image_url": "https://x"}]}],
            "input[0].content[0].type",
        ),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0]"),
        ([{"id": "msg_1"}], "input[0]"),
        ([{"type": "function_call", "call_id": "c", "arguments": "{}"}], "input[0].name"),
        ([{"type": "function_call_output", "output": "x"}], "input[0].call_id"),
    ],
)
def test_bad_input_is_refused_with_its_path(items: Any, param: str) -> None:
    assert refused(input=items).param == param


# Tools


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


def test_a_call_of_a_namespace_comes_back_under_its_flat_name() -> None:
    (turn,) = turns(
        {"type": "function_call", "call_id": "c", "name": "eval", "namespace": "mcp__js", "arguments": "{}"}
    )
    assert turn.parts == (ToolCallPart("c", "mcp__js__eval", "{}"),)
    (turn,) = turns({"type": "function_call", "call_id": "c", "name": "f", "namespace": "ns__", "arguments": {"a": 1}})
    assert turn.parts == (ToolCallPart("c", "ns__f", '{"a": 1}'),)


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


# Settings


def test_settings() -> None:
    asked = parse(
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        seed=7,
        stop=["END"],
        parallel_tool_calls=False,
        stream=True,
        reasoning={"effort": "low", "summary": "auto"},
        chat_template_kwargs={"a": 1},
    )
    assert asked.limits == Limits(max_tokens=50, stop=("END",))
    assert asked.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=5, seed=7)
    assert asked.stream and not asked.parallel_tool_calls
    assert asked.reasoning == Reasoning("on", effort="low")
    assert asked.template_kwargs == {"a": 1}


def test_reasoning_modes() -> None:
    assert parse(reasoning={"summary": "auto"}).reasoning == Reasoning()
    assert parse(reasoning={"effort": "none"}).reasoning == Reasoning("off")
    assert parse(enable_thinking=True).reasoning == Reasoning("on")
    assert parse(reasoning=None).reasoning == Reasoning()
    assert refused(reasoning={"effort": "heroic"}).param == "reasoning.effort"


def test_an_item_may_change_settings() -> None:
    update = {
        "type": "configuration_update",
        "reasoning": {"effort": "none"},
        "text": {"format": {"type": "json_object"}},
    }
    asked = parse(input=[{"role": "user", "content": "hi"}, update], reasoning={"effort": "high"})
    assert asked.reasoning == Reasoning("off") and asked.response_format == ResponseFormat("json_object")


def test_text_formats() -> None:
    schema = {"type": "object"}
    named = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert parse(text={"format": {"type": "text"}, "verbosity": "low"}).response_format is None
    assert parse(text={}).response_format is None
    assert parse(text={"format": {"type": "json_object"}}).response_format == ResponseFormat("json_object")
    assert parse(text={"format": named}).response_format == ResponseFormat("json_schema", schema, "n", True)
    assert refused(text={"format": {"type": "xml"}}).param == "text.format.type"
    assert refused(text={"format": {"type": "json_schema", "name": "n"}}).param == "text.format.schema"
    assert refused(text={"format": {**named, "schema": 7}}).param == "text.format.schema"


def test_logprobs() -> None:
    wanted = ["message.output_text.logprobs"]
    assert parse().logprobs is None and parse(top_logprobs=0).logprobs is None
    assert parse(include=wanted).logprobs == 0
    assert parse(include=wanted, top_logprobs=3).logprobs == 3
    assert parse(include=["web_search_call.results", 7]).logprobs is None
    assert refused(top_logprobs=21).param == "top_logprobs"
    assert refused(include="x").param == "include"


def test_a_stored_response_cannot_be_continued() -> None:
    error = refused(previous_response_id="resp_1")
    assert (error.code, error.param) == ("previous_response_not_found", "previous_response_id")
    assert parse(previous_response_id=None, store=True, conversation=None, background=False).turns


def test_errors_of_the_engine_speak_of_this_dialects_fields() -> None:
    asked = parse(tools=[{"type": "web_search"}, SHELL])
    assert asked.client_param("messages") == "input"
    assert asked.client_param("response_format.json_schema.schema") == "text.format.schema"
    assert asked.client_param("tools[0].function.parameters") == "tools[1].format"
    assert asked.client_param("temperature") == "temperature" and asked.client_param(None) is None


def test_the_body_of_a_real_agent() -> None:
    """The shape of Codex CLI 0.169: no limits, no sampling, developer messages, a namespace and a hosted tool."""
    asked = parse(
        stream=True,
        input=[
            {
                "type": "message",
                "role": "developer",
                "id": "msg_1",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
            {"type": "message", "role": "developer", "id": "m2", "content": [{"type": "input_text", "text": "c"}]},
            {
                "type": "message",
                "role": "user",
                "id": "m3",
                "content": [{"type": "input_text", "text": "<environment>"}],
            },
            {"type": "message", "role": "user", "id": "m4", "content": [{"type": "input_text", "text": "say hi"}]},
        ],
        tools=[{**WEATHER, "strict": False}, NAMESPACE, {"type": "web_search", "external_web_access": True}],
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning={"summary": "auto"},
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="019",
        client_metadata={"x": "y"},
    )
    assert [turn.role for turn in asked.turns] == ["system", "system", "user", "user"]
    assert len(asked.tools) == 3 and asked.reasoning == Reasoning()


@given(st.data())
def test_whatever_stands_in_a_body_nothing_but_an_api_error_comes_of_it(data: st.DataObject) -> None:
    body = json.loads(json.dumps(RICH_RESPONSES))
    junk = data.draw(st.sampled_from([None, True, 7, -1, 1.5, "", "x", [], [1], {}, {"type": "x"}, [{"type": "x"}]]))
    node: Any = body
    while True:
        key: Any = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or data.draw(st.booleans()):
            node[key] = junk
            break
        node = child
    try:
        openai_responses.parse(json.dumps(body).encode())
    except ApiError as error:
        assert error.status == 400
