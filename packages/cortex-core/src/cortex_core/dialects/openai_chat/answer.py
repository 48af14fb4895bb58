"""Project events as chat completion chunks, or collect them into one chat completion."""

from __future__ import annotations

from typing import Any

import msgspec

from cortex_core.conversation import Request
from cortex_core.dialects.openai_answer import (
    FINISH_REASONS,
    PING,
    ChunkFrame,
    StreamEnd,
    encode_json,
    finite_logprob,
    new_id,
    usage_object,
)
from cortex_core.dialects.openai_custom_tools import FreeformInput, freeform_names, freeform_text
from cortex_core.errors import ApiError
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)


def new_response_id() -> str:
    return new_id("chatcmpl-")


def _call_id(event: ToolCallStart) -> str:
    return "call_" + event.id


def _logprob_objects(logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    return [
        {
            "token": entry.token,
            "logprob": finite_logprob(entry.logprob),
            "bytes": entry.bytes,
            "top_logprobs": [
                {"token": top.token, "logprob": finite_logprob(top.logprob), "bytes": top.bytes} for top in entry.top
            ],
        }
        for entry in logprobs
    ]


class _ChoiceFrame:
    """The constant bytes of one choice's chunks: only the encoded delta goes between head and tail."""

    __slots__ = ("delta", "freeform", "text", "tool_arguments", "tool_head", "wants_arguments")

    def __init__(self, frame: ChunkFrame, index: int) -> None:
        self.delta = frame.prefix + b'[{"index":%d,"delta":' % index
        self.text = self.delta + b'{"content":'
        self.tool_head = self.delta + b'{"tool_calls":['
        self.tool_arguments = b""  # these are set for each call as it starts
        self.wants_arguments = False
        self.freeform: FreeformInput | None = None


class Projector:
    """See `interface.Projector`. Reasoning goes out as `reasoning_content` and, for others, as `reasoning`."""

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None:
        frame = ChunkFrame(request, kind="chat.completion.chunk", response_id=response_id, created=created, model=model)
        self._frame = frame
        self._choices = [_ChoiceFrame(frame, index) for index in range(request.num_choices)]
        self._with_logprobs = request.logprobs is not None
        self._shows_reasoning = request.reasoning.visible
        self._freeform_names = freeform_names(request.tools)
        self._stream = StreamEnd()
        self._delta_end = b',"finish_reason":null}]' + frame.suffix
        self._text_end = b"}" + self._delta_end
        self._arguments_end = b"}}]}" + self._delta_end

    def begin(self, prompt_tokens: int) -> bytes:
        """One chunk per choice with the role and an empty content, which some clients must see to start."""
        opening = b'{"role":"assistant","content":""}' + self._delta_end
        return b"".join(choice.delta + opening for choice in self._choices)

    def feed(self, event: Event) -> bytes:
        if self._stream.is_closed:
            return b""
        if isinstance(event, TextDelta):
            if event.logprobs and self._with_logprobs:
                return self._text_with_logprobs(event)
            if not event.text:
                return b""
            return self._choices[event.choice].text + encode_json(event.text) + self._text_end
        if isinstance(event, ReasoningDelta):
            if not event.text or not self._shows_reasoning:
                return b""
            text = encode_json(event.text)
            head = self._choices[event.choice].delta
            return head + b'{"reasoning_content":' + text + b',"reasoning":' + text + self._text_end
        if isinstance(event, ToolCallArguments):
            if not event.fragment:
                return b""
            choice = self._choices[event.choice]
            choice.wants_arguments = False
            fragment = event.fragment if choice.freeform is None else choice.freeform.feed(event.fragment)
            return choice.tool_arguments + encode_json(fragment) + self._arguments_end if fragment else b""
        return self._feed_rare(event)

    def _feed_rare(self, event: Event) -> bytes:
        if isinstance(event, ToolCallStart):
            return self._start_call(event)
        if isinstance(event, ToolCallEnd):
            choice = self._choices[event.choice]
            if choice.freeform is not None:
                return self._end_input(choice)
            if not choice.wants_arguments:
                return b""
            choice.wants_arguments = False
            return choice.tool_arguments + b'"{}"' + self._arguments_end
        if isinstance(event, Finish):
            reason = FINISH_REASONS[event.reason].encode()
            choice = self._choices[event.choice]
            rest = self._end_input(choice)  # of a call that was cut off
            return rest + choice.delta + b'{},"finish_reason":"' + reason + b'"}]' + self._frame.suffix
        if isinstance(event, Usage):
            self._stream.has_usage = True
            return self._frame.usage_chunk(event)
        if isinstance(event, Failure):
            return self.fail(event.error)
        return b""

    def _text_with_logprobs(self, event: TextDelta) -> bytes:
        logprobs = {"content": _logprob_objects(event.logprobs), "refusal": None}
        return (
            self._choices[event.choice].text
            + encode_json(event.text)
            + b'},"logprobs":'
            + encode_json(logprobs)
            + self._delta_end
        )

    def _end_input(self, choice: _ChoiceFrame) -> bytes:
        rest = "" if choice.freeform is None else choice.freeform.close()
        choice.freeform = None
        return choice.tool_arguments + encode_json(rest) + self._arguments_end if rest else b""

    def _start_call(self, event: ToolCallStart) -> bytes:
        choice = self._choices[event.choice]
        choice.wants_arguments = True
        is_custom = event.name in self._freeform_names
        choice.freeform = FreeformInput() if is_custom else None
        kind, field = ("custom", "input") if is_custom else ("function", "arguments")
        choice.tool_arguments = choice.tool_head + b'{"index":%d,"%b":{"%b":' % (
            event.index,
            kind.encode(),
            field.encode(),
        )
        call = {
            "index": event.index,
            "id": _call_id(event),
            "type": kind,
            kind: {"name": event.name, field: ""},
        }
        return choice.tool_head + encode_json(call) + b"]}" + self._delta_end

    def end(self) -> bytes:
        return self._stream.done()

    def fail(self, error: ApiError) -> bytes:
        return self._stream.fail(error)

    def ping(self) -> bytes:
        return b"" if self._stream.is_closed else PING


class _Message:
    """One choice as it grows."""

    def __init__(self) -> None:
        self.reasoning: list[str] = []
        self.text: list[str] = []
        self.calls: list[tuple[ToolCallStart, list[str]]] = []
        self.logprobs: list[bytes] = []
        self.finish: Finish | None = None


class Collector:
    """See `interface.Collector`."""

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None:
        self._head = {"id": response_id, "object": "chat.completion", "created": created, "model": model}
        self._messages = [_Message() for _ in range(request.num_choices)]
        self._with_logprobs = request.logprobs is not None
        self._shows_reasoning = request.reasoning.visible
        self._freeform_names = freeform_names(request.tools)
        self._usage: Usage | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, Failure):
            raise event.error
        if isinstance(event, Usage):
            self._usage = event
            return
        message = self._messages[event.choice]
        if isinstance(event, TextDelta):
            message.text.append(event.text)
            message.logprobs += map(encode_json, _logprob_objects(event.logprobs))
        elif isinstance(event, ReasoningDelta):
            message.reasoning.append(event.text)
        elif isinstance(event, ToolCallStart):
            message.calls.append((event, []))
        elif isinstance(event, ToolCallArguments):
            message.calls[event.index][1].append(event.fragment)
        elif isinstance(event, ToolCallEnd):
            fragments = message.calls[event.index][1]
            if not any(fragments):
                fragments.append("{}")
        else:
            message.finish = event

    def body(self) -> bytes:
        if self._usage is None:
            raise RuntimeError("the answer is not complete: no usage yet")
        choices = [self._choice(index, message) for index, message in enumerate(self._messages)]
        return encode_json({**self._head, "choices": choices, "usage": usage_object(self._usage)})

    def _choice(self, index: int, message: _Message) -> dict[str, Any]:
        if message.finish is None:
            raise RuntimeError(f"the answer is not complete: choice {index} has not finished")
        content = msgspec.Raw(b"[" + b",".join(message.logprobs) + b"]")
        logprobs = {"content": content, "refusal": None} if self._with_logprobs else None
        return {
            "index": index,
            "message": self._message(message),
            "logprobs": logprobs,
            "finish_reason": FINISH_REASONS[message.finish.reason],
        }

    def _message(self, message: _Message) -> dict[str, Any]:
        """`content` is null only for a message of nothing but tool calls; a client may rely on text otherwise."""
        text = "".join(message.text)
        content = None if message.calls and not text else text
        result: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        reasoning = "".join(message.reasoning) if self._shows_reasoning else ""
        if reasoning:
            result["reasoning_content"] = result["reasoning"] = reasoning
        if message.calls:
            result["tool_calls"] = [self._call(start, "".join(fragments)) for start, fragments in message.calls]
        return result

    def _call(self, start: ToolCallStart, arguments: str) -> dict[str, Any]:
        if start.name in self._freeform_names:
            text = freeform_text(arguments)
            return {"id": _call_id(start), "type": "custom", "custom": {"name": start.name, "input": text}}
        return {"id": _call_id(start), "type": "function", "function": {"name": start.name, "arguments": arguments}}
