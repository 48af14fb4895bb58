"""The event stream's parts: told apart by their tags, ended in words that every dialect has, and never changed."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from cortex_core.conversation import RawPrompt, Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from cortex_core.errors import ApiError
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    TopLogprob,
    Usage,
)
from msgspec import json as msgspec_json

IDENTITY: dict[str, Any] = {"response_id": "id_1", "created": 1_760_000_000, "model": "m"}
WRITTEN: list[Event] = [
    ReasoningDelta(0, "hm"),
    TextDelta(1, "a", (TokenLogprob("a", -0.5, (97,), (TopLogprob("b", -1.0),)),)),
    ToolCallStart(0, 0, "ab", "f"),
    ToolCallArguments(0, 0, "{}"),
    ToolCallEnd(0, 0),
    Finish(0, "stop_sequence", "END"),
    Usage(7, 5, 2, 1),
]


def test_events_that_look_alike_are_told_apart_when_they_are_read() -> None:
    serialisable = ReasoningDelta | TextDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Finish | Usage
    text = msgspec_json.encode(WRITTEN)
    assert msgspec_json.decode(text, type=list[serialisable]) == WRITTEN  # type: ignore[valid-type]
    assert set(get_args(Event)) == {*(type(event) for event in WRITTEN), Failure}, "a new event belongs here too"


def test_a_failure_holds_an_exception_and_stays_here() -> None:
    with pytest.raises(TypeError):
        msgspec_json.encode(Failure(ApiError("internal", "x")))


@pytest.mark.parametrize("event", WRITTEN, ids=lambda event: type(event).__name__)
def test_an_event_that_was_given_out_is_never_changed(event: Any) -> None:
    with pytest.raises(AttributeError):
        setattr(event, event.__struct_fields__[0], 9)


@pytest.mark.parametrize("reason", get_args(FinishReason))
@pytest.mark.parametrize("dialect", [openai_chat, openai_completions, openai_responses, anthropic_messages])
def test_every_reason_to_end_has_a_word_in_every_dialect(dialect: Any, reason: FinishReason) -> None:
    collector = dialect.Collector(Request("m", prompts=(RawPrompt("x"),)), **IDENTITY)
    for event in (TextDelta(0, "a"), Finish(0, reason), Usage(1, 1)):
        collector.feed(event)
    body = json.loads(collector.body())
    said = body.get("stop_reason") or body.get("status") or body["choices"][0]["finish_reason"]
    assert said in {
        *("stop", "length", "tool_calls", "content_filter"),
        *("completed", "incomplete", "end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"),
    }
