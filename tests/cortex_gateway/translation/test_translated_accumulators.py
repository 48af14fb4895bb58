"""Whatever form a chat server streams in and wherever it is cut, what the client gets satisfies its SDK's accumulator.

Servers differ: in how they count calls, in whether calls interleave, in what they put into one chunk, in line ends, in
what they leave out. Answers are drawn first, then the form in which a server streams them, then the cuts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from cortex_core.gateway_config import PromptFiltersSection
from cortex_core.sse import SseDecoder, SseEvent
from cortex_gateway.surfaces import anthropic, openai
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.translation import translation_of
from hypothesis import given
from hypothesis import strategies as st
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import Field, TypeAdapter

NAMES = ("get_weather", "find")
PARAMETERS = {"type": "object"}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "max_tokens": 100,
    "stream": True,
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"name": name, "input_schema": PARAMETERS} for name in NAMES],
    "thinking": {"type": "adaptive"},
}
RESPONSES: dict[str, Any] = {
    "model": "m",
    "stream": True,
    "input": "hi",
    "tools": [{"type": "function", "name": name, "parameters": PARAMETERS} for name in NAMES],
}
SURFACES = {surface.name: surface for surface in (*anthropic.SURFACES, *openai.SURFACES)}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
arguments = st.dictionaries(texts, st.integers(-9, 9) | texts | st.lists(st.booleans(), max_size=2), max_size=3)
message_event: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
response_event: TypeAdapter[Any] = TypeAdapter(Annotated[ResponseStreamEvent, Field(discriminator="type")])

Delta = dict[str, Any]


@st.composite
def pieces(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


class Answer:
    """What a model said: a thought, a text, calls."""

    def __init__(self, thought: str, text: str, calls: list[tuple[str, dict[str, Any]]], *, is_cut_off: bool) -> None:
        self.thought = thought
        self.text = text
        self.calls = calls
        self.finish = "length" if is_cut_off else "tool_calls" if calls else "stop"


answers = st.builds(
    Answer, texts, texts, st.lists(st.tuples(st.sampled_from(NAMES), arguments), max_size=3), is_cut_off=st.booleans()
)


@st.composite
def call_deltas(draw: st.DrawFn, answer: Answer) -> list[Delta]:
    """Fragments of the calls. Only where each has an index of its own may a server mix them."""
    counting = draw(st.sampled_from(["from 0", "from 1", "always 0", "not at all"]))
    queues: list[list[Delta]] = []
    for position, (name, value) in enumerate(answer.calls):
        text = json.dumps(value, ensure_ascii=draw(st.booleans()))
        index = {"from 0": {"index": position}, "from 1": {"index": position + 1}, "always 0": {"index": 0}}
        own = index.get(counting, {})
        head = {**own, "id": f"call_{position}", "type": "function", "function": {"name": name, "arguments": ""}}
        parts = draw(pieces(text))
        if draw(st.booleans()):
            head["function"] = {"name": name, "arguments": parts.pop(0)}
        queues.append([head, *({**own, "function": {"arguments": part}} for part in parts)])
    mixes = counting in ("from 0", "from 1") and draw(st.booleans())
    deltas: list[Delta] = []
    begun = 0
    while any(queues):
        # A call begins behind the beginning of the one before it, as its index says.
        waiting = [queue for place, queue in enumerate(queues) if queue and (place <= begun if mixes else True)]
        queue = draw(st.sampled_from(waiting)) if mixes else waiting[0]
        begun = max(begun, queues.index(queue) + 1)
        deltas.append({"tool_calls": [queue.pop(0)]})
    return deltas


def merged(deltas: list[Delta]) -> Delta:
    """Several deltas as one; fragments of a field are joined, calls are listed."""
    result: Delta = {}
    for delta in deltas:
        for name, value in delta.items():
            result[name] = result[name] + value if name in result else value
    return result


@st.composite
def streams(draw: st.DrawFn, answer: Answer) -> bytes:
    """The answer as some server streams it."""
    field = draw(st.sampled_from(["reasoning_content", "reasoning"]))
    deltas: list[Delta] = [{field: part} for part in draw(pieces(answer.thought))]
    deltas += [{"content": part} for part in draw(pieces(answer.text))]
    deltas += draw(call_deltas(answer))
    grouped: list[Delta] = []
    while deltas:
        size = draw(st.integers(1, 3))
        grouped.append(merged(deltas[:size]))
        del deltas[:size]
    if draw(st.booleans()):
        grouped.insert(0, {"role": "assistant", "content": draw(st.sampled_from(["", None]))})
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in grouped]
    ending: dict[str, Any] = {
        "index": 0,
        "delta": draw(st.sampled_from([{}, {"content": None}])),
        "finish_reason": answer.finish,
    }
    chunks.append({"choices": [ending]})
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    where = draw(st.sampled_from(["with the finish", "behind it", "nowhere"]))
    if where == "with the finish":
        chunks[-1]["usage"] = usage
    elif where == "behind it":
        chunks.append({"choices": [], "usage": usage})
    end = draw(st.sampled_from(["\n\n", "\r\n\r\n"]))
    lines: list[str] = []
    for chunk in chunks:
        if draw(st.booleans()):
            lines.append(f": ping{end}")
        document = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "other", **chunk}
        lines.append(f"data: {json.dumps(document, ensure_ascii=draw(st.booleans()))}{end}")
    if draw(st.booleans()):
        lines.append(f"data: [DONE]{end}")
    return "".join(lines).encode()


def translated(surface: Surface, body: dict[str, Any], stream: bytes, cuts: list[int]) -> Iterator[dict[str, Any]]:
    """The events that the client gets."""
    relay = translation_of(surface, json.dumps(body).encode(), "m", PromptFiltersSection()).stream(is_events=True)
    assert relay is not None
    places = sorted({min(cut, len(stream)) for cut in cuts})
    sent = b"".join(relay.feed(stream[a:b]) for a, b in zip([0, *places], [*places, len(stream)], strict=True))
    decoder = SseDecoder()
    for event in [*decoder.feed(sent + relay.flush()), *decoder.flush()]:
        if isinstance(event, SseEvent):
            document = json.loads(event.data)
            assert document["type"] == event.event
            yield document


cut_points = st.lists(st.integers(0, 3000), max_size=30)


@given(data=st.data(), answer=answers, cuts=cut_points)
def test_the_anthropic_sdk_rebuilds_what_the_server_said(data: st.DataObject, answer: Answer, cuts: list[int]) -> None:
    stream = data.draw(streams(answer), "stream")
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in translated(SURFACES["messages"], MESSAGES, stream, cuts):
        typed = message_event.validate_python(event)
        snapshot = accumulate_event(event=typed, current_snapshot=snapshot, json_bufs=buffers)
    message = Message.model_validate(snapshot.to_dict())
    assert "".join(block.thinking for block in message.content if block.type == "thinking") == answer.thought
    assert "".join(block.text for block in message.content if block.type == "text") == answer.text
    assert [(block.name, block.input) for block in message.content if block.type == "tool_use"] == answer.calls
    reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
    assert message.stop_reason == reasons[answer.finish]


@given(data=st.data(), answer=answers, cuts=cut_points)
def test_the_openai_sdk_rebuilds_what_the_server_said(data: st.DataObject, answer: Answer, cuts: list[int]) -> None:
    stream = data.draw(streams(answer), "stream")
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    last: Any = None
    for number, event in enumerate(translated(SURFACES["responses"], RESPONSES, stream, cuts)):
        assert event["sequence_number"] == number
        last = response_event.validate_python(event)
        state.handle_event(last)
    assert last.type == ("response.incomplete" if answer.finish == "length" else "response.completed")
    output = last.response.output
    assert "".join(item.summary[0].text for item in output if item.type == "reasoning") == answer.thought
    said = "".join(part.text for item in output if item.type == "message" for part in item.content)
    assert said == answer.text
    calls = [(item.name, json.loads(item.arguments)) for item in output if item.type == "function_call"]
    assert calls == answer.calls
    if answer.finish != "length":
        live = [item.to_dict() for item in state._completed_response.output]
        assert [item["type"] for item in live] == [item.type for item in output]


@pytest.mark.parametrize("name", ["messages", "responses"])
def test_calls_that_a_server_mixes_come_one_after_the_other(name: str) -> None:
    """Both calls begin before either is whole."""

    def call(index: int, **function: Any) -> bytes:
        delta = {"tool_calls": [{"index": index, "id": f"call_{index}", "function": function}]}
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"

    stream = call(0, name="find", arguments='{"a"') + call(1, name="get_weather", arguments='{"b":')
    stream += call(0, arguments=": 1}") + call(1, arguments=" 2}")
    stream += b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}\n\n'
    events = list(translated(SURFACES[name], MESSAGES if name == "messages" else RESPONSES, stream, []))
    deltas = [event.get("delta") for event in events if "delta" in event]
    texts = [delta.get("partial_json", "") if isinstance(delta, dict) else delta for delta in deltas]
    assert "".join(texts) == '{"a": 1}{"b": 2}'
