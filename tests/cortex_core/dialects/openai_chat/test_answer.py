"""Chat chunks and bodies: exact shapes, and what the official SDK makes of them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import openai
import pytest
from cortex_core.conversation import Reasoning, Request, ToolDefinition
from cortex_core.dialects import openai_chat
from cortex_core.errors import ApiError
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    TopLogprob,
    Usage,
)
from hypothesis import given
from hypothesis import strategies as st
from openai._models import construct_type_unchecked
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.cortex_core.dialects.event_streams import collected, event_streams, sse_events, stream_bytes

IDENTITY: dict[str, Any] = {"response_id": "chatcmpl-1", "created": 1_760_000_000, "model": "org/name"}
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1)
EXTENSIONS = {"reasoning", "reasoning_content"}
TOOLS = (ToolDefinition("get_weather"), ToolDefinition("sh", is_freeform=True))


def request(**changes: Any) -> Request:
    return msgspec.structs.replace(Request(model="org/name"), **changes)


def chunks_of(request: Request, events: list[Event], chunk_size: int = 1000) -> list[dict[str, Any]]:
    stream = stream_bytes(openai_chat.Projector(request, **IDENTITY), events)
    *data, done = sse_events(stream, chunk_size)
    assert all(event.event is None for event in data)
    assert done.data == "[DONE]"
    return [json.loads(event.data) for event in data]


def deltas_of(request: Request, events: list[Event]) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks_of(request, events) for choice in chunk["choices"]]


def unknown_fields(model: BaseModel) -> set[str]:
    """Fields that the SDK's types do not declare, at any depth."""
    found = set(model.model_extra or ())
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found |= unknown_fields(item)
    return found


@given(st.data())
def test_the_official_accumulator_rebuilds_what_the_collector_says(data: st.DataObject) -> None:
    num_choices = data.draw(st.integers(1, 3), "num_choices")
    logprobs = data.draw(st.sampled_from([None, 0, 2]), "logprobs")
    asked = request(num_choices=num_choices, logprobs=logprobs, include_usage=True, tools=TOOLS)
    names = ("get_weather", "a.b-c", "sh")
    events = data.draw(event_streams(num_choices=num_choices, top_logprobs=logprobs, names=names), "events")
    state = ChatCompletionStreamState()
    finishes = [0] * num_choices
    for chunk in chunks_of(asked, events, data.draw(st.integers(1, 200), "chunk_size")):
        typed = construct_type_unchecked(value=chunk, type_=ChatCompletionChunk)
        if b"custom" not in json.dumps(chunk).encode():  # the wire's form, which the SDK's types do not declare
            assert unknown_fields(ChatCompletionChunk.model_validate(chunk)) <= EXTENSIONS
        for choice in typed.choices:
            assert not finishes[choice.index], "nothing follows the finish of a choice"
            finishes[choice.index] += choice.finish_reason is not None
        state.handle_chunk(typed)
    assert finishes == [1] * num_choices

    streamed = state.current_completion_snapshot
    body = ChatCompletion.model_validate(collected(openai_chat.Collector(asked, **IDENTITY), events))
    assert unknown_fields(body) <= EXTENSIONS
    assert streamed.usage == body.usage
    for live, whole in zip(streamed.choices, body.choices, strict=True):
        assert live.finish_reason == whole.finish_reason
        assert (live.message.content or "") == (whole.message.content or "")
        assert (live.message.model_extra or {}) == (whole.message.model_extra or {})
        assert call_tuples(live.message.tool_calls) == call_tuples(whole.message.tool_calls)
        assert logprob_list(live) == logprob_list(whole)


def call_tuples(calls: Any) -> list[tuple[str, str, str]]:
    found = []
    for call in calls or ():
        if call.type == "custom":
            custom = call.custom if isinstance(call.custom, dict) else call.custom.model_dump()
            found.append((call.id, custom["name"], custom["input"]))
        else:
            found.append((call.id, call.function.name, call.function.arguments))
    return found


def logprob_list(choice: Any) -> Any:
    return [] if choice.logprobs is None else [entry.model_dump() for entry in choice.logprobs.content or ()]


