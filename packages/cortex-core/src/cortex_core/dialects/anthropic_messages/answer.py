"""Project events as message stream events, or collect them into one message."""

from __future__ import annotations

import base64
import uuid
from typing import Any, Literal

import msgspec

from cortex_core.conversation import Request
from cortex_core.dialects.errors import anthropic_error_body
from cortex_core.dialects.reasoning_signature import wrap
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

BlockKind = Literal["thinking", "text", "tool_use"]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

STOP_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def new_response_id() -> str:
    return "msg_" + uuid.uuid4().hex


def count_tokens_body(input_tokens: int) -> bytes:
    return b'{"input_tokens":%d}' % input_tokens


def _signature(response_id: str, index: int, omitted: str | None) -> str:
    """What a thinking block is signed with: opaque, never empty, and accepted back unverified.

    omitted: the thought, where its text is left out of the block. It travels in the signature then, as it does with
    the original, so that a tool loop whose client omits thoughts does not lose them.
    """
    if omitted is not None:
        return wrap(omitted)
    return base64.b64encode(f"{response_id}:{index}".encode()).decode()


def _tool_use_id(event: ToolCallStart) -> str:
    return "toolu_" + event.id


def _usage_object(usage: Usage) -> dict[str, Any]:
    """The prompt is split into what was computed and what was read from the cache; the sum stays the prompt's size."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode({"type": name, **data}))


class Projector:
    """See `interface.Projector`. At most one content block is open; it is opened by the first delta of its kind.

    `begin` reports the whole prompt as uncached; the split comes with the usage at the end and overwrites it.
    """

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None:
        self._response_id = response_id
        self._model = model
        self._shows_thinking = request.reasoning.visible
        self._omits_thinking = request.reasoning.omit_text
        self._index = -1
        self._open: BlockKind | None = None
        self._delta_head = b""  # everything of a delta event of the open block up to its text
        self._omitted: list[str] = []
        self._wants_arguments = False
        self._finish: Finish | None = None
        self._has_usage = False
        self._is_closed = False

    def begin(self, prompt_tokens: int) -> bytes:
        usage = {
            "input_tokens": prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        return _event("message_start", {"message": _message(self._response_id, self._model, [], None, usage)})

    def feed(self, event: Event) -> bytes:
        if self._is_closed:
            return b""
        if isinstance(event, TextDelta):
            if not event.text:
                return b""
            opening = b"" if self._open == "text" else self._start("text", {"text": ""}, b"text")
            return opening + self._delta_head + _encode(event.text) + b"}}\n\n"
        if isinstance(event, ReasoningDelta):
            return self._thinking(event)
        if isinstance(event, ToolCallArguments):
            if not event.fragment:
                return b""
            self._wants_arguments = False
            return self._delta_head + _encode(event.fragment) + b"}}\n\n"
        if isinstance(event, ToolCallStart):
            call = {"id": _tool_use_id(event), "name": event.name, "input": {}}
            self._wants_arguments = True
            return self._start("tool_use", call, b"partial_json")
        if isinstance(event, ToolCallEnd):
            arguments = self._delta_head + b'"{}"}}\n\n' if self._wants_arguments else b""
            return arguments + self._stop()
        if isinstance(event, Finish):
            self._finish = event
            return self._stop()
        if isinstance(event, Usage):
            return self._message_delta(event)
        return self.fail(event.error)

    def _thinking(self, event: ReasoningDelta) -> bytes:
        if not event.text or not self._shows_thinking:
            return b""
        opening = b""
        if self._open != "thinking":
            opening = self._start("thinking", {"thinking": "", "signature": ""}, b"thinking")
        if self._omits_thinking:
            self._omitted.append(event.text)
            return opening
        return opening + self._delta_head + _encode(event.text) + b"}}\n\n"

    def _start(self, kind: BlockKind, content: dict[str, Any], field: bytes) -> bytes:
        """Close what is open and open the next block; `field` is the key that its deltas carry."""
        closing = self._stop()
        self._index += 1
        self._open = kind
        delta_type = b"input_json_delta" if kind == "tool_use" else kind.encode() + b"_delta"
        self._delta_head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (self._index, delta_type, field)
        )
        block = {"type": kind, **content}
        return closing + _event("content_block_start", {"index": self._index, "content_block": block})

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        signature = b""
        if self._open == "thinking":
            omitted = "".join(self._omitted) if self._omits_thinking else None
            self._omitted.clear()
            delta = {"type": "signature_delta", "signature": _signature(self._response_id, self._index, omitted)}
            signature = _event("content_block_delta", {"index": self._index, "delta": delta})
        self._open = None
        self._wants_arguments = False
        return signature + _event("content_block_stop", {"index": self._index})

    def _message_delta(self, usage: Usage) -> bytes:
        if self._finish is None:
            raise RuntimeError("usage came before the choice had finished")
        self._has_usage = True
        delta = {
            "stop_reason": STOP_REASONS[self._finish.reason],
            "stop_sequence": self._finish.stop_sequence,
            "stop_details": None,
        }
        return _event("message_delta", {"delta": delta, "usage": _usage_object(usage)})

    def end(self) -> bytes:
        if self._is_closed:
            return b""
        if not self._has_usage:
            raise RuntimeError("the stream cannot end before its usage is known")
        self._is_closed = True
        return MESSAGE_STOP

    def fail(self, error: ApiError) -> bytes:
        if self._is_closed:
            return b""
        self._is_closed = True
        return b"event: error\ndata: " + anthropic_error_body(error, None) + b"\n\n"

    def ping(self) -> bytes:
        return b"" if self._is_closed else PING


class Collector:
    """See `interface.Collector`."""

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None:
        self._response_id = response_id
        self._model = model
        self._shows_thinking = request.reasoning.visible
        self._omits_thinking = request.reasoning.omit_text
        self._blocks: list[tuple[dict[str, Any], list[str]]] = []
        self._is_open = False
        self._finish: Finish | None = None
        self._usage: Usage | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, Failure):
            raise event.error
        if isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, Finish):
            self._finish = event
        elif isinstance(event, TextDelta):
            self._add("text", event.text)
        elif isinstance(event, ReasoningDelta):
            if self._shows_thinking:
                self._add("thinking", event.text)
        elif isinstance(event, ToolCallStart):
            self._blocks.append(({"type": "tool_use", "id": _tool_use_id(event), "name": event.name}, []))
            self._is_open = True
        elif isinstance(event, ToolCallArguments):
            self._blocks[-1][1].append(event.fragment)
        else:
            self._is_open = False

    def _add(self, kind: BlockKind, text: str) -> None:
        if not text:
            return
        if not self._is_open or self._blocks[-1][0]["type"] != kind:
            self._blocks.append(({"type": kind}, []))
            self._is_open = True
        self._blocks[-1][1].append(text)

    def body(self) -> bytes:
        if self._usage is None or self._finish is None:
            raise RuntimeError("the answer is not complete: it has not finished, or its usage is not known")
        content = [self._block(index, *block) for index, block in enumerate(self._blocks)]
        usage = _usage_object(self._usage)
        return _encode(_message(self._response_id, self._model, content, self._finish, usage))

    def _block(self, index: int, block: dict[str, Any], fragments: list[str]) -> dict[str, Any]:
        text = "".join(fragments)
        kind = block["type"]
        if kind == "text":
            return {**block, "text": text}
        if kind == "thinking":
            shown, omitted = ("", text) if self._omits_thinking else (text, None)
            return {**block, "thinking": shown, "signature": _signature(self._response_id, index, omitted)}
        return {**block, "input": _tool_input(text)}


def _tool_input(arguments: str) -> msgspec.Raw:
    """The arguments as an object, in their own bytes: an integer of any size survives.

    Cut off by the token limit they are no JSON: then nothing rather than a part.
    """
    try:
        is_object = isinstance(_decode(arguments), dict)
    except (msgspec.DecodeError, RecursionError):
        is_object = False
    return msgspec.Raw(arguments.encode() if is_object else b"{}")


def _message(
    response_id: str, model: str, content: list[dict[str, Any]], finish: Finish | None, usage: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": response_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": None if finish is None else STOP_REASONS[finish.reason],
        "stop_sequence": None if finish is None else finish.stop_sequence,
        "stop_details": None,
        "usage": usage,
    }
