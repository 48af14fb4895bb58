"""Calls written as JSON: streamed as they come, and forgiven what models forget."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.events import ToolCallArguments, ToolCallStart
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.daemon.prompt.model import TextModel

from tests.neuron.daemon.output.harness import OSLO, stream
from tests.neuron.daemon.prompt.checkpoints import WEATHER, ask


def test_a_json_call_streams_its_arguments(model: TextModel) -> None:
    answer = stream(model, OSLO)
    assert answer.calls == [("get_weather", '{"city": "Oslo", "days": 3}')]
    assert answer.text == ""
    assert answer.reason == "tool_calls"
    assert sum(isinstance(event, ToolCallArguments) for event in answer.events) > 3


def test_the_start_leaves_as_soon_as_the_name_is_known(qwen: TextModel) -> None:
    request = ask(tools=(WEATHER,))
    choice = qwen.event_stream(request, qwen.render(request)[0])
    events = choice.feed(qwen.tokenizer.encode('<tool_call>\n{"name": "get_weather"'))
    assert [type(event) for event in events] == [ToolCallStart]
    events = choice.feed(qwen.tokenizer.encode(', "arguments": {"ci'))
    assert all(isinstance(event, ToolCallArguments) for event in events)
    assert "".join(event.fragment for event in events if isinstance(event, ToolCallArguments)) == '{"ci'


@pytest.mark.parametrize(
    "body",
    [
        '{"arguments": {"city": "Oslo"}, "name": "get_weather"}',
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
        '{"id": "x", "name": "get_weather", "extra": [1, {"}": "]"}], "arguments": {"city": "Oslo"}}',
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}',
        '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]',
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}}',
        '\n\n  {"name" : "get_weather" , "arguments" :\n{"city": "Oslo"} }\n',
        '{"name": "get_weather", "arguments": {"city": "Oslo"}',
    ],
)
def test_json_calls_written_otherwise(model: TextModel, body: str) -> None:
    answer = stream(model, f"<tool_call>{body}</tool_call>")
    assert [name for name, _ in answer.calls] == ["get_weather"]
    assert answer.arguments == [{"city": "Oslo"}]
    assert answer.text == ""
    assert answer.reason == "tool_calls"


def test_a_forgotten_quote_does_not_swallow_the_closing_marker(model: TextModel) -> None:
    answer = stream(model, '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo}}\n</tool_call>Well.')
    assert answer.arguments == [{"city": "Oslo}}\n"}]
    assert answer.text == "Well."


def test_a_line_break_inside_a_json_string_becomes_an_escape(qwen: TextModel) -> None:
    answer = stream(qwen, '<tool_call>{"name": "w", "arguments": {"code": "a\nb\tc"}}</tool_call>')
    assert answer.arguments == [{"code": "a\nb\tc"}]


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=9),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_any_arguments_come_through(qwen: TextModel, arguments: dict[str, Any], is_ascii: bool) -> None:
    written = json.dumps({"name": "w", "arguments": arguments}, ensure_ascii=is_ascii)
    answer = stream(qwen, f"<tool_call>\n{written}\n</tool_call>", sizes=(1, 3))
    assert answer.arguments == [arguments]
