"""The reverse of `openai_chat`: write a request, read a stream.

For talking to a server that speaks OpenAI chat completions and nothing else. With it, translation between dialects
is composition: one dialect's parser, `write_request`, `StreamReader`, the first dialect's projector.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec

from cortex_core.conversation import (
    ImagePart,
    Request,
    ResponseFormat,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolChoice,
    ToolResultPart,
    Turn,
)
from cortex_core.errors import ApiError, ErrorKind
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    TopLogprob,
    Usage,
)
from cortex_core.sse import SseDecoder, SseError, SseEvent

_decode = msgspec.json.Decoder().decode

_CALL_PREFIX = "call_"

# ---------------------------------------------------------------- requests


def write_request(request: Request, *, model: str | None = None) -> bytes:
    """The request as a streamed chat completion body that asks for usage. model: the name the server knows.

    What the official API has no field for goes into the extensions that local servers share (`top_k`,
    `chat_template_kwargs`, `continue_final_message`, …). Raises `ValueError` for a raw prompt: it is no chat.
    """
    if not request.turns:
        raise ValueError("a raw prompt cannot be written as a chat completion")
    body: dict[str, Any] = {
        "model": model or request.model,
        "messages": [message for turn in request.turns for message in _messages(turn)],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= _tool_fields(request)
    body |= _sampling_fields(request)
    body |= _reasoning_fields(request)
    if request.response_format is not None:
        body["response_format"] = _response_format(request.response_format)
    if request.continue_final_turn:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return json.dumps(body, ensure_ascii=False).encode()


def _messages(turn: Turn) -> list[dict[str, Any]]:
    if turn.role == "tool":
        return [_tool_message(part) for part in turn.parts if isinstance(part, ToolResultPart)]
    if turn.role == "assistant":
        return [_assistant_message(turn)]
    parts = tuple(part for part in turn.parts if isinstance(part, (TextPart, ImagePart)))
    return [{"role": turn.role, "content": _content(parts)}]


def _content(parts: tuple[TextPart | ImagePart, ...]) -> str | list[dict[str, Any]]:
    """A string wherever it can be one: not every server reads parts."""
    if not parts:
        return ""
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return [_part(part) for part in parts]


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    url = part.url or f"data:{part.media_type or 'image/png'};base64,{part.data}"
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": part.detail} if part.detail else {})}


def _tool_message(part: ToolResultPart) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "tool", "tool_call_id": part.call_id, "content": _content(part.content)}
    if part.name is not None:
        message["name"] = part.name
    return message


def _assistant_message(turn: Turn) -> dict[str, Any]:
    texts = tuple(part for part in turn.parts if isinstance(part, TextPart))
    reasoning = "".join(part.text for part in turn.parts if isinstance(part, ThinkingPart))
    calls = [part for part in turn.parts if isinstance(part, ToolCallPart)]
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not texts else _content(texts)}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _tool_fields(request: Request) -> dict[str, Any]:
    if not request.tools:
        return {}
    tools = []
    for tool in request.tools:
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.parameters is not None:
            function["parameters"] = tool.parameters
        if tool.strict:
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    fields: dict[str, Any] = {"tools": tools, "tool_choice": _tool_choice(request.tool_choice)}
    if not request.parallel_tool_calls:
        fields["parallel_tool_calls"] = False
    return fields


def _tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.mode == "named":
        return {"type": "function", "function": {"name": choice.name}}
    if choice.allowed is None:
        return choice.mode
    allowed = [{"type": "function", "function": {"name": name}} for name in choice.allowed]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": allowed}}


def _sampling_fields(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "seed": sampling.seed,
        "max_tokens": request.limits.max_tokens,
        "stop": list(request.limits.stop) or None,
        "ignore_eos": request.limits.ignore_eos or None,
        "n": None if request.num_choices == 1 else request.num_choices,
    }
    if request.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": request.logprobs}
    return {name: value for name, value in fields.items() if value is not None}


def _reasoning_fields(request: Request) -> dict[str, Any]:
    reasoning = request.reasoning
    template_kwargs = dict(request.template_kwargs)
    fields: dict[str, Any] = {}
    if reasoning.mode != "default":
        template_kwargs.setdefault("enable_thinking", reasoning.mode == "on")
    if reasoning.effort is not None:
        fields["reasoning_effort"] = reasoning.effort
    if reasoning.budget_tokens is not None:
        fields["thinking"] = {"type": "enabled", "budget_tokens": reasoning.budget_tokens}
    if template_kwargs:
        fields["chat_template_kwargs"] = template_kwargs
    return fields


def _response_format(response_format: ResponseFormat) -> dict[str, Any]:
    if response_format.kind == "json_object":
        return {"type": "json_object"}
    wrapper: dict[str, Any] = {"name": response_format.name or "response", "schema": response_format.schema}
    if response_format.strict is not None:
        wrapper["strict"] = response_format.strict
    return {"type": "json_schema", "json_schema": wrapper}


# ---------------------------------------------------------------- streams


class _Chunk(msgspec.Struct):
    """A chunk, read leniently: servers differ in what they leave out."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | str | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Top(msgspec.Struct):
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


