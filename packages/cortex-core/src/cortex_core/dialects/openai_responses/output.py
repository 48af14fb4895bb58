"""The items of an answer as they grow: reasoning, message, call. One at a time is open, and its deltas go into it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from cortex_core.conversation import Request
from cortex_core.dialects.openai_answer import encode_json, finite_logprob
from cortex_core.dialects.openai_custom_tools import FreeformInput
from cortex_core.dialects.openai_responses.tools import ToolNames
from cortex_core.dialects.reasoning_signature import wrap
from cortex_core.events import TokenLogprob, ToolCallStart

ItemStatus = Literal["completed", "incomplete"]


class Item:
    """One item. `fragments` are its text: the thought, the answer, the arguments or the input of a call."""

    prefix = ""
    delta_event = ""
    place: ClassVar[dict[str, Any]] = {}
    """What every event of the item's text carries beside `item_id` and `output_index`."""

    def __init__(self, response_id: str, index: int) -> None:
        self.id = f"{self.prefix}_{response_id.removeprefix('resp_')}{index:04x}"
        self.index = index
        self.fragments: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.fragments)

    def added(self) -> dict[str, Any]:
        """The item as it is announced: in progress, and empty."""
        raise NotImplementedError

    def whole(self, status: ItemStatus) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self) -> list[tuple[str, dict[str, Any]]]:
        """Events between the announcement and the first delta: names and what they carry beside the item's place."""
        return []

    def closing(self) -> list[tuple[str, dict[str, Any]]]:
        """Events between the last delta and the whole item."""
        return []


class ReasoningItem(Item):
    """The thought itself, in the place of a summary: that is the channel which clients show.

    carried: it also goes into `encrypted_content`, for clients that asked to carry it to the next request.
    """

    prefix = "rs"
    delta_event = "response.reasoning_summary_text.delta"
    place: ClassVar[dict[str, Any]] = {"summary_index": 0}

    def __init__(self, response_id: str, index: int, *, carried: bool) -> None:
        super().__init__(response_id, index)
        self._carried = carried

    def added(self) -> dict[str, Any]:
        return {"id": self.id, "type": "reasoning", "summary": [], "status": "in_progress"}

    def whole(self, status: ItemStatus) -> dict[str, Any]:
        part = {"type": "summary_text", "text": self.text}
        item: dict[str, Any] = {"id": self.id, "type": "reasoning", "summary": [part], "status": status}
        if self._carried:
            item["encrypted_content"] = wrap(self.text)
        return item

    def opening(self) -> list[tuple[str, dict[str, Any]]]:
        return [("response.reasoning_summary_part.added", {"part": {"type": "summary_text", "text": ""}})]

    def closing(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("response.reasoning_summary_text.done", {"text": self.text}),
            ("response.reasoning_summary_part.done", {"part": {"type": "summary_text", "text": self.text}}),
        ]


class MessageItem(Item):
    """An output item of text: a message of the assistant."""

    prefix = "msg"
    delta_event = "response.output_text.delta"
    place: ClassVar[dict[str, Any]] = {"content_index": 0}

    def __init__(self, response_id: str, index: int) -> None:
        super().__init__(response_id, index)
        self._for_events: list[bytes] = []
        self._for_items: list[bytes] = []

    def add_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> msgspec.Raw:
        """Take those of a delta, and return them as its event shows them. Written here and now: the end of an answer
        repeats all of them four times, and would take the longer the longer it was."""
        shown = [encode_json(_logprob_of(entry, with_bytes=False)) for entry in logprobs]
        self._for_events += shown
        self._for_items += [encode_json(_logprob_of(entry, with_bytes=True)) for entry in logprobs]
        return _array(shown)

    def added(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}

    def whole(self, status: ItemStatus) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": [self._part()]}

    def _part(self) -> dict[str, Any]:
        logprobs = _array(self._for_items)
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}

    def opening(self) -> list[tuple[str, dict[str, Any]]]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [("response.content_part.added", {"part": part})]

    def closing(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("response.output_text.done", {"text": self.text, "logprobs": _array(self._for_events)}),
            ("response.content_part.done", {"part": self._part()}),
        ]


class CallItem(Item):
    """A function call or, where the tool is freeform, a custom tool call; called as the client calls the tool."""

    prefix = "fc"
    delta_event = "response.function_call_arguments.delta"

    def __init__(self, response_id: str, index: int, start: ToolCallStart, names: ToolNames) -> None:
        tool = names.find(start.name)
        self._input = FreeformInput() if tool is not None and tool.is_freeform else None
        if self._input is not None:
            self.prefix = "ctc"
            self.delta_event = "response.custom_tool_call_input.delta"
        super().__init__(response_id, index)
        self._name = start.name if tool is None else tool.member or tool.name
        self._head: dict[str, Any] = {
            "id": self.id,
            "type": "function_call" if self._input is None else "custom_tool_call",
            "call_id": "call_" + start.id,
            "name": self._name,
        }
        if tool is not None and tool.namespace is not None:
            self._head["namespace"] = tool.namespace

    def feed(self, fragment: str) -> str:
        """What this fragment of the arguments adds to the item's text."""
        text = fragment if self._input is None else self._input.feed(fragment)
        self.fragments.append(text)
        return text

    def end(self, *, is_whole: bool) -> str:
        """No more arguments come: what is still to be added."""
        text = "{}" if is_whole and not any(self.fragments) else ""
        if self._input is not None:
            text = self._input.close()
        self.fragments.append(text)
        return text

    @property
    def _field(self) -> str:
        return "arguments" if self._input is None else "input"

    def added(self) -> dict[str, Any]:
        return {**self._head, self._field: "", "status": "in_progress"}

    def whole(self, status: ItemStatus) -> dict[str, Any]:
        return {**self._head, self._field: self.text, "status": status}

    def closing(self) -> list[tuple[str, dict[str, Any]]]:
        if self._input is None:
            return [("response.function_call_arguments.done", {"arguments": self.text, "name": self._name})]
        return [("response.custom_tool_call_input.done", {"input": self.text})]


class ItemFactory:
    """Makes the items of one answer, in order."""

    def __init__(self, request: Request, response_id: str) -> None:
        self._response_id = response_id
        self._names = ToolNames(request.tools)
        self._carries_thoughts = bool(request.echo_fields.get("carries_thoughts"))
        self._num_items = 0

    def _next(self) -> int:
        self._num_items += 1
        return self._num_items - 1

    def reasoning(self) -> ReasoningItem:
        return ReasoningItem(self._response_id, self._next(), carried=self._carries_thoughts)

    def message(self) -> MessageItem:
        return MessageItem(self._response_id, self._next())

    def call(self, start: ToolCallStart) -> CallItem:
        return CallItem(self._response_id, self._next(), start, self._names)


def _array(entries: list[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b"[" + b",".join(entries) + b"]")


def _logprob_of(entry: TokenLogprob, *, with_bytes: bool) -> dict[str, Any]:
    """Events carry no bytes, items do."""
    return {
        **_logprob_object(entry.token, entry.logprob, entry.bytes, with_bytes=with_bytes),
        "top_logprobs": [
            _logprob_object(top.token, top.logprob, top.bytes, with_bytes=with_bytes) for top in entry.top
        ],
    }


def _logprob_object(token: str, logprob: float, raw: tuple[int, ...] | None, *, with_bytes: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"token": token, "logprob": finite_logprob(logprob)}
    if with_bytes:
        entry["bytes"] = list(token.encode("utf-8", "replace")) if raw is None else raw
    return entry
