"""The SDKs' own readers of server-sent events hear every event of every dialect, however the stream is cut."""

from __future__ import annotations

import json
from typing import Any

import anthropic._streaming
import openai._streaming
import pytest
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_core.dialects.event_streams import event_streams, sse_events, stream_bytes

IDENTITY: dict[str, Any] = {"response_id": "x_1", "created": 1, "model": "m"}
COMPLETION = openai_completions.parse(json.dumps({"model": "m", "prompt": "hi"}).encode())
SDKS: dict[str, tuple[Any, Any, Request]] = {
    "chat": (openai_chat, openai._streaming.SSEDecoder, Request(model="m")),
    "completions": (openai_completions, openai._streaming.SSEDecoder, COMPLETION),
    "responses": (openai_responses, openai._streaming.SSEDecoder, Request(model="m")),
    "messages": (anthropic_messages, anthropic._streaming.SSEDecoder, Request(model="m")),
}


@pytest.mark.parametrize("name", SDKS)
@given(data=st.data(), cuts=st.lists(st.integers(0, 4000), max_size=40))
def test_an_sdk_hears_what_was_sent_wherever_the_stream_is_cut(name: str, data: st.DataObject, cuts: list[int]) -> None:
    dialect, decoder, request = SDKS[name]
    events = data.draw(event_streams(num_choices=1, tools=name != "completions"))
    stream = stream_bytes(dialect.Projector(request, **IDENTITY), events, pings=True)
    places = sorted({min(cut, len(stream)) for cut in cuts})
    parts = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
    heard = [(event.event, event.data) for event in decoder().iter_bytes(iter(parts)) if event.data]
    named = dialect in (openai_responses, anthropic_messages)
    assert heard == [(sent.event if named else None, sent.data) for sent in sse_events(stream, 1000)]
