"""Wherever a stream is cut off, what another neuron adds makes the whole: in every dialect, with log-probabilities."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from cortex_core.hop import MARK_END, STREAM_MARK, TOKENS_MARK, USAGE_MARK, resume_body

from tests.neuron.daemon.api.harness import RunningNeuron
from tests.neuron.scripted_worker import PACED

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS, MESSAGES, RESPONSES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
HOP = {"x-cortex-hop": "1"}
# The scripted engine writes the tokens 100, 101, …: single bytes, of which many are no character, and later words.
NUM_TOKENS = 165
NUM_CUTS = 20
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"logprobs": True, "top_logprobs": 3}),
    (CHAT, {"logprobs": True, "n": 2, "stop": ["  ", "never"], "stream_options": {"include_usage": True}}),
    (CHAT, {}),
    (COMPLETIONS, {"logprobs": 2, "echo": True}),
    (COMPLETIONS, {"logprobs": 0, "stop": "t in"}),
    (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    (RESPONSES, {}),
    (MESSAGES, {"stop_sequences": ["  "]}),
]


def body_for(neuron: RunningNeuron, path: str, settings: dict[str, Any]) -> dict[str, Any]:
    common = {"model": neuron.model, "stream": True, "seed": 7, "top_k": PACED}
    if path == COMPLETIONS:
        return {**common, "prompt": "hello there", "max_tokens": NUM_TOKENS, **settings}
    if path == RESPONSES:
        return {**common, "input": "hi", "max_output_tokens": NUM_TOKENS, **settings}
    return {**common, "messages": [{"role": "user", "content": "hi"}], "max_tokens": NUM_TOKENS, **settings}


def writes_of(body: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], bytes]:
    """A marked stream: its head, each write with its mark, and the last write, which has none."""
    assert body.startswith(STREAM_MARK)
    head, _, rest = body.removeprefix(STREAM_MARK).partition(MARK_END)
    writes = []
    while TOKENS_MARK in rest:
        events, _, rest = rest.partition(TOKENS_MARK)
        mark, _, rest = rest.partition(MARK_END)
        writes.append((events, mark))
    return head, writes, rest


def events_of(body: bytes) -> list[Any]:
    """What a client reads, without what says how much a cache held."""
    body = re.sub(rb'"(?:cached_tokens|cache_read_input_tokens|input_tokens)":\d+', b'"cached_tokens":0', body)
    lines = body.split(b"\n")
    return [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]


def without_pieces(events: list[Any]) -> list[Any]:
    """Deltas in a row as one: how many tokens share a write is a matter of time."""
    merged: list[Any] = []
    for event in events:
        last = merged[-1] if merged else None
        for joined in (_chat(last, event), _completion(last, event), _typed(last, event)):
            if joined:
                break
        else:
            merged.append(event)
    return merged


def _chat(last: Any, event: Any) -> bool:
    return _choice(last, event, "chat.completion.chunk", lambda choice: choice["delta"], "content")


def _completion(last: Any, event: Any) -> bool:
    return _choice(last, event, "text_completion", lambda choice: choice, "text")


def _choice(last: Any, event: Any, kind: str, part: Any, name: str) -> bool:
    if last is None or last.get("object") != kind or event.get("object") != kind:
        return False
    if not (last["choices"] and event["choices"]):
        return False
    (old,), (new,) = last["choices"], event["choices"]
    if old["index"] != new["index"] or old["finish_reason"] or new["finish_reason"]:
        return False
    if "role" in part(old) or "role" in part(new):
        return False
    part(old)[name] = part(old).get(name, "") + part(new).get(name, "")
    for column, values in (new.get("logprobs") or {}).items():
        if values is not None:
            old["logprobs"][column] = (old["logprobs"][column] or []) + values
    return True


def _typed(last: Any, event: Any) -> bool:
    if last is None or "type" not in event or last.get("type") != event["type"] or "delta" not in event["type"]:
        return False
    if isinstance(event["delta"], str):
        last["delta"] += event["delta"]
        last["logprobs"] = last.get("logprobs", []) + event.get("logprobs", [])
        return True
    if event["type"] == "content_block_delta":
        last["delta"]["text"] += event["delta"]["text"]
        return True
    return False


def numbered(events: list[Any]) -> list[Any]:
    """Sequence numbers have no gaps; their values depend on how the text was cut into pieces."""
    numbers = [event.pop("sequence_number") for event in events if "sequence_number" in event]
    assert numbers == list(range(len(numbers)))
    return events


def by_choice(events: list[Any]) -> list[Any]:
    """Choices may interleave in any way."""
    return sorted(events, key=lambda event: event["choices"][0]["index"] if event.get("choices") else -1)


@pytest.mark.parametrize(("path", "settings"), REQUESTS, ids=lambda value: str(value))
async def test_a_stream_that_is_cut_off_anywhere_becomes_the_undisturbed_one(
    neuron: RunningNeuron, path: str, settings: dict[str, Any]
) -> None:
    request = body_for(neuron, path, settings)
    status, _, whole = await neuron.post(path, request, HOP)
    assert status == 200, whole
    head, writes, last = writes_of(whole)
    assert len(writes) > 3  # some hundred, where the machine has time

    def reading(*parts: bytes) -> list[Any]:
        events = numbered(events_of(b"".join(parts)))
        events = by_choice(events) if settings.get("n") else events
        return without_pieces(events)

    undisturbed = reading(*(events for events, _ in writes), last)
    for cut in range(1, len(writes) + 1, max(1, len(writes) // NUM_CUTS)):
        sent = b"".join(events for events, _ in writes[:cut])
        batches = b"".join(mark + b"," for _, mark in writes[:cut])
        body, header = resume_body(head, batches, json.dumps(request).encode())
        status, _, rest = await neuron.post(path, body, {**HOP, "x-cortex-resume": header})
        assert status == 200, rest
        same_head, more, its_last = writes_of(rest)
        assert same_head == head
        assert reading(sent, *(events for events, _ in more), its_last) == undisturbed, cut
        assert USAGE_MARK in its_last
