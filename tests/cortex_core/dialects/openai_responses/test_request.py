"""Parsing responses requests: every field and its limits."""

from __future__ import annotations

import json
from typing import Any

from cortex_core.conversation import Limits, Reasoning, ResponseFormat, Sampling, TextPart, Turn
from cortex_core.dialects import openai_responses
from cortex_core.errors import ApiError
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_core.dialects.openai_responses.harness import NAMESPACE, SHELL, WEATHER, parse, refused
from tests.cortex_core.dialects.rich_bodies import RICH_RESPONSES


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
