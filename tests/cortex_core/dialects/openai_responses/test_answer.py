"""Response streams and bodies: exact events and their order, and what the official SDK makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import openai
import pytest
from cortex_core.conversation import Reasoning, Request, ToolDefinition
from cortex_core.dialects import openai_responses
from cortex_core.errors import ApiError
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from hypothesis import given
from hypothesis import strategies as st
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from tests.cortex_core.dialects.event_streams import event_streams, sse_events, stream_bytes
from tests.cortex_core.dialects.openai_responses.harness import (
    IDENTITY,
    TOOLS,
    USAGE,
    body_of,
    events_of,
    parsed,
    rebuilt,
)

NAMES = ("get_weather", "a__find", "a__note", "sh", "unheard_of")
EXTENSIONS = {"name", "status", "store", "presence_penalty", "frequency_penalty"}
"""On the official wire and asked for by strict validators, not in the SDK's types."""

stream_event: TypeAdapter[Any] = TypeAdapter(Annotated[ResponseStreamEvent, Field(discriminator="type")])


def unknown_fields(model: BaseModel) -> set[str]:
    found = set(model.model_extra or ())
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found |= unknown_fields(item)
    return found


@given(st.data())
def test_the_official_accumulator_rebuilds_what_the_collector_says(data: st.DataObject) -> None:
    logprobs = data.draw(st.sampled_from([None, 0, 2]), "logprobs")
    visible = data.draw(st.booleans(), "visible")
    asked = parsed(
        tools=TOOLS,
        include=["reasoning.encrypted_content"] * data.draw(st.booleans(), "carries")
        + ["message.output_text.logprobs"] * (logprobs is not None),
        top_logprobs=logprobs,
        metadata={"a": "b"},
    )
    asked = msgspec.structs.replace(asked, reasoning=Reasoning(visible=visible))
    events = data.draw(event_streams(num_choices=1, top_logprobs=logprobs, names=NAMES), "events")
    raw = events_of(asked, events, data.draw(st.integers(1, 200), "chunk_size"))
    check_item_order(raw)

    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in raw:
        typed = stream_event.validate_python(event)
        assert unknown_fields(typed) <= EXTENSIONS
        state.handle_event(typed)
    body = body_of(asked, events)
    typed_body = Response.model_validate(body)
    assert unknown_fields(typed_body) <= EXTENSIONS
    assert raw[-1]["response"] == body
    assert rebuilt(raw) == body["output"]
    if body["status"] == "completed":
        live = [without_parsed(item.to_dict()) for item in state._completed_response.output]
        assert live == [item.to_dict() for item in typed_body.output]
        assert state._completed_response.output_text == typed_body.output_text


def without_parsed(item: dict[str, Any]) -> dict[str, Any]:
    """An item of the SDK's accumulator without what it adds of its own."""
    plain = {name: value for name, value in item.items() if name != "parsed_arguments"}
    if item["type"] == "message":
        plain["content"] = [{k: v for k, v in part.items() if k != "parsed"} for part in item["content"]]
    return plain


