"""Translation is composition: messages and responses in front of a server that speaks nothing but chat."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_responses
from cortex_core.dialects.openai_chat_client import StreamReader, write_request
from cortex_core.errors import ApiError
from cortex_core.events import Event, Failure, Finish, TextDelta, Usage
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_core.dialects.event_streams import collected, event_streams, sse_events, stream_bytes
from tests.cortex_core.dialects.rich_bodies import RICH_MESSAGES, RICH_RESPONSES

TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object"}},
    {"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "find"}]},
    {"type": "custom", "name": "sh"},
]
NAMES = ("get_weather", "a__find", "sh")
RESPONSES: dict[str, Any] = {
    "model": "m",
    "input": "hi",
    "tools": TOOLS,
    "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    "top_logprobs": 2,
}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"name": name, "input_schema": {"type": "object"}} for name in NAMES],
    "thinking": {"type": "adaptive"},
}
DIALECTS: list[tuple[Any, dict[str, Any]]] = [(openai_responses, RESPONSES), (anthropic_messages, MESSAGES)]


def identity(dialect: ModuleType) -> dict[str, Any]:
    own: dict[str, Any] = {"response_id": "resp_1", "created": 1, "model": "m"}
    return {**own, "clock": lambda: 9.0} if dialect is openai_responses else own


def upstream(asked: Request, events: list[Event]) -> bytes:
    """What a chat server streams for this request."""
    seen = openai_chat.parse(write_request(asked, model="other"))
    projector = openai_chat.Projector(seen, response_id="chatcmpl-1", created=1, model="other")
    return stream_bytes(projector, events, pings=True)


def read(stream: bytes, chunk_size: int) -> list[Event]:
    reader = StreamReader()
    events: list[Event] = []
    for start in range(0, len(stream), chunk_size):
        events += reader.feed(stream[start : start + chunk_size])
    return events + reader.end()


@pytest.mark.parametrize(("dialect", "body"), DIALECTS, ids=["responses", "messages"])
@given(data=st.data())
def test_an_answer_through_chat_equals_the_native_one(dialect: Any, body: dict[str, Any], data: st.DataObject) -> None:
    asked = dialect.parse(json.dumps(body).encode())
    events = data.draw(event_streams(num_choices=1, top_logprobs=asked.logprobs, names=NAMES))
    heard = read(upstream(asked, events), data.draw(st.integers(1, 200)))
    native = collected(dialect.Collector(asked, **identity(dialect)), as_chat_can_say(events))
    assert collected(dialect.Collector(asked, **identity(dialect)), heard) == native
    streamed = sse_events(stream_bytes(dialect.Projector(asked, **identity(dialect)), heard), 1000)
    final = json.loads(streamed[-1].data)
    if dialect is openai_responses:
        assert final["response"] == native
    else:
        assert final == {"type": "message_stop"}


def as_chat_can_say(events: list[Event]) -> list[Event]:
    """Chat has one word for both kinds of stop."""
    return [
        Finish(event.choice, "stop") if isinstance(event, Finish) and event.reason == "stop_sequence" else event
        for event in events
    ]


@pytest.mark.parametrize(
    ("dialect", "body"),
    [(openai_responses, RICH_RESPONSES), (anthropic_messages, RICH_MESSAGES)],
    ids=["responses", "messages"],
)
def test_a_request_through_chat_asks_the_same(dialect: Any, body: dict[str, Any]) -> None:
    asked: Request = dialect.parse(json.dumps(body).encode())
    seen = openai_chat.parse(write_request(asked))
    assert [turn.role for turn in seen.turns] == [turn.role for turn in asked.turns]
    assert [turn.text() for turn in seen.turns] == [turn.text() for turn in asked.turns]
    assert [tool.name for tool in seen.tools] == [tool.name for tool in asked.tools]
    assert [tool.parameters for tool in seen.tools] == [tool.parameters for tool in asked.tools]
    for name in ("tool_choice", "parallel_tool_calls", "sampling", "limits", "logprobs"):
        assert getattr(seen, name) == getattr(asked, name), name
    assert schema_of(seen) == schema_of(asked)


def schema_of(request: Request) -> Any:
    return None if request.response_format is None else request.response_format.schema


@pytest.mark.parametrize(("dialect", "body"), DIALECTS, ids=["responses", "messages"])
def test_a_chat_stream_that_breaks_off_fails_in_the_callers_dialect(dialect: Any, body: dict[str, Any]) -> None:
    asked = dialect.parse(json.dumps(body).encode())
    whole = upstream(asked, [TextDelta(0, "forty-two"), Finish(0, "stop"), Usage(3, 2)])
    heard = read(whole[: whole.index(b'"finish_reason":"stop"')], 50)
    assert isinstance(heard[-1], Failure)
    projector = dialect.Projector(asked, **identity(dialect))
    stream = projector.begin(3) + b"".join(map(projector.feed, heard))
    last = sse_events(stream, 1000)[-1]
    assert last.event == ("response.failed" if dialect is openai_responses else "error")
    with pytest.raises(ApiError):
        collected(dialect.Collector(asked, **identity(dialect)), heard)


def test_an_error_of_the_chat_server_names_the_callers_field() -> None:
    asked = openai_responses.parse(json.dumps(RESPONSES).encode())
    with pytest.raises(ApiError) as caught, asked.own_words():
        raise ApiError("invalid_request", "too long", code="context_length_exceeded", param="messages")
    assert caught.value.param == "input"
