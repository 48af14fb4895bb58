"""The items of a responses request become turns."""

from __future__ import annotations

from typing import Any

import pytest
from cortex_core.conversation import ImagePart, Reasoning, TextPart, ThinkingPart, ToolCallPart, ToolResultPart, Turn
from cortex_core.dialects.reasoning_signature import unwrap, wrap

from tests.cortex_core.dialects.openai_responses.harness import parse, refused

PIXEL = "iVBORw0KGgo="


def turns(*items: Any) -> tuple[Turn, ...]:
    return parse(input=list(items)).turns


def test_a_string_is_a_user_turn() -> None:
    asked = parse()
    assert asked.turns == (Turn("user", (TextPart("hi"),)),)
    assert asked.reasoning == Reasoning() and asked.tools == () and not asked.stream


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


def test_a_call_of_a_namespace_comes_back_under_its_flat_name() -> None:
    (turn,) = turns(
        {"type": "function_call", "call_id": "c", "name": "eval", "namespace": "mcp__js", "arguments": "{}"}
    )
    assert turn.parts == (ToolCallPart("c", "mcp__js__eval", "{}"),)
    (turn,) = turns({"type": "function_call", "call_id": "c", "name": "f", "namespace": "ns__", "arguments": {"a": 1}})
    assert turn.parts == (ToolCallPart("c", "ns__f", '{"a": 1}'),)
