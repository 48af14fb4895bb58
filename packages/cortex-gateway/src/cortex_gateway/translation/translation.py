"""In front of a server that speaks only OpenAI chat: what it is sent, and how what it answers is read.

Chat and completions pass as they are. Messages and responses are put together from cortex-core's halves: the dialect's
parser, a chat request; the events of a chat answer, the dialect's projector. Tokens are counted where the server has
`/tokenize`. What differs between the surfaces is one class each; the relay treats them alike.
"""

from __future__ import annotations

import time
from typing import Protocol

from cortex_core.conversation import Request
from cortex_core.dialects import openai_responses
from cortex_core.dialects.anthropic_messages import MessagesDialect, count_tokens_body
from cortex_core.dialects.interface import Collector, Dialect, Projector
from cortex_core.dialects.openai_chat_client import (
    AnswerReader,
    StreamReader,
    read_count,
    write_count_request,
    write_request,
)
from cortex_core.errors import ApiError
from cortex_core.events import Event, Failure, Finish
from cortex_core.events import Usage as UsageEvent
from cortex_core.gateway_config import PromptFiltersSection

from cortex_gateway.surfaces.envelope import with_model
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.answer_stream import AnswerStream, Usage
from cortex_gateway.translation.errors import UpstreamFault, cannot_count, refused

CHAT_PATH = "/v1/chat/completions"
TOKENIZE_PATH = "/tokenize"
NO_COUNT_STATUSES = (404, 405, 501)


class WholeAnswer(Protocol):
    """An answer that is not streamed: `feed` it what was read, then take the body."""

    def feed(self, chunk: bytes) -> None:
        """Raises `UpstreamFault`."""
        ...

    def body(self) -> bytes:
        """Raises `UpstreamFault` where the answer is not whole, `ApiError` where it is none."""
        ...

    def usage(self) -> Usage: ...


class Translation(Protocol):
    """One request in front of such a server.

    label says what is translated into what; None where nothing is. dropped: filters that took something out.
    """

    @property
    def path(self) -> str: ...

    @property
    def label(self) -> str | None: ...

    @property
    def dropped(self) -> tuple[str, ...]: ...

    @property
    def request(self) -> Request | None:
        """What it was read as; None where nothing was read."""
        ...

    def body(self, model: str, *, extensions: bool) -> bytes:
        """What to post; model is the server's own name for it. Raises `ApiError` where it cannot be said there."""
        ...

    def stream(self, *, is_events: bool) -> AnswerStream | None:
        """To read a streamed answer with. is_events: it comes as events. None where nothing is translated, or the
        answer is not what was asked for."""
        ...

    def whole(self, *, is_events: bool) -> WholeAnswer | None:
        """To read any other answer with. None: its bytes pass as they come."""
        ...

    def refused(self, status: int, body: bytes, retry_after: str | None) -> ApiError:
        """The server's error answer in the words of the one who asked."""
        ...


TRANSLATED = frozenset(("messages", "responses", "count_tokens", "responses_input_tokens"))


def is_translated(surface: Surface) -> bool:
    """Whether a request of this surface is read and written anew; any other passes."""
    return surface.name in TRANSLATED


def translation_of(surface: Surface, payload: bytes, model: str, filters: PromptFiltersSection) -> Translation:
    """How a request of this surface goes there. model: as the client named it.

    Raises `ApiError` where the request is bad.
    """
    messages = MessagesDialect(drops_attribution=filters.claude_code_attribution)
    match surface.name:
        case "messages":
            return read_translation(surface, messages.parse(payload), model)
        case "responses":
            return read_translation(surface, openai_responses.parse(payload), model)
        case "count_tokens":
            return read_translation(surface, messages.parse_count_tokens(payload), model)
        case "responses_input_tokens":
            return read_translation(surface, openai_responses.parse_input_tokens(payload), model)
        case _:
            return PassingThrough(surface.upstream_path, payload, model)


