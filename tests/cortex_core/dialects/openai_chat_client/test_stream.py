"""Answers of chat servers become events: what one side writes the other side reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat
from cortex_core.dialects.openai_chat_client import AnswerReader, StreamReader, write_request
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

from tests.cortex_core.dialects.event_streams import event_streams, sse_events, stream_bytes
from tests.cortex_core.dialects.rich_bodies import RICH_CHAT, RICH_MESSAGES

IDENTITY: dict[str, Any] = {"response_id": "chatcmpl-1", "created": 1_760_000_000, "model": "m"}


def read(stream: bytes, chunk_size: int = 1000, stop: tuple[str, ...] = ()) -> list[Event]:
    reader = StreamReader(stop)
    events: list[Event] = []
    for start in range(0, len(stream), chunk_size):
        events += reader.feed(stream[start : start + chunk_size])
    return events + reader.end()


def merged(events: list[Event], choice: int) -> list[Event]:
    """One choice's events with neighbouring deltas joined and empty ones dropped: no stream tells them apart."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, (Usage, Failure)) or event.choice != choice or is_empty(event):
            continue
        last = result[-1] if result else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            result[-1] = TextDelta(choice, last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            result[-1] = ReasoningDelta(choice, last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            result[-1] = ToolCallArguments(choice, event.index, last.fragment + event.fragment)
        elif isinstance(event, ToolCallEnd) and isinstance(last, ToolCallStart):
            result += [ToolCallArguments(choice, event.index, "{}"), event]
        elif isinstance(event, Finish) and event.reason == "stop_sequence":
            result.append(Finish(choice, "stop"))
        else:
            result.append(event)
    return result


def is_empty(event: Event) -> bool:
    if isinstance(event, ToolCallArguments):
        return not event.fragment
    return isinstance(event, (TextDelta, ReasoningDelta)) and not event.text


@given(st.data())
def test_the_reader_undoes_the_projector_under_any_chunking(data: st.DataObject) -> None:
    num_choices = data.draw(st.integers(1, 3))
    request = Request(model="m", num_choices=num_choices, include_usage=True)
    events = data.draw(event_streams(num_choices=num_choices))
    stream = stream_bytes(openai_chat.Projector(request, **IDENTITY), events, pings=True)
    heard = read(stream, data.draw(st.integers(1, 200)))
    assert heard[-1] == events[-1]
    for choice in range(num_choices):
        assert merged(heard, choice) == merged(events, choice)


def test_translation_is_composition() -> None:
    """A messages request reaches a chat server, and its chat stream comes back as a message stream."""
    asked = anthropic_messages.parse(json.dumps(RICH_MESSAGES).encode())
    seen = openai_chat.parse(write_request(asked, model="other"))
    assert seen.model == "other"
    answer: list[Event] = [
        ReasoningDelta(0, "hm"),
        ToolCallStart(0, 0, "ab", "f"),
        ToolCallArguments(0, 0, '{"a":1}'),
        ToolCallEnd(0, 0),
        Finish(0, "tool_calls"),
        Usage(7, 5, 2, 1),
    ]
    upstream = stream_bytes(openai_chat.Projector(seen, **IDENTITY), answer)
    direct = anthropic_messages.Projector(asked, **IDENTITY)
    translated = anthropic_messages.Projector(asked, **IDENTITY)
    assert sse_events(stream_bytes(translated, read(upstream)), 1000) == sse_events(stream_bytes(direct, answer), 1000)


def sse(*chunks: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def choice(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


DONE = b"data: [DONE]\n\n"


def test_a_whole_call_in_one_delta_without_id_or_index() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    events = read(sse(choice(role="assistant"), choice(tool_calls=[call, call]), choice("tool_calls")) + DONE)
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    assert [(start.index, start.name) for start in starts] == [(0, "f"), (1, "f")]
    assert starts[0].id != starts[1].id
    assert [event for event in events if not isinstance(event, ToolCallStart)] == [
        ToolCallArguments(0, 0, '{"a": 1}'),
        ToolCallEnd(0, 0),
        ToolCallArguments(0, 1, '{"a": 1}'),
        ToolCallEnd(0, 1),
        Finish(0, "tool_calls"),
        Usage(0, 2),
    ]


def test_empty_tool_calls_and_null_content_are_nothing() -> None:
    events = read(sse(choice(content="a", tool_calls=[]), choice(content=None), choice("stop", content="b")) + DONE)
    assert events == [TextDelta(0, "a"), TextDelta(0, "b"), Finish(0, "stop"), Usage(0, 2)]


def test_usage_with_details_and_in_the_last_choice_chunk() -> None:
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    assert read(sse({**choice("stop"), "usage": usage}) + DONE) == [Finish(0, "stop"), Usage(7, 5, 2, 1)]


STOP = ("END", "\n\nHuman:")
SAYS_STOPPED: list[tuple[str, dict[str, Any], Finish]] = [
    ("abc", {"finish_reason": "stop", "stop_reason": "END"}, Finish(0, "stop_sequence", "END")),  # vLLM
    ("abc", {"finish_reason": "stop", "stop_reason": None}, Finish(0, "stop")),
    ("abc", {"finish_reason": "stop", "stop_reason": 151645}, Finish(0, "stop")),
    (
        "abc",
        {"finish_reason": "stop", "matched_stop": "\n\nHuman:"},
        Finish(0, "stop_sequence", "\n\nHuman:"),
    ),  # SGLang
    ("abc", {"finish_reason": "stop", "matched_stop": 151645}, Finish(0, "stop")),
    ("abc", {"finish_reason": "stop", "stop_reason": "<|im_end|>"}, Finish(0, "stop")),  # one of the server's own
    ("abc", {"finish_reason": "stop", "stop_reason": {"of": "tomorrow"}}, Finish(0, "stop")),
    ("abc", {"finish_reason": "stop_sequence"}, Finish(0, "stop_sequence", None)),  # one of the two; it does not say
    ("abcEND", {"finish_reason": "stop_sequence"}, Finish(0, "stop_sequence", "END")),  # text-generation-inference
    ("abcEND", {"finish_reason": "stop"}, Finish(0, "stop_sequence", "END")),
    ("abcEND.", {"finish_reason": "stop"}, Finish(0, "stop")),
    ("abcEND", {"finish_reason": "length"}, Finish(0, "length")),
    ("abc", {"finish_reason": "stop"}, Finish(0, "stop")),  # the official API: it cannot be known
    ("abc", {"finish_reason": "eos_token"}, Finish(0, "stop")),
]


@pytest.mark.parametrize(("text", "said", "finish"), SAYS_STOPPED)
def test_which_stop_string_ended_an_answer_as_far_as_the_server_lets_one_know(
    text: str, said: dict[str, Any], finish: Finish
) -> None:
    pieces = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in text]
    stream = b"".join(map(sse, pieces)) + sse({"choices": [{"index": 0, "delta": {}, **said}]}) + DONE
    assert read(stream, stop=STOP)[-2] == finish
    reader = AnswerReader(STOP)
    reader.feed(json.dumps({"choices": [{"index": 0, "message": {"content": text}, **said}]}).encode())
    assert reader.end()[-2] == finish


def test_a_stop_string_nobody_asked_for_ends_nothing_but_the_turn() -> None:
    for said in ({"finish_reason": "stop", "stop_reason": "END"}, {"finish_reason": "stop_sequence"}):
        assert read(sse({"choices": [{"index": 0, "delta": {}, **said}]}) + DONE)[0] == Finish(0, "stop")


def test_the_only_stop_string_is_the_one_that_was_met() -> None:
    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop_sequence"}]}
    assert read(sse(chunk) + DONE, stop=("END",))[0] == Finish(0, "stop_sequence", "END")


def test_logprobs_are_read() -> None:
    entry = {
        "token": "a",
        "logprob": -1.5,
        "bytes": [97],
        "top_logprobs": [{"token": "b", "logprob": -2, "bytes": None}],
    }
    chunk = {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [entry]}}]}
    (event, *_) = read(sse(chunk, choice("stop")) + DONE)
    assert event == TextDelta(0, "a", (TokenLogprob("a", -1.5, (97,), (TopLogprob("b", -2.0),)),))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (sse(choice(content="a")), "ended before"),
        (b"", "ended before"),
        (DONE, "ended before"),
        (b"data: {nonsense\n\n", "cannot be read"),
        (b'data: {"choices": 3}\n\n', "cannot be read"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "cannot be read"),
        (sse({"error": {"message": "out of memory", "code": "oom"}}), "out of memory"),
        (sse({"error": "out of memory"}), "out of memory"),
        (
            sse(
                choice(tool_calls=[{"index": 0, "function": {"name": "f"}}]),
                choice(content="a"),
                choice(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]),
            ),
            "resumed a tool call",
        ),
    ],
)
def test_a_stream_that_goes_wrong_ends_in_one_failure(stream: bytes, message: str) -> None:
    *before, last = read(stream + sse(choice(content="late")) if message != "ended before" else stream)
    assert isinstance(last, Failure)
    assert message in last.error.message
    assert not any(isinstance(event, (Failure, Usage)) for event in before)


