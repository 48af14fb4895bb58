"""All dialects keep one contract, so that a server can hold any of them in one variable."""

from __future__ import annotations

import pytest
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from cortex_core.dialects.interface import Dialect
from cortex_core.events import Event, Finish, TextDelta, Usage

REQUESTS = {
    "chat": b'{"model": "m", "messages": [{"role": "user", "content": "q"}]}',
    "completions": b'{"model": "m", "prompt": "q"}',
    "responses": b'{"model": "m", "input": "q"}',
    "messages": b'{"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "q"}]}',
}
DIALECTS: dict[str, Dialect] = {
    "chat": openai_chat,
    "completions": openai_completions,
    "responses": openai_responses,
    "messages": anthropic_messages,
}
ANSWER: list[Event] = [TextDelta(0, "forty-two"), Finish(0, "stop"), Usage(3, 2)]


@pytest.mark.parametrize("name", DIALECTS)
def test_a_server_needs_to_know_nothing_but_the_interface(name: str) -> None:
    dialect = DIALECTS[name]
    request = dialect.parse(REQUESTS[name])
    response_id = dialect.new_response_id()
    projector = dialect.Projector(request, response_id=response_id, created=1, model=request.model)
    collector = dialect.Collector(request, response_id=response_id, created=1, model=request.model)
    stream = projector.begin(3) + projector.ping()
    for event in ANSWER:
        stream += projector.feed(event)
        collector.feed(event)
    stream += projector.end()
    assert projector.end() == b"", "the end comes once"
    for whole in (stream, collector.body()):
        assert b"forty-two" in whole
        assert response_id.encode() in whole