class _Logprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    content: list[_Logprob] | None = None


class _Choice(msgspec.Struct):
    """`stop_reason` is an extension: the stop string that was met."""

    index: int = 0
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    stop_reason: str | int | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class _ChoiceState:
    """Which call of a choice is open, and whether the choice has finished."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.num_calls = 0
        self.open_index: int | None = None
        self.arguments: list[str] = []
        self.is_finished = False

    def close_call(self) -> list[Event]:
        if self.open_index is None:
            return []
        self.open_index = None
        return [ToolCallEnd(self.choice, self.num_calls - 1)]

    def has_whole_arguments(self) -> bool:
        try:
            return isinstance(_decode("".join(self.arguments)), dict)
        except (msgspec.DecodeError, RecursionError):
            return False


class StreamReader:
    """Feed it the bytes of a chat completion stream; it returns events in the order `cortex_core.events` promises.

    A stream that breaks off, an error event and a chunk that cannot be read all end in one Failure. `is_done`: the
    terminal Usage or Failure has been returned.
    """

    def __init__(self) -> None:
        self._decoder = SseDecoder()
        self._choices: dict[int, _ChoiceState] = {}
        self._usage: Usage | None = None
        self._num_deltas = 0
        self.is_done = False

    def feed(self, chunk: bytes) -> list[Event]:
        """The events completed by these bytes."""
        events: list[Event] = []
        if self.is_done:
            return events
        try:
            for event in self._decoder.feed(chunk):
                if isinstance(event, SseEvent) and not self.is_done:
                    self._read(event.data, events)
        except SseError as error:
            self._fail(ApiError("internal", f"The upstream stream cannot be read: {error}"), events)
        return events

    def end(self) -> list[Event]:
        """The connection has closed. Whole if every choice had finished, else a Failure that is worth a retry."""
        events: list[Event] = []
        if self.is_done:
            return events
        try:
            for event in self._decoder.flush():
                if isinstance(event, SseEvent) and not self.is_done:
                    self._read(event.data, events)
        except SseError as error:
            self._fail(ApiError("internal", f"The upstream stream cannot be read: {error}"), events)
        if not self.is_done:
            self._finish_stream(events)
        return events

    def _read(self, data: str, events: list[Event]) -> None:
        if data == "[DONE]":
            self._finish_stream(events)
            return
        try:
            chunk = _decode_chunk(data)
        except (msgspec.DecodeError, RecursionError):
            self._fail(ApiError("internal", "The upstream server sent a chunk that cannot be read"), events)
            return
        if chunk.error is not None:
            self._fail(error_of(500, msgspec.json.encode({"error": chunk.error})), events)
            return
        for choice in chunk.choices:
            if not self.is_done:
                self._read_choice(choice, events)
        if chunk.usage is not None:
            self._usage = _usage(chunk.usage)

    def _read_choice(self, choice: _Choice, events: list[Event]) -> None:
        state = self._choices.setdefault(choice.index, _ChoiceState(choice.index))
        if state.is_finished:
            return
        delta = choice.delta
        reasoning = delta.reasoning_content or delta.reasoning
        if reasoning:
            events += [*state.close_call(), ReasoningDelta(choice.index, reasoning)]
            self._num_deltas += 1
        logprobs = _logprobs(choice.logprobs)
        if delta.content or logprobs:
            events += [*state.close_call(), TextDelta(choice.index, delta.content or "", logprobs)]
            self._num_deltas += 1
        for call in delta.tool_calls or ():
            if not self.is_done:
                self._read_call(call, state, events)
        if choice.finish_reason is not None and not self.is_done:
            self._finish_choice(choice, state, events)

    def _read_call(self, call: _Call, state: _ChoiceState, events: list[Event]) -> None:
        function = call.function or _Function()
        index = call.index if call.index is not None else state.num_calls - (0 if function.name else 1)
        if index >= state.num_calls:
            events += state.close_call()
            call_id = (call.id or uuid.uuid4().hex).removeprefix(_CALL_PREFIX)
            events.append(ToolCallStart(state.choice, state.num_calls, call_id, function.name or ""))
            state.open_index = index = state.num_calls
            state.num_calls += 1
            state.arguments = []
        if index != state.open_index:
            self._fail(ApiError("internal", "The upstream server resumed a tool call that had ended"), events)
            return
        arguments = function.arguments
        text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
        if text:
            state.arguments.append(text)
            events.append(ToolCallArguments(state.choice, index, text))
            self._num_deltas += 1

    def _finish_choice(self, choice: _Choice, state: _ChoiceState, events: list[Event]) -> None:
        state.is_finished = True
        reason, stop_sequence = _finish_reason(choice)
        if reason != "length" or state.has_whole_arguments():
            events += state.close_call()
        events.append(Finish(choice.index, reason, stop_sequence))

    def _finish_stream(self, events: list[Event]) -> None:
        if not self._choices or not all(state.is_finished for state in self._choices.values()):
            error = ApiError("internal", "The upstream stream ended before the answer did", retry_after=1, status=502)
            self._fail(error, events)
            return
        self.is_done = True
        # A server that sends no usage leaves us the number of deltas, which is near the number of tokens.
        events.append(self._usage or Usage(prompt_tokens=0, completion_tokens=self._num_deltas))

    def _fail(self, error: ApiError, events: list[Event]) -> None:
        self.is_done = True
        events.append(Failure(error))


def _finish_reason(choice: _Choice) -> tuple[FinishReason, str | None]:
    if choice.finish_reason == "length":
        return "length", None
    if choice.finish_reason == "content_filter":
        return "content_filter", None
    if choice.finish_reason in ("tool_calls", "function_call"):
        return "tool_calls", None
    if isinstance(choice.stop_reason, str):
        return "stop_sequence", choice.stop_reason
    return "stop", None


def _logprobs(logprobs: _Logprobs | None) -> tuple[TokenLogprob, ...]:
    if logprobs is None or not logprobs.content:
        return ()
    return tuple(
        TokenLogprob(
            entry.token,
            entry.logprob,
            entry.bytes,
            tuple(TopLogprob(top.token, top.logprob, top.bytes) for top in entry.top_logprobs),
        )
        for entry in logprobs.content
    )


def _usage(usage: _Usage) -> Usage:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
    reasoning = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else None
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=min(cached or 0, usage.prompt_tokens),
        reasoning_tokens=min(reasoning or 0, usage.completion_tokens),
    )


# ---------------------------------------------------------------- errors

_KIND_OF_STATUS: dict[int, ErrorKind] = {
    400: "invalid_request",
    401: "authentication",
    403: "permission",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    422: "invalid_request",
    429: "rate_limit",
    503: "overloaded",
    504: "timeout",
    529: "overloaded",
}


def error_of(status: int, body: bytes, *, retry_after: int | None = None) -> ApiError:
    """An upstream error answer, whatever its shape, as the error to pass on; its status is kept where it has a kind."""
    kind = _KIND_OF_STATUS.get(status, "internal")
    message, code, param = f"The upstream server answered {status}", None, None
    try:
        value = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, str) and error:
        message = error
        code = _string(value.get("code")) if isinstance(value, dict) else None
    elif isinstance(error, dict):
        message = _string(error.get("message")) or message
        code = _string(error.get("code"))
        param = _string(error.get("param"))
    return ApiError(kind, message, code=code, param=param, retry_after=retry_after)


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