def test_of_calls_that_are_mixed_and_cut_off_only_the_last_has_no_end() -> None:
    first = {"index": 1, "id": "call_a", "function": {"name": "f", "arguments": '{"a"'}}
    second = {"index": 2, "id": "call_b", "function": {"name": "g", "arguments": '{"b"'}}
    events = read(sse(choice(tool_calls=[first]), choice(tool_calls=[second]), choice("length")) + DONE)
    assert events[:-1] == [
        ToolCallStart(0, 0, "a", "f"),
        ToolCallArguments(0, 0, '{"a"'),
        ToolCallEnd(0, 0),
        ToolCallStart(0, 1, "b", "g"),
        ToolCallArguments(0, 1, '{"b"'),
        Finish(0, "length"),
    ]


def test_a_stream_that_breaks_off_is_worth_a_retry() -> None:
    (*_, last) = read(sse(choice(content="a")))
    assert isinstance(last, Failure)
    assert (last.error.status, last.error.is_retryable) == (502, True)


def test_a_stream_that_lacks_only_its_end_marker_is_whole() -> None:
    assert read(sse(choice(content="a"), choice("stop")))[-1] == Usage(0, 1)


@given(
    st.binary(max_size=100),
    st.lists(st.sampled_from([b"data: ", b"\n\n", b'{"choices":[{"delta":', b"}]}", b"[DONE]"])),
)
def test_any_bytes_end_in_one_terminal_event(noise: bytes, pieces: list[bytes]) -> None:
    events = read(b"".join(pieces) + noise)
    assert sum(isinstance(event, (Failure, Usage)) for event in events) == 1
    assert isinstance(events[-1], (Failure, Usage))


@given(event_streams(num_choices=2, top_logprobs=None))
def test_an_answer_in_one_piece_says_what_its_stream_says(events: list[Event]) -> None:
    seen = openai_chat.parse(json.dumps({**RICH_CHAT, "n": 2, "stream": False}).encode())
    collector = openai_chat.Collector(seen, **IDENTITY)
    for event in events:
        collector.feed(event)
    reader = AnswerReader()
    assert reader.feed(collector.body()) == []
    projected = openai_chat.Collector(seen, **IDENTITY)
    for event in reader.end():
        projected.feed(event)
    assert json.loads(projected.body()) == json.loads(collector.body())
    assert reader.end() == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", "ended before"),
        (b'{"choices": [{"index": 0, "message": {"content": "a"}}]}', "ended before"),
        (b'{"error": {"message": "out of memory"}}', "out of memory"),
    ],
)
def test_an_answer_that_is_none_ends_in_one_failure(answer: bytes, message: str) -> None:
    reader = AnswerReader()
    reader.feed(answer[:3])
    reader.feed(answer[3:])
    last = reader.end()[-1]
    assert isinstance(last, Failure) and message in last.error.message
