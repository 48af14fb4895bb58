"""Answers of a text stream, merged from its events."""

from __future__ import annotations

import json
from typing import Any

from cortex_core.conversation import Request
from cortex_core.events import Event, Finish, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from neuron.daemon.prompt.model import TextModel
from neuron.protocol import FinishKind

from tests.neuron.daemon.prompt.checkpoints import WEATHER, ask

OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)


class Answer:
    """Events of one choice, merged: text, reasoning, calls as (name, arguments), finish reason."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.text = "".join(e.text for e in events if isinstance(e, TextDelta))
        self.reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
        self.calls: list[tuple[str, str]] = []
        self.reason = ""
        open_call: int | None = None
        for event in events:
            if isinstance(event, ToolCallStart):
                assert open_call is None
                assert event.index == len(self.calls)
                open_call = event.index
                self.calls.append((event.name, ""))
            elif isinstance(event, ToolCallArguments):
                assert event.index == open_call
                self.calls[-1] = (self.calls[-1][0], self.calls[-1][1] + event.fragment)
            elif isinstance(event, ToolCallEnd):
                assert event.index == open_call
                open_call = None
            elif isinstance(event, Finish):
                self.reason = event.reason
        assert open_call is None
        assert isinstance(events[-1], Finish)
        assert sum(isinstance(e, Finish) for e in events) == 1
        ids = [e.id for e in events if isinstance(e, ToolCallStart)]
        assert len(set(ids)) == len(ids)

    def key(self) -> tuple[Any, ...]:
        return self.text, self.reasoning, self.calls, self.reason

    @property
    def arguments(self) -> list[Any]:
        return [json.loads(arguments) for _, arguments in self.calls]


def stream(
    model: TextModel,
    text: str,
    request: Request | None = None,
    *,
    kind: FinishKind = "stop",
    sizes: tuple[int, ...] = (1,),
) -> Answer:
    """Run `text`, tokenised by the model, through a stream in groups of `sizes` tokens (repeated)."""
    request = request or ask(tools=(WEATHER,))
    choice = model.event_stream(request, model.render(request)[0])
    ids = model.tokenizer.encode(text)
    events: list[Event] = []
    at = turn = 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        events += choice.feed(ids[at : at + size])
        at, turn = at + size, turn + 1
    return Answer(events + choice.finish(kind))
