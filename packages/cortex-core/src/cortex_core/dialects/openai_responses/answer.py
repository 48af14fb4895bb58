"""Project events as response stream events, or collect them into one response object."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from cortex_core.conversation import Request
from cortex_core.dialects.errors import OPENAI_CODES, OPENAI_TYPES
from cortex_core.dialects.json_body import Fields, encode_compact
from cortex_core.dialects.openai_answer import EVENT_END, PING, encode_json, new_id
from cortex_core.dialects.openai_responses.output import (
    CallItem,
    Item,
    ItemFactory,
    ItemStatus,
    MessageItem,
    ReasoningItem,
)
from cortex_core.dialects.openai_responses.request import echoed
from cortex_core.errors import ApiError
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)

Status = Literal["in_progress", "completed", "incomplete", "failed"]
Clock = Callable[[], float]

INCOMPLETE_REASONS: dict[FinishReason, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}


def new_response_id() -> str:
    return new_id("resp_")


def input_tokens_body(input_tokens: int) -> bytes:
    return b'{"object":"response.input_tokens","input_tokens":%d}' % input_tokens


def error_event(error: ApiError, *, sequence_number: int = 0) -> bytes:
    """The end of a stream that has not got as far as `response.created`.

    The official type is flat; SDKs raise on the nested `error` that the official servers send. So both.
    """
    code = error.code or OPENAI_CODES.get(error.kind)
    flat = {"code": code, "message": error.message, "param": error.param}
    nested = {"type": OPENAI_TYPES[error.kind], **flat}
    event = {"type": "error", "sequence_number": sequence_number, **flat, "error": nested}
    return b"event: error\ndata: " + encode_json(event) + EVENT_END


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class _ResponseObject:
    """The response object. What repeats the request, tools and instructions included, is encoded once."""

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None:
        echo = request.echo_fields.get("object") or echoed(Fields({}))
        head = {"id": response_id, "object": "response", "created_at": created, "model": model, **echo}
        self._head = encode_compact(head).encode()[:-1] + b","

    def encode(
        self,
        status: Status,
        output: list[dict[str, Any]],
        *,
        reason: str | None = None,
        error: ApiError | None = None,
        usage: Usage | None = None,
        completed_at: int | None = None,
    ) -> bytes:
        tail = {
            "status": status,
            "completed_at": completed_at,
            "error": None if error is None else {"code": _failure_code(error), "message": error.message},
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": output,
            "usage": None if usage is None else _usage_object(usage),
        }
        return self._head + encode_json(tail)[1:]

    def ended(self, finish: Finish, output: list[dict[str, Any]], usage: Usage, clock: Clock) -> tuple[Status, bytes]:
        """The final object, and whether it is complete."""
        reason = INCOMPLETE_REASONS.get(finish.reason)
        if reason is not None:
            return "incomplete", self.encode("incomplete", output, reason=reason, usage=usage)
        return "completed", self.encode("completed", output, usage=usage, completed_at=int(clock()))


def _failure_code(error: ApiError) -> str:
    """Agents act on these three; whatever else went wrong is the server's fault to them, and retried."""
    if error.code in ("context_length_exceeded", "insufficient_quota"):
        return str(error.code)
    return "rate_limit_exceeded" if error.kind == "rate_limit" else "server_error"


def _item_status(finish: Finish) -> ItemStatus:
    """Of the item that was open at the end."""
    return "incomplete" if finish.reason in INCOMPLETE_REASONS else "completed"


