"""Responses requests with a field changed, parsed or refused; answers as events and as a body."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from cortex_core.conversation import Request
from cortex_core.dialects import openai_responses
from cortex_core.events import Event, Usage

from tests.cortex_core.dialects.event_streams import collected, sse_events, stream_bytes
from tests.cortex_core.dialects.harness import refused_by

WEATHER = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": True}
SHELL = {"type": "custom", "name": "sh"}
NAMESPACE = {
    "type": "namespace",
    "name": "mcp__js",
    "description": "Run code",
    "tools": [
        {"type": "function", "name": "eval", "description": "Evaluate", "parameters": {"type": "object"}},
        {"type": "custom", "name": "script"},
        {"type": "hologram", "name": "x"},
    ],
}


def parse(**fields: Any) -> Request:
    return openai_responses.parse(json.dumps({"model": "m", "input": "hi", **fields}).encode())


refused = partial(refused_by, parse)


IDENTITY: dict[str, Any] = {
    "response_id": "resp_0a",
    "created": 1_760_000_000,
    "model": "org/name",
    "clock": lambda: 1_760_000_009.5,
}
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1)
BODY = {"model": "org/name", "input": "hi"}
TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False},
    {
        "type": "namespace",
        "name": "a",
        "description": "The a tools",
        "tools": [
            {"type": "function", "name": "find", "parameters": {"type": "object"}},
            {"type": "custom", "name": "note"},
        ],
    },
    {"type": "custom", "name": "sh", "description": "A shell"},
    {"type": "web_search"},
]


def parsed(**changes: Any) -> Request:
    return openai_responses.parse(json.dumps({**BODY, **changes}).encode())


def events_of(asked: Request, events: list[Event], chunk_size: int = 1000) -> list[dict[str, Any]]:
    stream = stream_bytes(openai_responses.Projector(asked, **IDENTITY), events, pings=True)
    decoded = sse_events(stream, chunk_size)
    data = [json.loads(event.data) for event in decoded]
    assert [event.event for event in decoded] == [event["type"] for event in data]
    assert [event["sequence_number"] for event in data] == list(range(len(data)))
    return data


def body_of(asked: Request, events: list[Event]) -> Any:
    return collected(openai_responses.Collector(asked, **IDENTITY), events)


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a client puts them together from deltas alone, compared with what `.done` events say."""
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            texts.append("")
        elif kind.endswith(".delta"):
            texts[-1] += event["delta"]
        elif kind.endswith(("_text.done", "arguments.done", "input.done")):
            said = next(event[name] for name in ("text", "arguments", "input") if name in event)
            assert said == texts[-1]
        elif kind == "response.output_item.done":
            item = event["item"]
            items.append(item)
            inner = (item.get("content") or item.get("summary") or [{}])[0].get("text")
            assert texts[-1] == item.get("arguments", item.get("input", inner))
    return items
