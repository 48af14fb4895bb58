"""What an answer costs at its end: nothing that grows with how it was asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.dialects import openai_chat, openai_responses
from cortex_core.events import Finish, TextDelta, TokenLogprob, TopLogprob, Usage

from tests.counting import steps

TOPS = tuple(TopLogprob("b", -2.0, (98,)) for _ in range(20))


def fed(reader: Any, count: int) -> Any:
    for _ in range(count):
        reader.feed(TextDelta(0, "a", (TokenLogprob("a", -1.0, (97,), TOPS),)))
    return reader


def asked(dialect: Any) -> Any:
    body: dict[str, Any] = {"model": "m", "input": "hi", "messages": [{"role": "user", "content": "hi"}]}
    return dialect.parse(json.dumps({**body, "top_logprobs": 20, "logprobs": True}).encode())


@pytest.mark.parametrize("dialect", [openai_responses, openai_chat])
@pytest.mark.parametrize("form", ["Projector", "Collector"])
def test_log_probabilities_are_written_as_they_come(dialect: Any, form: str) -> None:
    """32,000 tokens with 20 candidates each were eight seconds at the end of a stream of responses."""

    def at_the_end(count: int) -> int:
        reader = getattr(dialect, form)(asked(dialect), response_id="resp_1", created=1, model="m")
        if form == "Projector":
            reader.begin(1)
        fed(reader, count)

        def end() -> None:
            reader.feed(Finish(0, "stop"))
            reader.feed(Usage(1, count))
            answer = reader.end() if form == "Projector" else reader.body()
            assert (dialect is openai_chat and form == "Projector") or answer.count(b'"token":"a"') == count

        return steps(end)

    assert at_the_end(200) == at_the_end(20)
