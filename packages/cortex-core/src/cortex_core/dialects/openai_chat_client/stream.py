"""Read a chat completion, streamed or whole, as events."""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from cortex_core.dialects.limits import (
    MAX_FOREIGN_CHOICES,
    MAX_FOREIGN_CONTAINERS,
    MAX_FOREIGN_EVENT_BYTES,
    MAX_WHOLE_ANSWER_BYTES,
)
from cortex_core.dialects.openai_chat_client.errors import error_of
from cortex_core.dialects.openai_chat_client.object_scan import ObjectScan
from cortex_core.errors import ApiError
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

_SMALL_BYTES = 64 * 1024
"""What is smaller cannot hold so many that it matters."""


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
    """`stop_reason` (vLLM) and `matched_stop` (SGLang) are extensions: the stop string or token id that was met."""

    index: int = 0
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    stop_reason: Any = None
    matched_stop: Any = None


class _WholeChoice(_Choice):
    message: _Delta = msgspec.field(default_factory=_Delta)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Answer(msgspec.Struct):
    """An answer that was not streamed."""

    choices: list[_WholeChoice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | str | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


class _CallState:
    """A call as it comes in. given_id: as the server calls it; no more arguments are taken once it has ended."""

    def __init__(self, start: ToolCallStart, given_id: str | None) -> None:
        self.start = start
        self.given_id = given_id
        self.arguments: list[str] = []
        self.has_ended = False
        self._scan = ObjectScan()
        self._is_object: bool | None = None

    def add(self, text: str) -> None:
        self.arguments.append(text)
        self._scan.feed(text)

    def is_whole(self) -> bool:
        """Read once, when all brackets are closed: calls that are held back ask for it with each fragment."""
        if not self._scan.has_ended:
            return False
        if self._is_object is None:
            try:
                self._is_object = isinstance(_decode("".join(self.arguments)), dict)
            except (msgspec.DecodeError, RecursionError):
                self._is_object = False
        return self._is_object


class _ChoiceState:
    """Which calls of a choice there are, and whether the choice has finished.

    Events of one call never stand among another's: while the arguments of the open call are incomplete, calls that
    begin are held back. by_index: the calls as the server counts them.
    """

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.tail = ""
        self.num_calls = 0
        self.is_finished = False
        self._by_index: dict[int, _CallState] = {}
        self._last: _CallState | None = None
        self._open: _CallState | None = None
        self._held: deque[_CallState] = deque()

    def call_of(self, call: _Call, name: str | None) -> _CallState | None:
        """The call that a fragment belongs to, None where it begins one.

        Servers leave the index out, or give each call the same one and another id.
        """
        if call.index is None:
            return None if name else self._last
        known = self._by_index.get(call.index)
        if known is not None and name and call.id and call.id != known.given_id and known.is_whole():
            return None
        return known

    def begin_call(self, call: _Call, name: str | None) -> tuple[_CallState, list[Event]]:
        call_id = (call.id or uuid.uuid4().hex).removeprefix(_CALL_PREFIX)
        begun = _CallState(ToolCallStart(self.choice, self.num_calls, call_id, name or ""), call.id)
        self.num_calls += 1
        self._last = begun
        if call.index is not None:
            self._by_index[call.index] = begun
        if self._open is not None and not self._open.is_whole():
            self._held.append(begun)
            return begun, []
        return begun, [*self._end_call(), *self._open_call(begun)]

    def add_arguments(self, call: _CallState, text: str) -> list[Event]:
        call.add(text)
        if call is not self._open:
            return []
        events: list[Event] = [ToolCallArguments(self.choice, call.start.index, text)]
        while self._held and self._open is not None and self._open.is_whole():
            events += [*self._end_call(), *self._open_call(self._held.popleft())]
        return events

    def close_calls(self, *, is_cut_off: bool = False) -> list[Event]:
        """What is left of all calls. is_cut_off: the last one has no end if its arguments are incomplete."""
        events: list[Event] = []
        while self._held:
            events += [*self._end_call(), *self._open_call(self._held.popleft())]
        if self._open is not None and (not is_cut_off or self._open.is_whole()):
            events += self._end_call()
        return events

    def _open_call(self, call: _CallState) -> list[Event]:
        self._open = call
        text = "".join(call.arguments)
        return [call.start, *([ToolCallArguments(self.choice, call.start.index, text)] if text else [])]

    def _end_call(self) -> list[Event]:
        if self._open is None:
            return []
        ended, self._open = self._open, None
        ended.has_ended = True
        return [ToolCallEnd(self.choice, ended.start.index)]


class StreamReader:
    """Feed it the bytes of a chat completion stream; it returns events in the order `cortex_core.events` promises.

    A stream that breaks off, an error event and a chunk that cannot be read all end in one Failure. `is_done`: the
    terminal Usage or Failure has been returned. stop: the stop strings that were asked for, to tell which of them ended
    a choice.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._tail_len = max(map(len, stop), default=0)
        self._decoder = SseDecoder(max_event_bytes=MAX_FOREIGN_EVENT_BYTES)
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

    def read_whole(self, answer: _Answer) -> list[Event]:
        """All events of an answer that came in one piece, its messages read as deltas that hold everything."""
        events: list[Event] = []
        for choice in answer.choices:
            if not self.is_done:
                choice.delta = choice.message
                self._read_choice(choice, events)
        self._usage = None if answer.usage is None else _usage(answer.usage)
        if not self.is_done:
            self._finish_stream(events)
        return events

    def _read(self, data: str, events: list[Event]) -> None:
        if data == "[DONE]":
            self._finish_stream(events)
            return
        if len(data) > _SMALL_BYTES and data.count("{") + data.count("[") > MAX_FOREIGN_CONTAINERS:
            self._fail(_too_many_values(), events)
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
        state = self._choices.get(choice.index)
        if state is None:
            if len(self._choices) >= MAX_FOREIGN_CHOICES:
                self._fail(ApiError("internal", "The upstream server sent more choices than anybody asks for"), events)
                return
            state = self._choices[choice.index] = _ChoiceState(choice.index)
        if state.is_finished:
            return
        delta = choice.delta
        reasoning = delta.reasoning_content or delta.reasoning
        if reasoning:
            events += [*state.close_calls(), ReasoningDelta(choice.index, reasoning)]
            self._num_deltas += 1
        logprobs = _logprobs(choice.logprobs)
        if delta.content and self._tail_len:
            state.tail = (state.tail + delta.content)[-self._tail_len :]
        if delta.content or logprobs:
            events += [*state.close_calls(), TextDelta(choice.index, delta.content or "", logprobs)]
            self._num_deltas += 1
        for call in delta.tool_calls or ():
            if not self.is_done:
                self._read_call(call, state, events)
        if choice.finish_reason is not None and not self.is_done:
            self._finish_choice(choice, state, events)

    def _read_call(self, call: _Call, state: _ChoiceState, events: list[Event]) -> None:
        function = call.function or _Function()
        found = state.call_of(call, function.name)
        if found is None:
            found, begun = state.begin_call(call, function.name)
            events += begun
        arguments = function.arguments
        text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
        if not text:
            return
        if found.has_ended:
            self._fail(ApiError("internal", "The upstream server resumed a tool call that had ended"), events)
            return
        events += state.add_arguments(found, text)
        self._num_deltas += 1

    def _finish_choice(self, choice: _Choice, state: _ChoiceState, events: list[Event]) -> None:
        state.is_finished = True
        reason, stop_sequence = _finish_reason(choice, self._stop, state.tail)
        events += state.close_calls(is_cut_off=reason == "length")
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


class AnswerReader:
    """As `StreamReader`, for an answer in one piece: what servers send that do not stream, though asked to."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = stop
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self.is_done = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Nothing yet: the answer is read when it is whole. One that is too large to be held is a Failure."""
        if self.is_done:
            return []
        self._num_bytes += len(chunk)
        if self._num_bytes > MAX_WHOLE_ANSWER_BYTES:
            self.is_done = True
            self._pieces.clear()
            return [Failure(ApiError("internal", "The upstream server's answer is too large", status=502))]
        self._pieces.append(chunk)
        return []

    def end(self) -> list[Event]:
        if self.is_done:
            return []
        self.is_done = True
        data = b"".join(self._pieces)
        self._pieces.clear()
        if data.count(b"{") + data.count(b"[") > MAX_FOREIGN_CONTAINERS:
            return [Failure(_too_many_values())]
        try:
            answer = _decode_answer(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            error = ApiError("internal", "The upstream server sent an answer that cannot be read", status=502)
            return [Failure(error)]
        if answer.error is not None:
            return [Failure(error_of(500, msgspec.json.encode({"error": answer.error})))]
        return StreamReader(self._stop).read_whole(answer)


def _too_many_values() -> ApiError:
    message = f"The upstream server sent more than {MAX_FOREIGN_CONTAINERS} objects and arrays at once"
    return ApiError("internal", message, code="upstream_malformed_response", status=502)


def _finish_reason(choice: _Choice, stop: tuple[str, ...], tail: str) -> tuple[FinishReason, str | None]:
    """tail: how the text ends.

    The official API says `stop` for a stop string and for the end of a turn alike, and cuts the string off: then it
    counts as the end of a turn. What servers say beyond that is believed where it names a string that was asked for
    (they may have others of their own); a text that ends with one was ended by it, at a server that leaves it there.
    """
    if choice.finish_reason == "length":
        return "length", None
    if choice.finish_reason == "content_filter":
        return "content_filter", None
    if choice.finish_reason in ("tool_calls", "function_call"):
        return "tool_calls", None
    for met in (choice.stop_reason, choice.matched_stop):
        if isinstance(met, str) and met in stop:
            return "stop_sequence", met
    met = next((string for string in sorted(stop, key=len, reverse=True) if tail.endswith(string)), None)
    if met is None and choice.finish_reason == "stop_sequence" and stop:  # text-generation-inference
        return "stop_sequence", stop[0] if len(stop) == 1 else None
    return ("stop", None) if met is None else ("stop_sequence", met)


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
