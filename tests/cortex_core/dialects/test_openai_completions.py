"""Completions: raw prompts in, text out, log-probabilities in the column-wise format."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import openai
import pytest
from cortex_core.conversation import Limits, RawPrompt, Request, Sampling
from cortex_core.dialects import openai_completions
from cortex_core.errors import ApiError
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from pydantic import ValidationError

from tests.cortex_core.dialects.event_streams import collected, event_streams, sse_events, stream_bytes

IDENTITY: dict[str, Any] = {"response_id": "cmpl-1", "created": 1_760_000_000, "model": "org/name"}
USAGE = Usage(prompt_tokens=7, completion_tokens=5)


def parse(**fields: Any) -> Request:
    return openai_completions.parse(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


def chunks_of(request: Request, events: list[Event], chunk_size: int = 1000) -> list[dict[str, Any]]:
    stream = stream_bytes(openai_completions.Projector(request, **IDENTITY), events)
    *data, done = sse_events(stream, chunk_size)
    assert done.data == "[DONE]"
    return [json.loads(event.data) for event in data]


def body_of(request: Request, events: list[Event]) -> Any:
    return collected(openai_completions.Collector(request, **IDENTITY), events)


# Requests


def test_a_plain_request_has_the_official_default_of_sixteen_tokens() -> None:
    assert parse() == Request(model="m", prompts=(RawPrompt("hi"),), limits=Limits(16))
    assert parse(max_tokens=None) == parse()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", (RawPrompt("hi"),)),
        ("", (RawPrompt(""),)),
        (["a", "b"], (RawPrompt("a"), RawPrompt("b"))),
        ([1, 2], (RawPrompt(token_ids=(1, 2)),)),
        ([[1], [2, 3]], (RawPrompt(token_ids=(1,)), RawPrompt(token_ids=(2, 3)))),
    ],
)
def test_prompts(prompt: Any, prompts: tuple[RawPrompt, ...]) -> None:
    assert parse(prompt=prompt).prompts == prompts


def test_everything_else_that_is_mapped() -> None:
    assert parse(
        max_tokens=64,
        temperature=0.2,
        n=2,
        stop=["\n", "//"],
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=5,
        suffix="end",
    ) == Request(
        model="m",
        prompts=(RawPrompt("hi", suffix="end"),),
        sampling=Sampling(temperature=0.2, seed=3),
        limits=Limits(64, ("\n", "//")),
        num_choices=2,
        logprobs=5,
        stream=True,
        include_usage=True,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [1, 2**31]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1.5]]}, "prompt[0][0]"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": 3}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"n": 65, "prompt": ["a", "b"]}, "n"),
        ({"echo": True, "logprobs": 0, "max_tokens": 0}, "max_tokens"),
        ({"stop": ""}, "stop[0]"),
    ],
)
def test_bad_fields_are_refused_with_their_path(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_best_of_no_more_than_n_asks_for_nothing() -> None:
    assert parse(best_of=2, n=2) == parse(n=2)


# Answers


@given(st.data())
def test_streamed_chunks_concatenate_to_the_body(data: st.DataObject) -> None:
    num_prompts, n = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    logprobs = data.draw(st.sampled_from([None, 0, 2]))
    asked = Request(
        model="m",
        prompts=(RawPrompt("hi"),) * num_prompts,
        num_choices=n,
        logprobs=logprobs,
        include_usage=True,
    )
    events = data.draw(event_streams(num_choices=num_prompts * n, top_logprobs=logprobs, tools=False))
    *chunks, last = chunks_of(asked, events, data.draw(st.integers(1, 200)))
    body = body_of(asked, events)
    typed = Completion.model_validate(body)
    assert not typed.model_extra
    assert last["choices"] == []
    assert last["usage"] == body["usage"]
    for choice in body["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, column in (choice["logprobs"] or {}).items():
            parts = [piece["logprobs"][name] for piece in mine if piece["logprobs"]]
            assert [entry for part in parts for entry in part or ()] == (column or [])


def test_a_whole_stream() -> None:
    events: list[Event] = [TextDelta(0, "a"), Finish(0, "length"), USAGE]
    envelope = {"id": "cmpl-1", "object": "text_completion", "created": 1_760_000_000, "model": "org/name"}
    assert chunks_of(parse(), events) == [
        {**envelope, "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]},
        {**envelope, "choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]},
    ]
    asked = parse(stream=True, stream_options={"include_usage": True})
    *before, last = chunks_of(asked, events)
    assert all(chunk["usage"] is None for chunk in before)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 12)


def test_an_unfinished_chunk_validates_but_for_its_finish_reason() -> None:
    """The SDK's type demands a finish reason even where its own server sends null."""
    for chunk in chunks_of(parse(), [TextDelta(0, "a"), Finish(0, "stop"), USAGE]):
        try:
            Completion.model_validate(chunk)
        except ValidationError as error:
            assert [part["loc"] for part in error.errors()] == [("choices", 0, "finish_reason")]


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [
        ("stop", "stop"),
        ("stop_sequence", "stop"),
        ("length", "length"),
        ("tool_calls", "stop"),
        ("content_filter", "content_filter"),
    ],
)
def test_finish_reasons(reason: Any, finish_reason: str) -> None:
    events: list[Event] = [Finish(0, reason), USAGE]
    assert chunks_of(parse(), events)[-1]["choices"][0]["finish_reason"] == finish_reason
    assert body_of(parse(), events)["choices"][0]["finish_reason"] == finish_reason