def read_translation(surface: Surface, request: Request, model: str) -> Translation:
    """The same for a request that has been read, here or elsewhere. Raises `ValueError` for a surface that passes."""
    match surface.name:
        case "messages":
            return ThroughChat("messages", MessagesDialect(), request, model)
        case "responses":
            return ThroughChat("responses", openai_responses, request, model)
        case "count_tokens":
            return Counting(request, "count_tokens")
        case "responses_input_tokens":
            return Counting(request, "responses/input_tokens")
        case _:
            raise ValueError(f"{surface.name} is not translated")


class PassingThrough:
    """Chat and completions: nothing is read, and nothing written but the name of the model where it differs."""

    label = None
    dropped = ()
    request = None

    def __init__(self, path: str, payload: bytes, model: str) -> None:
        self.path = path
        self._payload = payload
        self._model = model

    def body(self, model: str, *, extensions: bool) -> bytes:
        return self._payload if model == self._model else with_model(self._payload, model)

    def stream(self, *, is_events: bool) -> None:
        return None

    def whole(self, *, is_events: bool) -> None:
        return None

    def refused(self, status: int, body: bytes, retry_after: str | None) -> ApiError:
        return refused(status, body, retry_after)


class ThroughChat:
    """Messages and responses. The server is always asked for a stream, so that its silence means something."""

    path = CHAT_PATH

    def __init__(self, name: str, dialect: Dialect, request: Request, model: str) -> None:
        self.label = f"{name}->chat"
        self.request: Request = request
        self.dropped = request.dropped
        self._dialect = dialect
        self._model = model

    def body(self, model: str, *, extensions: bool) -> bytes:
        return write_request(self.request, model=model, extensions=extensions)

    def stream(self, *, is_events: bool) -> TranslatedStream:
        projector = self._dialect.Projector(
            self.request, response_id=self._dialect.new_response_id(), created=int(time.time()), model=self._model
        )
        return TranslatedStream(self.request, _reader(self.request, is_events), projector)

    def whole(self, *, is_events: bool) -> TranslatedAnswer:
        collector = self._dialect.Collector(
            self.request, response_id=self._dialect.new_response_id(), created=int(time.time()), model=self._model
        )
        return TranslatedAnswer(self.request, _reader(self.request, is_events), collector)

    def refused(self, status: int, body: bytes, retry_after: str | None) -> ApiError:
        return _in_own_words(self.request, refused(status, body, retry_after))


class Counting:
    """Counts of tokens: the same prompt, tokenised where the server can."""

    path = TOKENIZE_PATH

    def __init__(self, request: Request, name: str) -> None:
        self.label = f"{name}->tokenize"
        self.dropped = request.dropped
        self.request: Request = request
        self._name = name

    def body(self, model: str, *, extensions: bool) -> bytes:
        return write_count_request(self.request, model=model)

    def stream(self, *, is_events: bool) -> None:
        return None

    def whole(self, *, is_events: bool) -> WholeAnswer:
        return CountAnswer(self._name)

    def refused(self, status: int, body: bytes, retry_after: str | None) -> ApiError:
        if status in NO_COUNT_STATUSES:
            return cannot_count(self._name)
        return _in_own_words(self.request, refused(status, body, retry_after))


def _reader(request: Request, is_events: bool) -> StreamReader | AnswerReader:
    stop = request.limits.stop
    return StreamReader(stop) if is_events else AnswerReader(stop)


def _in_own_words(request: Request, error: ApiError) -> ApiError:
    error.param = request.client_param(error.param)
    return error


def _known_usage(usage: UsageEvent | None, finish: tuple[str, ...]) -> Usage:
    """No prompt has no tokens: 0 is what a server says that says nothing."""
    if usage is None or not usage.prompt_tokens:
        return Usage(finish=finish)
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, finish)