def check_item_order(events: list[dict[str, Any]]) -> None:
    """created, in_progress, then items 0, 1, 2… of which one is open at a time, then the end; known ids only."""
    names = [event["type"] for event in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in ("response.completed", "response.incomplete")
    index, item_id = -1, None
    for event in events[2:-1]:
        if event["type"] == "response.output_item.added":
            assert item_id is None
            index += 1
            assert event["output_index"] == index
            item_id = event["item"]["id"]
        else:
            assert event["output_index"] == index
            assert (event["item"]["id"] if "item" in event else event["item_id"]) == item_id
            if event["type"] == "response.output_item.done":
                item_id = None
    assert item_id is None
    ids = [item["id"] for item in events[-1]["response"]["output"]]
    assert len(set(ids)) == len(ids) == index + 1


def test_a_whole_stream_event_by_event() -> None:
    asked = parsed(tools=TOOLS, include=["reasoning.encrypted_content"])
    events: list[Event] = [
        ReasoningDelta(0, "h"),
        ReasoningDelta(0, "m"),
        TextDelta(0, "So"),
        TextDelta(0, "."),
        ToolCallStart(0, 0, "ab", "a__find"),
        ToolCallArguments(0, 0, '{"q":'),
        ToolCallArguments(0, 0, "1}"),
        ToolCallEnd(0, 0),
        ToolCallStart(0, 1, "cd", "sh"),
        ToolCallArguments(0, 1, '{"input": "l'),
        ToolCallArguments(0, 1, 's\\n"}'),
        ToolCallEnd(0, 1),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    raw = events_of(asked, events)
    thought, message = {"item_id": "rs_0a0000", "output_index": 0}, {"item_id": "msg_0a0001", "output_index": 1}
    call, custom = {"item_id": "fc_0a0002", "output_index": 2}, {"item_id": "ctc_0a0003", "output_index": 3}
    summary = {**thought, "summary_index": 0}
    text = {**message, "content_index": 0}
    call_item = {
        "id": "fc_0a0002",
        "type": "function_call",
        "call_id": "call_ab",
        "name": "find",
        "namespace": "a",
        "status": "completed",
        "arguments": '{"q":1}',
    }
    custom_item = {
        "id": "ctc_0a0003",
        "type": "custom_tool_call",
        "call_id": "call_cd",
        "name": "sh",
        "status": "completed",
        "input": "ls\n",
    }
    empty_part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    part = {**empty_part, "text": "So."}
    shown = [{key: value for key, value in event.items() if key != "sequence_number"} for event in raw[2:-1]]
    message_head = {"id": "msg_0a0001", "type": "message", "role": "assistant"}
    assert shown == [
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {"id": "rs_0a0000", "type": "reasoning", "summary": [], "status": "in_progress"},
        },
        {
            "type": "response.reasoning_summary_part.added",
            **summary,
            "part": {"type": "summary_text", "text": ""},
        },
        {"type": "response.reasoning_summary_text.delta", **summary, "delta": "h"},
        {"type": "response.reasoning_summary_text.delta", **summary, "delta": "m"},
        {"type": "response.reasoning_summary_text.done", **summary, "text": "hm"},
        {
            "type": "response.reasoning_summary_part.done",
            **summary,
            "part": {"type": "summary_text", "text": "hm"},
        },
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": {
                "id": "rs_0a0000",
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "hm"}],
                "status": "completed",
                "encrypted_content": "cortex1.aG0=",
            },
        },
        {
            "type": "response.output_item.added",
            "output_index": 1,
            "item": {**message_head, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **text, "part": empty_part},
        {"type": "response.output_text.delta", **text, "logprobs": [], "delta": "So"},
        {"type": "response.output_text.delta", **text, "logprobs": [], "delta": "."},
        {"type": "response.output_text.done", **text, "text": "So.", "logprobs": []},
        {"type": "response.content_part.done", **text, "part": part},
        {
            "type": "response.output_item.done",
            "output_index": 1,
            "item": {**message_head, "status": "completed", "content": [part]},
        },
        {
            "type": "response.output_item.added",
            "output_index": 2,
            "item": {**call_item, "arguments": "", "status": "in_progress"},
        },
        {"type": "response.function_call_arguments.delta", **call, "delta": '{"q":'},
        {"type": "response.function_call_arguments.delta", **call, "delta": "1}"},
        {"type": "response.function_call_arguments.done", **call, "arguments": '{"q":1}', "name": "find"},
        {"type": "response.output_item.done", "output_index": 2, "item": call_item},
        {
            "type": "response.output_item.added",
            "output_index": 3,
            "item": {**custom_item, "input": "", "status": "in_progress"},
        },
        {"type": "response.custom_tool_call_input.delta", **custom, "delta": "l"},
        {"type": "response.custom_tool_call_input.delta", **custom, "delta": "s\n"},
        {"type": "response.custom_tool_call_input.done", **custom, "input": "ls\n"},
        {"type": "response.output_item.done", "output_index": 3, "item": custom_item},
    ]
    first, last = raw[0]["response"], raw[-1]["response"]
    assert raw[1]["response"] == first
    assert first["status"] == "in_progress" and first["output"] == [] and first["usage"] is None
    assert last["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 12,
    }
    assert last["status"] == "completed" and last["completed_at"] == 1_760_000_009
    changing = ("status", "completed_at", "output", "usage")
    assert {k: v for k, v in first.items() if k not in changing} == {k: v for k, v in last.items() if k not in changing}


STRICT_KEYS = {
    *("id", "object", "created_at", "completed_at", "status", "background", "error", "incomplete_details"),
    *("instructions", "max_output_tokens", "max_tool_calls", "model", "output", "parallel_tool_calls"),
    *("previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier", "service_tier", "store"),
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "text", "tool_choice", "tools"),
    *("top_logprobs", "truncation", "usage", "metadata"),
}


def test_the_first_response_object_has_every_key_that_strict_clients_validate() -> None:
    asked = parsed(
        instructions="Be brief.",
        metadata={"k": "v"},
        tools=TOOLS,
        temperature=0.5,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}, "verbosity": "low"},
        prompt_cache_key="key",
        safety_identifier=7,
        tool_choice="auto",
    )
    first = events_of(asked, [Finish(0, "stop"), USAGE])[0]["response"]
    assert set(first) >= STRICT_KEYS
    assert first["instructions"] == "Be brief." and first["metadata"] == {"k": "v"}
    assert first["temperature"] == 0.5 and first["top_p"] == 1.0
    assert first["reasoning"] == {"effort": "low", "summary": "auto"}
    assert first["text"]["format"]["schema"] == {"type": "object"} and first["text"]["verbosity"] == "low"
    assert first["prompt_cache_key"] == "key"
    assert first["safety_identifier"] is None, "ignored, and of the wrong type: not sent back"
    assert first["store"] is False
    assert first["tools"][0] == {**TOOLS[0], "description": None}
    assert first["tools"][1:] == TOOLS[1:]