class Projector:
    """See `interface.Projector`. An item is opened by the first delta of its kind, and one is open at a time.

    clock gives Unix seconds, for `completed_at`.
    """

    def __init__(
        self, request: Request, *, response_id: str, created: int, model: str, clock: Clock = time.time
    ) -> None:
        self._response = _ResponseObject(request, response_id=response_id, created=created, model=model)
        self._items = ItemFactory(request, response_id)
        self._with_logprobs = request.logprobs is not None
        self._shows_reasoning = request.reasoning.visible
        self._clock = clock
        self._sequence_number = 0
        self._output: list[dict[str, Any]] = []
        self._open: Item | None = None
        self._delta_head = b""  # everything of a delta event of the open item up to its sequence number
        self._finish: Finish | None = None
        self._usage: Usage | None = None
        self._is_closed = False

    def begin(self, prompt_tokens: int) -> bytes:
        shell = self._response.encode("in_progress", [])
        return self._lifecycle("response.created", shell) + self._lifecycle("response.in_progress", shell)

    def feed(self, event: Event) -> bytes:
        if self._is_closed:
            return b""
        if isinstance(event, TextDelta):
            item = self._open
            if type(item) is not MessageItem or event.logprobs or not event.text:
                return self._text(event)
            item.fragments.append(event.text)  # what nearly every token is
            return self._bare_delta(event.text)
        if isinstance(event, ReasoningDelta):
            if not event.text or not self._shows_reasoning:
                return b""
            opening = b"" if isinstance(self._open, ReasoningItem) else self._start(self._items.reasoning())
            return opening + self._delta(event.text)
        if isinstance(event, ToolCallArguments):
            assert isinstance(self._open, CallItem)
            fragment = self._open.feed(event.fragment)
            return self._bare_delta(fragment) if fragment else b""
        if isinstance(event, ToolCallStart):
            return self._start(self._items.call(event))
        if isinstance(event, ToolCallEnd):
            return self._close("completed")
        if isinstance(event, Finish):
            self._finish = event
            return self._close(_item_status(event), is_whole=False)
        if isinstance(event, Usage):
            self._usage = event
            return b""
        return self.fail(event.error)

    def _text(self, event: TextDelta) -> bytes:
        logprobs = event.logprobs if self._with_logprobs else ()
        if not event.text and not logprobs:
            return b""
        opening = b""
        item = self._open
        if not isinstance(item, MessageItem):
            item = self._items.message()
            opening = self._start(item)
        if not logprobs:
            return opening + self._delta(event.text)
        item.fragments.append(event.text)
        fields = {"delta": event.text, "logprobs": item.add_logprobs(logprobs)}
        return opening + self._item_event(item, item.delta_event, fields)

    def _delta(self, text: str) -> bytes:
        assert self._open is not None
        self._open.fragments.append(text)
        return self._bare_delta(text)

    def _bare_delta(self, text: str) -> bytes:
        number = self._sequence_number
        self._sequence_number = number + 1
        return self._delta_head + b'%d,"delta":' % number + encode_json(text) + b"}\n\n"

    def _start(self, item: Item) -> bytes:
        """Close what is open and open `item`."""
        closing = self._close("completed")
        self._open = item
        fields = {"type": item.delta_event, "item_id": item.id, "output_index": item.index, **item.place}
        if isinstance(item, MessageItem):
            fields["logprobs"] = []
        head = encode_json(fields)[:-1]
        self._delta_head = b'event: %b\ndata: %b,"sequence_number":' % (item.delta_event.encode(), head)
        added = {"output_index": item.index, "item": item.added()}
        parts = [closing, self._event("response.output_item.added", added)]
        parts += [self._item_event(item, name, fields) for name, fields in item.opening()]
        return b"".join(parts)

    def _close(self, status: ItemStatus, *, is_whole: bool = True) -> bytes:
        """End the open item. is_whole: as far as a call goes, all of its arguments have come."""
        item = self._open
        if item is None:
            return b""
        parts: list[bytes] = []
        if isinstance(item, CallItem):
            rest = item.end(is_whole=is_whole)
            if rest:
                parts.append(self._bare_delta(rest))
        self._open = None
        whole = item.whole(status)
        self._output.append(whole)
        parts += [self._item_event(item, name, fields) for name, fields in item.closing()]
        parts.append(self._event("response.output_item.done", {"output_index": item.index, "item": whole}))
        return b"".join(parts)

    def _item_event(self, item: Item, name: str, fields: dict[str, Any]) -> bytes:
        return self._event(name, {"item_id": item.id, "output_index": item.index, **item.place, **fields})

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        data = encode_json({"type": name, "sequence_number": self._sequence_number, **fields})
        self._sequence_number += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), data)

    def _lifecycle(self, name: str, response: bytes) -> bytes:
        number = self._sequence_number
        self._sequence_number = number + 1
        encoded = name.encode()
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,"response":%b}\n\n' % (
            encoded,
            encoded,
            number,
            response,
        )

    def end(self) -> bytes:
        if self._is_closed:
            return b""
        if self._usage is None or self._finish is None:
            raise RuntimeError("the stream cannot end before its usage is known")
        self._is_closed = True
        status, response = self._response.ended(self._finish, self._output, self._usage, self._clock)
        return self._lifecycle(f"response.{status}", response)

    def fail(self, error: ApiError) -> bytes:
        """`response.failed` with the items that were whole; before `begin` there is no response that could fail."""
        if self._is_closed:
            return b""
        self._is_closed = True
        if not self._sequence_number:
            return error_event(error)
        response = self._response.encode("failed", self._output, error=error, usage=self._usage)
        return self._lifecycle("response.failed", response)

    def ping(self) -> bytes:
        return b"" if self._is_closed else PING


class Collector:
    """See `interface.Collector`. The same items as the stream's, gathered."""

    def __init__(
        self, request: Request, *, response_id: str, created: int, model: str, clock: Clock = time.time
    ) -> None:
        self._response = _ResponseObject(request, response_id=response_id, created=created, model=model)
        self._items = ItemFactory(request, response_id)
        self._with_logprobs = request.logprobs is not None
        self._shows_reasoning = request.reasoning.visible
        self._clock = clock
        self._output: list[dict[str, Any]] = []
        self._open: Item | None = None
        self._finish: Finish | None = None
        self._usage: Usage | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, Failure):
            raise event.error
        if isinstance(event, TextDelta):
            self._text(event)
        elif isinstance(event, ReasoningDelta):
            if event.text and self._shows_reasoning:
                if not isinstance(self._open, ReasoningItem):
                    self._start(self._items.reasoning())
                self._grow(event.text)
        elif isinstance(event, ToolCallStart):
            self._start(self._items.call(event))
        elif isinstance(event, ToolCallArguments):
            assert isinstance(self._open, CallItem)
            self._open.feed(event.fragment)
        elif isinstance(event, ToolCallEnd):
            self._close("completed")
        elif isinstance(event, Finish):
            self._finish = event
            self._close(_item_status(event), is_whole=False)
        else:
            self._usage = event

    def _text(self, event: TextDelta) -> None:
        logprobs = event.logprobs if self._with_logprobs else ()
        if not event.text and not logprobs:
            return
        item = self._open
        if not isinstance(item, MessageItem):
            item = self._items.message()
            self._start(item)
        item.fragments.append(event.text)
        item.add_logprobs(logprobs)

    def _grow(self, text: str) -> None:
        assert self._open is not None
        self._open.fragments.append(text)

    def _start(self, item: Item) -> None:
        self._close("completed")
        self._open = item

    def _close(self, status: ItemStatus, *, is_whole: bool = True) -> None:
        item = self._open
        if item is None:
            return
        if isinstance(item, CallItem):
            item.end(is_whole=is_whole)
        self._open = None
        self._output.append(item.whole(status))

    def body(self) -> bytes:
        if self._usage is None or self._finish is None:
            raise RuntimeError("the answer is not complete: it has not finished, or its usage is not known")
        return self._response.ended(self._finish, self._output, self._usage, self._clock)[1]