def test_the_first_chunk_of_each_choice_has_role_and_empty_content() -> None:
    projector = openai_chat.Projector(request(num_choices=2), **IDENTITY)
    chunks = [json.loads(event.data) for event in sse_events(projector.begin(7), 1000)]
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
        [{"index": 1, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
    ]


def test_a_whole_stream_chunk_by_chunk() -> None:
    events: list[Event] = [
        ReasoningDelta(0, "hm"),
        TextDelta(0, 'a "quoted" word'),
        ToolCallStart(0, 0, "ab12", "get_weather"),
        ToolCallArguments(0, 0, '{"city":'),
        ToolCallArguments(0, 0, '"Paris"}'),
        ToolCallEnd(0, 0),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    assert deltas_of(request(), events) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm", "reasoning": "hm"},
        {"content": 'a "quoted" word'},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "call_ab12",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {},
    ]


def test_envelope_fields_are_the_same_in_every_chunk() -> None:
    for chunk in chunks_of(request(), [TextDelta(0, "a"), Finish(0, "stop"), USAGE]):
        assert {name: chunk[name] for name in ("id", "object", "created", "model")} == {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1_760_000_000,
            "model": "org/name",
        }
        assert chunk["choices"]


def test_usage_comes_last_with_no_choices_and_is_null_before_when_asked_for() -> None:
    *before, last = chunks_of(request(include_usage=True), [TextDelta(0, "a"), Finish(0, "stop"), USAGE])
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in before)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }


def test_there_is_no_usage_when_not_asked_for() -> None:
    chunks = chunks_of(request(), [TextDelta(0, "a"), Finish(0, "stop"), USAGE])
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [
        ("stop", "stop"),
        ("stop_sequence", "stop"),
        ("length", "length"),
        ("tool_calls", "tool_calls"),
        ("content_filter", "content_filter"),
    ],
)
def test_finish_reasons(reason: Any, finish_reason: str) -> None:
    events: list[Event] = [Finish(0, reason), USAGE]
    assert chunks_of(request(), events)[-1]["choices"] == [{"index": 0, "delta": {}, "finish_reason": finish_reason}]
    body = collected(openai_chat.Collector(request(), **IDENTITY), events)
    assert body["choices"][0]["finish_reason"] == finish_reason


def test_a_call_cut_by_the_limit_finishes_with_length() -> None:
    events: list[Event] = [ToolCallStart(0, 0, "a", "f"), ToolCallArguments(0, 0, '{"ci'), Finish(0, "length"), USAGE]
    body = collected(openai_chat.Collector(request(), **IDENTITY), events)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


@pytest.mark.parametrize("start", [None, ToolCallArguments(0, 0, "")])
def test_a_call_without_arguments_has_an_empty_object(start: Event | None) -> None:
    events: list[Event] = [ToolCallStart(0, 0, "a", "f"), ToolCallEnd(0, 0), Finish(0, "tool_calls"), USAGE]
    if start is not None:
        events.insert(1, start)
    assert {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]} in deltas_of(request(), events)
    body = collected(openai_chat.Collector(request(), **IDENTITY), events)
    assert body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_empty_deltas_are_not_sent() -> None:
    projector = openai_chat.Projector(request(), **IDENTITY)
    assert projector.feed(TextDelta(0, "")) == b""
    assert projector.feed(ReasoningDelta(0, "")) == b""
    projector.feed(ToolCallStart(0, 0, "a", "f"))
    assert projector.feed(ToolCallArguments(0, 0, "")) == b""


def test_logprobs_are_sorted_into_the_official_shape_and_stay_finite() -> None:
    top = (TopLogprob("A", -0.1, (65,)), TopLogprob("�", float("-inf"), None))
    event = TextDelta(0, "A", (TokenLogprob("A", -0.1, (65,), top),))
    content = [
        {
            "token": "A",
            "logprob": -0.1,
            "bytes": [65],
            "top_logprobs": [
                {"token": "A", "logprob": -0.1, "bytes": [65]},
                {"token": "�", "logprob": -9999.0, "bytes": None},
            ],
        }
    ]
    events: list[Event] = [event, Finish(0, "stop"), USAGE]
    chunk = chunks_of(request(logprobs=2), events)[1]
    assert chunk["choices"][0]["logprobs"] == {"content": content, "refusal": None}
    body = collected(openai_chat.Collector(request(logprobs=2), **IDENTITY), events)
    assert body["choices"][0]["logprobs"] == {"content": content, "refusal": None}
    assert collected(openai_chat.Collector(request(), **IDENTITY), events)["choices"][0]["logprobs"] is None
    assert "logprobs" not in chunks_of(request(), events)[1]["choices"][0]


def test_a_token_that_completes_no_character_still_carries_its_logprob() -> None:
    event = TextDelta(0, "", (TokenLogprob("�", -1.0, (240,)),))
    choice = chunks_of(request(logprobs=0), [event, Finish(0, "stop"), USAGE])[1]["choices"][0]
    assert choice["delta"] == {"content": ""}
    assert choice["logprobs"]["content"][0]["bytes"] == [240]


@pytest.mark.parametrize(
    ("events", "content"),
    [
        ([], ""),
        ([ReasoningDelta(0, "hm")], ""),
        ([ToolCallStart(0, 0, "a", "f"), ToolCallEnd(0, 0)], None),
        ([TextDelta(0, "t"), ToolCallStart(0, 0, "a", "f"), ToolCallEnd(0, 0)], "t"),
    ],
)
def test_content_is_null_only_beside_tool_calls_alone(events: list[Event], content: str | None) -> None:
    body = collected(openai_chat.Collector(request(), **IDENTITY), [*events, Finish(0, "stop"), USAGE])
    message = body["choices"][0]["message"]
    assert message["content"] == content
    assert message["refusal"] is None
    assert ("tool_calls" in message) == any(isinstance(event, ToolCallStart) for event in events)