def test_echo_is_asked_of_the_renderer_and_may_come_without_generation() -> None:
    assert parse(echo=True, prompt=[1, 2]).echo is True
    assert parse(echo=True, logprobs=1).echo is True
    assert parse(echo=True, max_tokens=0).limits.max_tokens == 0


def test_the_first_token_of_an_echoed_prompt_has_no_logprob() -> None:
    echo = TextDelta(0, "ab", (TokenLogprob("a", math.nan), TokenLogprob("b", -1.0)))
    events: list[Event] = [echo, TextDelta(0, "c", (TokenLogprob("c", -2.0),)), Finish(0, "length"), USAGE]
    choice = body_of(parse(echo=True, logprobs=1), events)["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {"b": -1.0}, {"c": -2.0}],
        "text_offset": [0, 1, 2],
    }


def test_logprobs_are_columns_with_character_offsets() -> None:
    smile = (TokenLogprob("\ufffd", -1.0), TokenLogprob("🙂", -2.0))
    events: list[Event] = [
        TextDelta(0, "ab", (TokenLogprob("a", -0.5, None, (TopLogprob("a", -0.5), TopLogprob("x", -1.5))), *smile[:0])),
        TextDelta(0, "", smile[:1]),
        TextDelta(0, "🙂", smile[1:]),
        TextDelta(0, "cd", (TokenLogprob("c", float("-inf")), TokenLogprob("d", -3.0))),
        Finish(0, "stop"),
        USAGE,
    ]
    columns = body_of(parse(logprobs=1), events)["choices"][0]["logprobs"]
    assert columns == {
        "tokens": ["a", "\ufffd", "🙂", "c", "d"],
        "token_logprobs": [-0.5, -1.0, -2.0, -9999.0, -3.0],
        "top_logprobs": [{"a": -0.5, "x": -1.5}, {"\ufffd": -1.0}, {"🙂": -2.0}, {"c": -9999.0}, {"d": -3.0}],
        "text_offset": [0, 2, 2, 3, 4],
    }
    assert body_of(parse(logprobs=0), events)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_reasoning_of_a_raw_prompt_is_text() -> None:
    events: list[Event] = [ReasoningDelta(0, "hm"), TextDelta(0, "a"), Finish(0, "stop"), USAGE]
    assert body_of(parse(), events)["choices"][0]["text"] == "hma"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks_of(parse(), events)) == "hma"


def test_a_failure_is_one_error_event_and_nothing_after_it() -> None:
    projector = openai_completions.Projector(parse(), **IDENTITY)
    (event,) = sse_events(projector.feed(Failure(ApiError("internal", "gone"))), 1000)
    assert json.loads(event.data)["error"]["message"] == "gone"
    assert projector.feed(TextDelta(0, "a")) == projector.end() == projector.ping() == b""
    with pytest.raises(ApiError):
        openai_completions.Collector(parse(), **IDENTITY).feed(Failure(ApiError("internal", "gone")))
    with pytest.raises(RuntimeError):
        openai_completions.Collector(parse(), **IDENTITY).body()


def test_the_official_client_reads_stream_and_body(openai_client: Any) -> None:
    events: list[Event] = [TextDelta(0, "4"), TextDelta(0, "2"), Finish(0, "stop"), USAGE]
    stream = stream_bytes(openai_completions.Projector(parse(), **IDENTITY), events, pings=True)
    client: openai.OpenAI = openai_client(200, "text/event-stream", stream)
    chunks = client.completions.create(model="m", prompt="q", stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "42"
    client = openai_client(200, "application/json", msgspec.json.encode(body_of(parse(), events)))
    assert client.completions.create(model="m", prompt="q").choices[0].text == "42"
