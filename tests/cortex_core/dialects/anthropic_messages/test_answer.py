"""Message streams and bodies: exact events and their order, and what the official SDK makes of them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import anthropic
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from cortex_core.conversation import Reasoning, Request, ThinkingPart
from cortex_core.dialects import anthropic_messages
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
    Usage,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from tests.cortex_core.dialects.event_streams import collected, event_streams, sse_events, stream_bytes

IDENTITY: dict[str, Any] = {"response_id": "msg_1", "created": 1_760_000_000, "model": "org/name"}
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1)
REASONINGS = [Reasoning("on"), Reasoning("on", omit_text=True), Reasoning("off", visible=False)]

stream_event: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def request(reasoning: Reasoning = REASONINGS[0]) -> Request:
    return Request(model="org/name", reasoning=reasoning)


def events_of(asked: Request, events: list[Event], chunk_size: int = 1000) -> list[dict[str, Any]]:
    stream = stream_bytes(anthropic_messages.Projector(asked, **IDENTITY), events)
    decoded = sse_events(stream, chunk_size)
    data = [json.loads(event.data) for event in decoded]
    assert [event.event for event in decoded] == [event["type"] for event in data]
    return data


def body_of(asked: Request, events: list[Event]) -> Any:
    return collected(anthropic_messages.Collector(asked, **IDENTITY), events)


def is_cut_off(events: list[Event]) -> bool:
    """Whether the last tool call has no end: its arguments are then no JSON and the two sides may differ."""
    calls = [event for event in events if isinstance(event, (ToolCallStart, ToolCallEnd))]
    return bool(calls) and isinstance(calls[-1], ToolCallStart)


def check_block_order(events: list[dict[str, Any]]) -> None:
    """message_start, then blocks 0, 1, 2… of which one is open at a time, then message_delta, message_stop."""
    names = [event["type"] for event in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    index, open_kind, deltas = -1, None, {"text": "text", "thinking": "thinking", "tool_use": "input_json"}
    signed = False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_kind is None
            index += 1
            assert event["index"] == index
            open_kind, signed = event["content_block"]["type"], False
        elif event["type"] == "content_block_delta":
            assert open_kind is not None
            assert event["index"] == index
            assert not signed, "the signature is the last delta"
            kind = event["delta"]["type"]
            signed = kind == "signature_delta"
            assert open_kind == "thinking" if signed else kind == deltas[open_kind] + "_delta"
        else:
            assert event == {"type": "content_block_stop", "index": index}
            assert signed == (open_kind == "thinking")
            open_kind = None
    assert open_kind is None


@given(st.data())
def test_the_official_accumulator_rebuilds_what_the_collector_says(data: st.DataObject) -> None:
    asked = request(data.draw(st.sampled_from(REASONINGS), "reasoning"))
    events = data.draw(event_streams(num_choices=1), "events")
    raw = events_of(asked, events, data.draw(st.integers(1, 200), "chunk_size"))
    check_block_order(raw)
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in raw:
        typed = stream_event.validate_python(event)
        snapshot = accumulate_event(event=typed, current_snapshot=snapshot, json_bufs=buffers)
    body = Message.model_validate(body_of(asked, events))
    assert unknown_fields(body) == set()
    live: dict[str, Any] = snapshot.to_dict()
    whole: dict[str, Any] = body.to_dict()
    if is_cut_off(events):
        assert live["content"].pop()["name"] == whole["content"].pop()["name"]
    assert [strip_none(block) for block in live["content"]] == [strip_none(block) for block in whole["content"]]
    for name in ("id", "model", "role", "stop_reason", "stop_sequence", "usage"):
        assert live[name] == whole[name]


def strip_none(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if value is not None}


def unknown_fields(model: BaseModel) -> set[str]:
    found = set(model.model_extra or ())
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found |= unknown_fields(item)
    return found


@given(event_streams(num_choices=1))
def test_blocks_of_a_kind_are_not_split(events: list[Event]) -> None:
    blocks = body_of(request(), events)["content"]
    kinds = [block["type"] for block in blocks]
    assert all(left != right or left == "tool_use" for left, right in pairwise(kinds))


def test_a_whole_stream_event_by_event() -> None:
    events: list[Event] = [
        ReasoningDelta(0, "hm"),
        TextDelta(0, "So"),
        TextDelta(0, "."),
        ToolCallStart(0, 0, "ab12", "get_weather"),
        ToolCallArguments(0, 0, '{"city":'),
        ToolCallArguments(0, 0, '"Paris"}'),
        ToolCallEnd(0, 0),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    signature = events_of(request(), events)[3]["delta"].pop("signature")
    assert signature
    stream = events_of(request(), events)
    stream[3]["delta"].pop("signature")
    assert stream == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "org/name",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "stop_details": None,
                "usage": {
                    "input_tokens": 7,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 0,
                },
            },
        },
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "So"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "."}},
        {"type": "content_block_stop", "index": 1},
        {
            "type": "content_block_start",
            "index": 2,
            "content_block": {"type": "tool_use", "id": "toolu_ab12", "name": "get_weather", "input": {}},
        },
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": '{"city":'},
        },
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": '"Paris"}'},
        },
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None, "stop_details": None},
            "usage": {
                "input_tokens": 5,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 2,
                "output_tokens": 5,
                "output_tokens_details": {"thinking_tokens": 1},
            },
        },
        {"type": "message_stop"},
    ]


def test_a_whole_body() -> None:
    events: list[Event] = [
        ReasoningDelta(0, "h"),
        ReasoningDelta(0, "m"),
        TextDelta(0, "So."),
        ToolCallStart(0, 0, "ab12", "get_weather"),
        ToolCallArguments(0, 0, '{"city":"Paris"}'),
        ToolCallEnd(0, 0),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    body = body_of(request(), events)
    assert body["content"][0].pop("signature")
    assert body == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "org/name",
        "content": [
            {"type": "thinking", "thinking": "hm"},
            {"type": "text", "text": "So."},
            {"type": "tool_use", "id": "toolu_ab12", "name": "get_weather", "input": {"city": "Paris"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "stop_details": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 5,
            "output_tokens_details": {"thinking_tokens": 1},
        },
    }


@pytest.mark.parametrize(
    ("finish", "stop_reason", "stop_sequence"),
    [
        (Finish(0, "stop"), "end_turn", None),
        (Finish(0, "length"), "max_tokens", None),
        (Finish(0, "stop_sequence", "END"), "stop_sequence", "END"),
        (Finish(0, "tool_calls"), "tool_use", None),
        (Finish(0, "content_filter"), "refusal", None),
    ],
)
def test_stop_reasons(finish: Finish, stop_reason: str, stop_sequence: str | None) -> None:
    delta = events_of(request(), [finish, USAGE])[-2]["delta"]
    body = body_of(request(), [finish, USAGE])
    assert (delta["stop_reason"], delta["stop_sequence"]) == (stop_reason, stop_sequence)
    assert (body["stop_reason"], body["stop_sequence"]) == (stop_reason, stop_sequence)


def test_a_call_cut_by_the_limit_stops_for_max_tokens_and_offers_no_half_input() -> None:
    events: list[Event] = [
        ToolCallStart(0, 0, "a", "rm"),
        ToolCallArguments(0, 0, '{"path": "/'),
        Finish(0, "length"),
        USAGE,
    ]
    stream = events_of(request(), events)
    check_block_order(stream)
    assert stream[-2]["delta"]["stop_reason"] == "max_tokens"
    body = body_of(request(), events)
    assert (body["stop_reason"], body["content"][0]["input"]) == ("max_tokens", {})


@pytest.mark.parametrize("cached", [0, 1, 6])
def test_the_three_input_counts_sum_to_the_prompt(cached: int) -> None:
    events: list[Event] = [TextDelta(0, "a"), Finish(0, "stop"), Usage(7, 1, cached)]
    stream = events_of(request(), events)
    usages = [stream[0]["message"]["usage"], stream[-2]["usage"], body_of(request(), events)["usage"]]
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert [sum(usage[name] for name in names) for usage in usages] == [7, 7, 7]
    assert usages[1]["cache_read_input_tokens"] == cached


def test_thinking_not_asked_for_is_not_sent() -> None:
    events: list[Event] = [ReasoningDelta(0, "hm"), TextDelta(0, "a"), Finish(0, "stop"), USAGE]
    hidden = request(REASONINGS[2])
    assert [event["type"] for event in events_of(hidden, events)].count("content_block_start") == 1
    assert [block["type"] for block in body_of(hidden, events)["content"]] == ["text"]


def test_omitted_thinking_is_an_empty_signed_block() -> None:
    events: list[Event] = [ReasoningDelta(0, "hm"), TextDelta(0, "a"), Finish(0, "stop"), USAGE]
    omitted = request(REASONINGS[1])
    assert "hm" not in json.dumps([events_of(omitted, events), body_of(omitted, events)])
    block = body_of(omitted, events)["content"][0]
    assert block["thinking"] == ""
    assert block["signature"]


def test_an_omitted_thought_comes_back_by_its_signature() -> None:
    events: list[Event] = [
        ReasoningDelta(0, "h"),
        ReasoningDelta(0, "m é"),
        TextDelta(0, "a"),
        Finish(0, "stop"),
        USAGE,
    ]
    omitted = request(REASONINGS[1])
    block = body_of(omitted, events)["content"][0]
    streamed = [e["delta"] for e in events_of(omitted, events) if e["type"] == "content_block_delta"]
    assert streamed[0] == {"type": "signature_delta", "signature": block["signature"]}
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [block]}]
    again = anthropic_messages.parse(json.dumps({"model": "m", "max_tokens": 9, "messages": history}).encode())
    assert again.turns[1].parts == (ThinkingPart("hm é", block["signature"]),)
    foreign = [{**block, "signature": "EqQBCgIYAhIM…"}]
    history[1]["content"] = foreign
    again = anthropic_messages.parse(json.dumps({"model": "m", "max_tokens": 9, "messages": history}).encode())
    assert again.turns[1].parts == ()


def test_each_omitted_thought_has_its_own_signature() -> None:
    events: list[Event] = [ReasoningDelta(0, "a"), TextDelta(0, "x"), ReasoningDelta(0, "b"), Finish(0, "stop"), USAGE]
    omitted = request(REASONINGS[1])
    whole = [block.get("signature") for block in body_of(omitted, events)["content"]]
    deltas = [event["delta"].get("signature") for event in events_of(omitted, events) if "delta" in event]
    assert [signature for signature in deltas if signature] == [whole[0], whole[2]]
    assert whole[0] != whole[2]


def test_nothing_generated_is_no_block() -> None:
    events: list[Event] = [ReasoningDelta(0, ""), TextDelta(0, ""), Finish(0, "length"), USAGE]
    assert [event["type"] for event in events_of(request(), events)] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    assert body_of(request(), events)["content"] == []


def test_a_call_without_arguments_has_an_empty_object() -> None:
    events: list[Event] = [ToolCallStart(0, 0, "a", "f"), ToolCallEnd(0, 0), Finish(0, "tool_calls"), USAGE]
    assert events_of(request(), events)[2]["delta"] == {"type": "input_json_delta", "partial_json": "{}"}
    assert body_of(request(), events)["content"][0]["input"] == {}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
        ("[1]", {}),
        ("[" * 100_000, {}),
    ],
)
def test_input_is_an_object_whatever_the_model_wrote(arguments: str, value: Any) -> None:
    events: list[Event] = [ToolCallStart(0, 0, "a", "f"), ToolCallArguments(0, 0, arguments), ToolCallEnd(0, 0)]
    body = body_of(request(), [*events, Finish(0, "tool_calls"), USAGE])
    assert body["content"][0]["input"] == value


def test_a_failure_is_one_error_event_and_nothing_after_it() -> None:
    error = ApiError("overloaded", "no room", retry_after=5)
    projector = anthropic_messages.Projector(request(), **IDENTITY)
    projector.begin(3)
    projector.feed(TextDelta(0, "a"))
    (event,) = sse_events(projector.feed(Failure(error)), 1000)
    assert event.event == "error"
    assert json.loads(event.data) == {"type": "error", "error": {"type": "overloaded_error", "message": "no room"}}
    assert projector.feed(TextDelta(0, "a")) == projector.end() == projector.ping() == projector.fail(error) == b""
    with pytest.raises(ApiError):
        anthropic_messages.Collector(request(), **IDENTITY).feed(Failure(error))


def test_a_stream_without_usage_cannot_end_and_an_unfinished_answer_has_no_body() -> None:
    projector = anthropic_messages.Projector(request(), **IDENTITY)
    with pytest.raises(RuntimeError):
        projector.feed(USAGE)
    projector.feed(Finish(0, "stop"))
    with pytest.raises(RuntimeError):
        projector.end()
    with pytest.raises(RuntimeError):
        anthropic_messages.Collector(request(), **IDENTITY).body()


def test_the_official_client_reads_the_stream(anthropic_client: Any) -> None:
    events: list[Event] = [
        ReasoningDelta(0, "hm"),
        TextDelta(0, "42 🙂"),
        ToolCallStart(0, 0, "ab", "f"),
        ToolCallArguments(0, 0, '{"a": [1, 2]}'),
        ToolCallEnd(0, 0),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    stream = stream_bytes(anthropic_messages.Projector(request(), **IDENTITY), events, pings=True)
    client: anthropic.Anthropic = anthropic_client(200, "text/event-stream", stream)
    with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "q"}]) as reader:
        message = reader.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[1].text == "42 🙂"  # type: ignore[union-attr]
    assert message.content[2].input == {"a": [1, 2]}  # type: ignore[union-attr]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("tool_use", 5, 5)


def test_the_official_client_raises_a_mid_stream_error(anthropic_client: Any) -> None:
    projector = anthropic_messages.Projector(request(), **IDENTITY)
    stream = projector.begin(3) + projector.feed(TextDelta(0, "a")) + projector.fail(ApiError("internal", "gone"))
    client: anthropic.Anthropic = anthropic_client(200, "text/event-stream", stream)
    with (
        pytest.raises(anthropic.APIStatusError, match="gone"),
        client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "q"}]) as reader,
    ):
        reader.until_done()


def test_ids_are_unique_and_in_the_official_alphabet() -> None:
    ids = {anthropic_messages.new_response_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"msg_[a-zA-Z0-9]+", response_id) for response_id in ids)
