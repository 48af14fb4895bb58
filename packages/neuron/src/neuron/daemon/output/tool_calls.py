"""Tool calls in the output, found while it streams.

One `ToolCallStream` per choice is given the text between a call's markers and answers with events: `ToolCallStart` as
soon as the name is known, argument fragments as they arrive. What turns out to be no call is handed back verbatim as
text, so nothing the model wrote is lost. A call of a tool that the request does not have is passed on: agents answer
it with an error that the model can read, which prose would not get. Only a tool that `allowed` excludes is refused.
"""

from __future__ import annotations

import hashlib

from cortex_core.conversation import Request
from cortex_core.events import Event, ToolCallArguments, ToolCallEnd, ToolCallStart

from neuron.daemon.grammar.schema_types import ArgumentTypes, StepBudget
from neuron.daemon.output.tool_formats import (
    CallAction,
    CallParser,
    MoreArguments,
    QwenJsonParser,
    QwenXmlParser,
    StartCall,
)


class ToolCallStream:
    """The calls of one choice. Use: `open`, `feed` until `is_open` is False or a marker comes, then `close`.

    answer_id: of the answer they are part of. Their own ids follow from it, so that a neuron that goes on with another
    one's answer gives the same ones. num_calls counts calls that ended complete, `num_started` all. `is_full`: parallel
    calls are off and there is one.
    """

    def __init__(self, request: Request, choice: int, answer_id: str) -> None:
        self._choice = choice
        self._answer_id = answer_id
        self._schemas = {tool.name: tool.parameters for tool in request.tools}
        self._types: dict[str, ArgumentTypes] = {}
        self._budget = StepBudget()
        allowed = request.tool_choice.allowed
        self._allowed = None if allowed is None else frozenset(allowed)
        self._single = not request.parallel_tool_calls
        self._parser: CallParser | None = None
        self._undecided: list[str] = []
        self._before = ""
        self._has_call = False
        self.is_open = False
        self.num_calls = 0
        self.num_started = 0

    @property
    def is_full(self) -> bool:
        return self._single and self.num_calls > 0

    @property
    def has_started(self) -> bool:
        """A call of the open block has been announced: what stood before it can no longer be text."""
        return self._has_call

    @property
    def in_string(self) -> bool:
        """Inside a quoted argument: a marker that comes now is part of it."""
        return self._parser is not None and self._parser.in_string

    def open(self, before: str) -> None:
        """An opening marker was read; `before` is its text and what was held back in front of it."""
        self._parser = None
        self._undecided.clear()
        self._before = before
        self._has_call = False
        self.is_open = True

    def feed(self, text: str) -> tuple[list[Event], str]:
        """More of the block. Returns events and text that is none of it: then the block is over (`is_open`)."""
        if self._parser is None:
            self._undecided.append(text)
            head = text.lstrip()
            if not head:
                return [], ""
            if head[0] == "<":
                self._parser = QwenXmlParser(self._accepts, self._types_of)
            else:
                self._parser = QwenJsonParser(self._accepts)
            text = "".join(self._undecided)
            self._undecided.clear()
        events = self._events(self._parser.feed(text))
        if not self._parser.has_failed:
            return events, ""
        self.is_open = False
        return events, self._remainder(self._parser.unparsed)

    def close(self, closing: str, *, truncated: bool = False) -> tuple[list[Event], str]:
        """A closing marker (`closing` is its text) or, with "", the end of the output.

        Returns events and, if the block held no call, all of its text.
        """
        self.is_open = False
        if self._parser is None:
            return [], "".join([self._before, *self._undecided, closing])
        events = self._events(self._parser.close(truncated=truncated))
        if self._has_call:
            return events, ""
        return events, self._before + self._parser.unparsed + closing

    def _call_id(self, index: int) -> str:
        return hashlib.blake2b(f"{self._answer_id}:{self._choice}:{index}".encode(), digest_size=12).hexdigest()

    def _accepts(self, name: str) -> bool:
        return self._allowed is None or name in self._allowed

    def _types_of(self, name: str) -> ArgumentTypes:
        types = self._types.get(name)
        if types is None:
            types = self._types[name] = ArgumentTypes(self._schemas.get(name), self._budget)
        return types

    def _remainder(self, unparsed: str) -> str:
        """Text of a block that failed: all of it, or what follows its last call."""
        return unparsed.lstrip() if self._has_call else self._before + unparsed

    def _events(self, actions: list[CallAction]) -> list[Event]:
        events: list[Event] = []
        for action in actions:
            if self.is_full:
                break  # only the first call was wanted
            index = self.num_started - 1
            if isinstance(action, StartCall):
                self._has_call = True
                events.append(ToolCallStart(self._choice, index + 1, self._call_id(index + 1), action.name))
                self.num_started += 1
            elif isinstance(action, MoreArguments):
                if action.fragment:
                    events.append(ToolCallArguments(self._choice, index, action.fragment))
            else:
                events.append(ToolCallEnd(self._choice, index))
                self.num_calls += action.is_complete
        return events