def test_reasoning_that_is_not_to_be_seen_is_not_sent() -> None:
    hidden = request(reasoning=Reasoning(visible=False))
    events: list[Event] = [ReasoningDelta(0, "hm"), TextDelta(0, "a"), Finish(0, "stop"), USAGE]
    assert "reasoning" not in json.dumps(deltas_of(hidden, events))
    assert "reasoning" not in json.dumps(collected(openai_chat.Collector(hidden, **IDENTITY), events)["choices"])


def test_a_failure_is_one_error_event_and_nothing_after_it() -> None:
    error = ApiError("internal", "the engine died", code="engine_died")
    projector = openai_chat.Projector(request(), **IDENTITY)
    (event,) = sse_events(projector.feed(Failure(error)), 1000)
    assert event.event is None
    assert json.loads(event.data) == {
        "error": {"message": "the engine died", "type": "server_error", "param": None, "code": "engine_died"}
    }
    assert projector.feed(TextDelta(0, "a")) == projector.end() == projector.ping() == projector.fail(error) == b""
    with pytest.raises(ApiError):
        openai_chat.Collector(request(), **IDENTITY).feed(Failure(error))


def test_a_stream_without_usage_cannot_end_and_an_unfinished_answer_has_no_body() -> None:
    projector = openai_chat.Projector(request(), **IDENTITY)
    with pytest.raises(RuntimeError):
        projector.end()
    collector = openai_chat.Collector(request(), **IDENTITY)
    collector.feed(USAGE)
    with pytest.raises(RuntimeError):
        collector.body()


def test_the_official_client_reads_the_stream(openai_client: Any) -> None:
    events: list[Event] = [
        ReasoningDelta(0, "hm"),
        TextDelta(0, "4"),
        TextDelta(0, "2 🙂"),
        Finish(0, "stop"),
        USAGE,
    ]
    stream = stream_bytes(openai_chat.Projector(request(include_usage=True), **IDENTITY), events, pings=True)
    client: openai.OpenAI = openai_client(200, "text/event-stream", stream)
    chunks = list(
        client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "q"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "42 🙂"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 12


def test_the_official_client_raises_a_mid_stream_error(openai_client: Any) -> None:
    projector = openai_chat.Projector(request(), **IDENTITY)
    stream = projector.begin(3) + projector.feed(TextDelta(0, "a")) + projector.fail(ApiError("internal", "gone"))
    client: openai.OpenAI = openai_client(200, "text/event-stream", stream)
    with pytest.raises(openai.APIError, match="gone"):
        list(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "q"}], stream=True))


def test_response_ids_are_unique_and_prefixed() -> None:
    ids = {openai_chat.new_response_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(response_id.startswith("chatcmpl-") for response_id in ids)


def test_a_custom_tool_is_called_with_its_text() -> None:
    asked = request(tools=TOOLS)
    events: list[Event] = [
        ToolCallStart(0, 0, "ab", "sh"),
        ToolCallArguments(0, 0, '{"input": "echo \\"'),
        ToolCallArguments(0, 0, 'hi\\"\\n"}'),
        ToolCallEnd(0, 0),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    assert deltas_of(asked, events)[1:] == [
        {"tool_calls": [{"index": 0, "id": "call_ab", "type": "custom", "custom": {"name": "sh", "input": ""}}]},
        {"tool_calls": [{"index": 0, "custom": {"input": 'echo "'}}]},
        {"tool_calls": [{"index": 0, "custom": {"input": 'hi"\n'}}]},
        {},
    ]
    (choice,) = collected(openai_chat.Collector(asked, **IDENTITY), events)["choices"]
    call = {"id": "call_ab", "type": "custom", "custom": {"name": "sh", "input": 'echo "hi"\n'}}
    assert choice["message"]["tool_calls"] == [call]


@pytest.mark.parametrize("cut", [False, True])
def test_the_text_of_odd_arguments_comes_at_the_end_of_the_call(cut: bool) -> None:
    asked = request(tools=TOOLS)
    events: list[Event] = [ToolCallStart(0, 0, "ab", "sh"), ToolCallArguments(0, 0, '{"command":"ls"}')]
    events += [Finish(0, "length")] if cut else [ToolCallEnd(0, 0), Finish(0, "tool_calls")]
    deltas = deltas_of(asked, [*events, USAGE])
    assert deltas[-2:] == [{"tool_calls": [{"index": 0, "custom": {"input": "ls"}}]}, {}]