def test_a_nested_function_is_echoed_flat_and_large_numbers_survive() -> None:
    huge = 2**80
    function = {"name": "f", "parameters": {"type": "object", "maximum": huge}}
    body = body_of(parsed(tools=[{"type": "function", "function": function}]), [Finish(0, "stop"), USAGE])
    assert body["tools"] == [{"type": "function", "description": None, "strict": False, **function}]


def test_a_cut_answer_is_incomplete_and_says_why() -> None:
    for reason, said in (("length", "max_output_tokens"), ("content_filter", "content_filter")):
        events: list[Event] = [ReasoningDelta(0, "hm"), TextDelta(0, "So"), Finish(0, reason), USAGE]  # type: ignore[arg-type]
        last = events_of(parsed(), events)[-1]
        assert last["type"] == "response.incomplete"
        response = last["response"]
        assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": said}
        assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
        assert response["completed_at"] is None


def test_F31_N22_every_event_names_its_type_and_number_in_the_data() -> None:
    raw = events_of(parsed(), [ReasoningDelta(0, "hm"), TextDelta(0, "So"), Finish(0, "stop"), USAGE])
    assert "response.reasoning_summary_text.delta" in [event["type"] for event in raw]
    assert all(isinstance(event["sequence_number"], int) for event in raw)


def test_nothing_may_look_whole_that_is_not() -> None:
    projector = openai_responses.Projector(parsed(), **IDENTITY)
    projector.begin(7)
    with pytest.raises(RuntimeError):
        projector.end()
    with pytest.raises(RuntimeError):
        openai_responses.Collector(parsed(), **IDENTITY).body()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ApiError("internal", "boom"), "server_error"),
        (ApiError("overloaded", "boom", code="engine_restarting"), "server_error"),
        (ApiError("rate_limit", "boom"), "rate_limit_exceeded"),
        (ApiError("invalid_request", "boom", code="context_length_exceeded"), "context_length_exceeded"),
    ],
)
def test_a_failure_ends_the_stream_as_response_failed(error: ApiError, code: str) -> None:
    projector = openai_responses.Projector(parsed(), **IDENTITY)
    stream = projector.begin(7) + projector.feed(ReasoningDelta(0, "hm")) + projector.feed(TextDelta(0, "So"))
    stream += projector.feed(Failure(error))
    assert projector.feed(TextDelta(0, "x")) == projector.ping() == projector.end() == projector.fail(error) == b""
    last = json.loads(sse_events(stream, 7)[-1].data)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": code, "message": "boom"}
    assert [item["type"] for item in last["response"]["output"]] == ["reasoning"], "what was whole"
    if code != "context_length_exceeded":  # known to agents, not to the SDK's types
        stream_event.validate_python(last)
    with pytest.raises(ApiError):
        openai_responses.Collector(parsed(), **IDENTITY).feed(Failure(error))


def test_the_sdk_streams_an_answer(openai_client: Callable[..., openai.OpenAI]) -> None:
    events: list[Event] = [TextDelta(0, "forty"), TextDelta(0, "-two"), Finish(0, "stop"), USAGE]
    stream = stream_bytes(openai_responses.Projector(parsed(), **IDENTITY), events, pings=True)
    client = openai_client(200, "text/event-stream", stream)
    with client.responses.stream(model="m", input="hi") as heard:
        deltas = [event.delta for event in heard if event.type == "response.output_text.delta"]
        final = heard.get_final_response()
    assert deltas == ["forty", "-two"]
    assert final.output_text == "forty-two" and final.usage is not None and final.usage.total_tokens == 12


def test_the_sdk_raises_on_a_stream_that_failed_before_it_began(openai_client: Callable[..., openai.OpenAI]) -> None:
    projector = openai_responses.Projector(parsed(), **IDENTITY)
    stream = b": ping\n\n" + projector.fail(ApiError("overloaded", "no room", retry_after=3))
    assert json.loads(sse_events(stream, 5)[0].data)["message"] == "no room"
    client = openai_client(200, "text/event-stream", stream)
    with pytest.raises(openai.APIError, match="no room"), client.responses.stream(model="m", input="hi") as heard:
        list(heard)


def test_the_sdk_reads_a_body(openai_client: Callable[..., openai.OpenAI]) -> None:
    collector = openai_responses.Collector(parsed(), **IDENTITY)
    for event in (TextDelta(0, "forty-two"), Finish(0, "stop"), USAGE):
        collector.feed(event)
    answer = openai_client(200, "application/json", collector.body()).responses.create(model="m", input="hi")
    assert answer.output_text == "forty-two" and answer.status == "completed"


def test_a_request_of_another_making_is_projected_too() -> None:
    """Translation may hand over a request that this dialect has not parsed."""
    asked = Request(model="m", tools=(ToolDefinition("f", is_freeform=True),))
    events: list[Event] = [
        ToolCallStart(0, 0, "a", "f"),
        ToolCallArguments(0, 0, '{"input":"x"}'),
        ToolCallEnd(0, 0),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    body = body_of(asked, events)
    assert set(body) >= STRICT_KEYS and body["output"][0]["input"] == "x"
