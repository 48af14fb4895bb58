"""Random event streams that respect the order contract of `cortex_core.events`, and a driver for projectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cortex_core.dialects.interface import Collector, Projector
from cortex_core.events import (
    Event,
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
from cortex_core.sse import SseDecoder, SseEvent
from hypothesis import strategies as st

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=6,
)
log_probabilities = st.floats(max_value=0, allow_nan=False)


@st.composite
def token_logprobs(draw: st.DrawFn, text: str, top: int) -> tuple[TokenLogprob, ...]:
    pieces = draw(st.lists(texts, max_size=2)) if not text else [text]
    return tuple(
        TokenLogprob(
            piece,
            draw(log_probabilities),
            tuple(piece.encode()),
            tuple(
                TopLogprob(draw(texts), draw(log_probabilities), draw(st.none() | st.just((1, 2))))
                for _ in range(draw(st.integers(0, top)))
            ),
        )
        for piece in pieces
    )


@st.composite
def fragments(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def choice_events(
    draw: st.DrawFn, choice: int, *, top_logprobs: int | None, tools: bool, names: Sequence[str]
) -> list[Event]:
    events: list[Event] = []
    kinds = ["reasoning", "text", "call"] if tools else ["text"]
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=5)):
        if kind == "reasoning":
            events += [ReasoningDelta(choice, text) for text in draw(st.lists(texts, max_size=3))]
        elif kind == "text":
            for text in draw(st.lists(texts, max_size=3)):
                logprobs = () if top_logprobs is None else draw(token_logprobs(text, top_logprobs))
                events.append(TextDelta(choice, text, logprobs))
        else:
            identity = f"{choice:02x}{num_calls:04x}"
            events.append(ToolCallStart(choice, num_calls, identity, draw(st.sampled_from(names))))
            arguments = draw(
                st.none()
                | st.dictionaries(texts, json_values, max_size=3)
                | st.fixed_dictionaries({"input": texts | json_values})
            )
            if arguments is not None:
                text = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
                events += [ToolCallArguments(choice, num_calls, part) for part in draw(fragments(text))]
            events.append(ToolCallEnd(choice, num_calls))
            num_calls += 1
    reason = draw(st.sampled_from(["stop", "stop_sequence", "length", "content_filter"]))
    if num_calls and reason == "stop":
        reason = "tool_calls"
    if num_calls and reason == "length" and draw(st.booleans()):
        while isinstance(events[-1], (ToolCallEnd, ToolCallArguments)):  # cut off in the middle of the call
            events.pop()
    events.append(Finish(choice, reason, "END" if reason == "stop_sequence" else None))  # type: ignore[arg-type]
    return events


@st.composite
def event_streams(
    draw: st.DrawFn,
    *,
    num_choices: int,
    top_logprobs: int | None = None,
    tools: bool = True,
    names: Sequence[str] = ("get_weather", "a.b-c"),
) -> list[Event]:
    """Choices interleave at random; one Usage comes last. names: of the tools that are called."""
    queues = [
        draw(choice_events(choice, top_logprobs=top_logprobs, tools=tools, names=names))
        for choice in range(num_choices)
    ]
    events: list[Event] = []
    while any(queues):
        waiting = [queue for queue in queues if queue]
        events.append(draw(st.sampled_from(waiting)).pop(0))
    prompt, completion = draw(st.integers(1, 999)), draw(st.integers(0, 999))
    cached, reasoning = draw(st.integers(0, prompt - 1)), draw(st.integers(0, completion))
    return [*events, Usage(prompt, completion, cached, reasoning)]


def stream_bytes(projector: Projector, events: list[Event], *, pings: bool = False) -> bytes:
    """Everything a stream sends."""
    usage = next(event for event in events if isinstance(event, Usage))
    out = [projector.begin(usage.prompt_tokens)]
    for event in events:
        if pings:
            out.append(projector.ping())
        out.append(projector.feed(event))
    return b"".join([*out, projector.end()])


def sse_events(stream: bytes, chunk_size: int) -> list[SseEvent]:
    decoder = SseDecoder()
    events: list[Any] = []
    for start in range(0, len(stream), chunk_size):
        events += decoder.feed(stream[start : start + chunk_size])
    assert decoder.flush() == [], "the stream ends with a whole event"
    return events


def collected(collector: Collector, events: list[Event]) -> Any:
    for event in events:
        collector.feed(event)
    return json.loads(collector.body())