class TranslatedStream:
    """Chunks of a chat stream in, events of the caller's dialect out. It is an `AnswerStream`."""

    __slots__ = (
        "_fault",
        "_finish",
        "_projector",
        "_reader",
        "_request",
        "_unsent",
        "_usage",
        "has_begun",
        "num_events",
    )

    head = None
    batches = b""
    is_resumable = False
    is_unfinished = False
    unfinished_mark = b""
    last_error = b""

    def __init__(self, request: Request, reader: StreamReader | AnswerReader, projector: Projector) -> None:
        self._request = request
        self._reader = reader
        self._projector = projector
        self._fault: ApiError | None = None
        self._unsent = b""
        self._finish: tuple[str, ...] = ()
        self._usage: UsageEvent | None = None
        self.has_begun = False
        self.num_events = 0

    def feed(self, chunk: bytes) -> bytes:
        """Raises `UpstreamFault` once everything before the fault has been returned."""
        if self._fault is not None:
            raise UpstreamFault(self._fault)
        events = self._reader.feed(chunk)
        return self._project(events) if events else b""

    def flush(self) -> bytes:
        """The end of the stream. Raises `UpstreamFault` where the answer was not whole."""
        data = self._project(self._reader.end())
        if self._fault is not None:
            self._unsent = data
            raise UpstreamFault(self._fault)
        return data

    def holds_answer(self, data: bytes) -> bool:
        return bool(data)

    def rejoin(self) -> None:
        raise AssertionError("no other server can go on with a translated stream")

    def fail(self, error: ApiError) -> bytes | None:
        if not self.has_begun:
            return None
        unsent, self._unsent = self._unsent, b""
        return unsent + self._projector.fail(error)

    def usage(self) -> Usage:
        return _known_usage(self._usage, self._finish)

    def _project(self, events: list[Event]) -> bytes:
        self.num_events += len(events)
        project = self._projector.feed
        if self.has_begun and len(events) == 1:
            event = events[0]
            kind = type(event)
            if kind is not UsageEvent and kind is not Failure and kind is not Finish:
                return project(event)
        parts: list[bytes] = []
        for event in events:
            if isinstance(event, Failure):
                self._fault = _in_own_words(self._request, event.error)
                if not parts:
                    raise UpstreamFault(self._fault)
                break
            if not self.has_begun:
                self.has_begun = True
                # How long the prompt is, chat says last; both dialects say it again at the end.
                parts.append(self._projector.begin(0))
            parts.append(project(event))
            if isinstance(event, Finish):
                self._finish += (event.reason,)
            elif isinstance(event, UsageEvent):
                self._usage = event
                parts.append(self._projector.end())
        return b"".join(parts)


class TranslatedAnswer:
    """A chat answer in, the dialect's answer out."""

    def __init__(self, request: Request, reader: StreamReader | AnswerReader, collector: Collector) -> None:
        self._request = request
        self._reader = reader
        self._collector = collector
        self._finish: tuple[str, ...] = ()
        self._usage: UsageEvent | None = None

    def feed(self, chunk: bytes) -> None:
        self._collect(self._reader.feed(chunk))

    def body(self) -> bytes:
        self._collect(self._reader.end())
        return self._collector.body()

    def usage(self) -> Usage:
        return _known_usage(self._usage, self._finish)

    def _collect(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Failure):
                raise UpstreamFault(_in_own_words(self._request, event.error))
            if isinstance(event, Finish):
                self._finish += (event.reason,)
            elif isinstance(event, UsageEvent):
                self._usage = event
            self._collector.feed(event)


class CountAnswer:
    """The answer of `/tokenize`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pieces: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        self._pieces.append(chunk)

    def body(self) -> bytes:
        count = read_count(b"".join(self._pieces))
        if count is None:
            raise cannot_count(self._name)
        return count_tokens_body(count) if self._name == "count_tokens" else openai_responses.input_tokens_body(count)

    def usage(self) -> Usage:
        return Usage()
