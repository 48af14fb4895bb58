"""The last exchanges as they were, for whoever has to find out what a client really sent and got. Off by default.

They are kept in memory and nowhere else: prompts and answers on a disk would outlive their reason, in backups and under
other people's permissions. Bounded in number and in bytes, those of each exchange and of all together; secrets are
taken out before anything is kept.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from cortex_gateway.configuration.current import Current
from cortex_gateway.http.asgi import Message, Scope, Send
from cortex_gateway.observability.access_log import AccessRecord
from cortex_gateway.observability.redaction import clean_body, clean_headers, clean_query, without_images

MAX_INLINE_BYTES = 64 * 1024
"""What is larger is searched for images and secrets in a thread: it may take a fifth of a second for each megabyte."""

EVENT_OVERHEAD = 64
"""What a piece of an answer is charged beside its bytes, so that a stream of empty ones is bounded too."""


class ShownBody(Protocol):
    """The body of a large request as somebody else has read it: its beginning, and what was left out."""

    @property
    def data(self) -> bytes: ...

    @property
    def is_cut(self) -> bool: ...

    @property
    def is_shortened(self) -> bool: ...


class Piece(msgspec.Struct, frozen=True):
    """Some bytes of an answer, as they went to the client: at_ms since the request came."""

    at_ms: float
    data: bytes


class Attempt(msgspec.Struct, frozen=True):
    """The request went to this node."""

    at_ms: float
    node: str
    route: str


class CapturedRequest(msgspec.Struct, frozen=True):
    """body: None where it never came, or nothing was kept of it. num_bytes: as it came. is_cut: its end is missing.
    is_shortened: there were images in it."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes | None
    num_bytes: int
    is_cut: bool
    is_shortened: bool


class CapturedAnswer(msgspec.Struct, frozen=True):
    """An answer as it was sent. is_cut: more came than is kept; status: None where none was sent."""

    status: int | None
    headers: list[tuple[str, str]]
    pieces: list[Piece]
    num_bytes: int
    is_cut: bool


class Exchanged(msgspec.Struct, frozen=True):
    """One exchange, once it is over; summary is its access line. num_bytes: what it is charged.

    Bodies are kept as bytes: as text, one emoji makes each of their characters four bytes long.
    """

    summary: AccessRecord
    request: CapturedRequest
    attempts: list[Attempt]
    answer: CapturedAnswer
    num_bytes: int


class Captures:
    """num_bytes: of what is kept and of what is being captured. max_exchanges: 0 where captures are off, and nobody has
    anything more to do with them. override: set by an admin, for as long as this gateway runs."""

    def __init__(self, current: Current, *, clock: Callable[[], float]) -> None:
        self._current = current
        self._clock = clock
        self._kept: OrderedDict[str, Exchanged] = OrderedDict()
        self._making: set[asyncio.Task[None]] = set()
        self.num_bytes = 0
        self.override: int | None = None
        self.max_exchanges = 0
        self.adopt()

    def adopt(self, override: int | None = None) -> None:
        """Keep as many as the configuration says, or an admin: `override`, where it is given."""
        if override is not None:
            self.override = override
        self.max_exchanges = self._current.config.capture.exchanges if self.override is None else self.override
        self.trim()

    def begin(self, scope: Scope) -> Capture:
        """To be called where `max_exchanges` is not 0."""
        return Capture(self, scope, self._clock, self._current.config.capture.exchange_bytes)

    def all(self) -> list[Exchanged]:
        """The oldest first."""
        return list(self._kept.values())

    def find(self, request_id: str) -> Exchanged | None:
        return self._kept.get(request_id)

    def clear(self) -> int:
        """Forget them; returns how many there were."""
        count = len(self._kept)
        while self._kept:
            self._forget_oldest()
        return count

    def reserve(self, num_bytes: int) -> bool:
        """Room for so much more, older exchanges making it; False if there is none."""
        limit = self._current.config.capture.total_bytes
        while self.num_bytes + num_bytes > limit and self._kept:
            self._forget_oldest()
        if self.num_bytes + num_bytes > limit:
            return False
        self.num_bytes += num_bytes
        return True

    def keep(self, exchanged: Exchanged) -> None:
        """Its bytes have been reserved."""
        self._kept[exchanged.summary.id] = exchanged
        self.trim()

    def keep_later(self, making: Coroutine[Any, Any, Exchanged], num_bytes: int) -> None:
        """As `keep`, once it has been made."""
        task = asyncio.create_task(self._keep_when_made(making, num_bytes))
        self._making.add(task)
        task.add_done_callback(self._making.discard)

    async def _keep_when_made(self, making: Coroutine[Any, Any, Exchanged], num_bytes: int) -> None:
        try:
            self.keep(await making)
        except BaseException:
            self.num_bytes -= num_bytes
            raise

    def trim(self) -> None:
        """Forget what is more than is wanted now."""
        while len(self._kept) > self.max_exchanges:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, forgotten = self._kept.popitem(last=False)
        self.num_bytes -= forgotten.num_bytes


class Capture:
    """One exchange while it goes on. It holds on to bytes that are there anyway, and copies none."""

    __slots__ = (
        "_answer_bytes",
        "_answer_is_cut",
        "_attempts",
        "_began",
        "_body",
        "_body_is_clean",
        "_captures",
        "_clock",
        "_headers",
        "_max_bytes",
        "_num_bytes",
        "_pieces",
        "_request_bytes",
        "_request_is_cut",
        "_request_is_shortened",
        "_scope",
        "_status",
    )

    def __init__(self, captures: Captures, scope: Scope, clock: Callable[[], float], max_bytes: int) -> None:
        self._captures = captures
        self._scope = scope
        self._clock = clock
        self._began = clock()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._reserve(sum(len(name) + len(value) for name, value in scope["headers"]) + EVENT_OVERHEAD)
        self._body: bytes | None = None
        self._body_is_clean = False
        self._request_bytes = 0
        self._request_is_cut = False
        self._request_is_shortened = False
        self._attempts: list[Attempt] = []
        self._status: int | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[tuple[float, bytes]] = []
        self._answer_bytes = 0
        self._answer_is_cut = False

    def watched(self, send: Send) -> Send:
        """A `send` that also notes what goes through it, when it goes."""

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                self._headers = list(message.get("headers", ()))
            elif data := message.get("body", b""):
                self._note(data)
            await send(message)

        return send_noted

    @property
    def max_request_bytes(self) -> int:
        """The request's body may have half the room; what it leaves is the answer's."""
        return self._max_bytes // 2

    async def came(self, body: bytes) -> None:
        """The request's body."""
        is_small = len(body) <= MAX_INLINE_BYTES
        plain = without_images(body) if is_small else await asyncio.to_thread(without_images, body)
        kept = plain[: self.max_request_bytes]
        self._keep_body(len(body), kept, is_cut=len(kept) < len(plain), is_shortened=len(plain) < len(body))

    def came_large(self, num_bytes: int, shown: ShownBody | None) -> None:
        """The request's body, of which `shown` was found elsewhere, its secrets taken out."""
        if shown is None:
            self._request_bytes, self._request_is_cut = num_bytes, True
            return
        self._body_is_clean = True
        self._keep_body(num_bytes, shown.data, is_cut=shown.is_cut, is_shortened=shown.is_shortened)

    def _keep_body(self, num_bytes: int, kept: bytes, *, is_cut: bool, is_shortened: bool) -> None:
        self._request_bytes, self._request_is_shortened = num_bytes, is_shortened
        if self._reserve(len(kept)):
            self._body = kept
        self._request_is_cut = self._body is None or is_cut

    def attempt(self, node: str, route: str) -> None:
        self._attempts.append(Attempt(self._now_ms(), node, route))

    def end(self, summary: AccessRecord) -> None:
        """Over: from now on it can be looked at; a large one a moment later, when its secrets have been taken out."""
        if self._num_bytes <= MAX_INLINE_BYTES:
            self._captures.keep(self._exchanged(summary))
        else:
            self._captures.keep_later(asyncio.to_thread(self._exchanged, summary), self._num_bytes)

    def _exchanged(self, summary: AccessRecord) -> Exchanged:
        return Exchanged(
            summary=summary,
            request=CapturedRequest(
                method=self._scope["method"],
                path=self._scope["path"],
                query=clean_query(self._scope.get("query_string", b"")).decode("utf-8", "replace"),
                headers=_shown(clean_headers(self._scope["headers"])),
                body=self._body if self._body is None or self._body_is_clean else clean_body(self._body),
                num_bytes=self._request_bytes,
                is_cut=self._request_is_cut,
                is_shortened=self._request_is_shortened,
            ),
            attempts=self._attempts,
            answer=CapturedAnswer(
                status=self._status,
                headers=_shown(clean_headers(self._headers)),
                pieces=self._clean_pieces(),
                num_bytes=self._answer_bytes,
                is_cut=self._answer_is_cut,
            ),
            num_bytes=self._num_bytes,
        )

    def _note(self, data: bytes) -> None:
        self._answer_bytes += len(data)
        if self._answer_is_cut:
            return
        if self._reserve(len(data) + EVENT_OVERHEAD):
            self._pieces.append((self._now_ms(), data))
        else:
            self._answer_is_cut = True

    def _clean_pieces(self) -> list[Piece]:
        """Secrets are rare in answers: all of one is searched at once, and the pieces only where there is one."""
        whole = b"".join(data for _, data in self._pieces)
        clean = clean_body(whole)
        if clean == whole:
            return [Piece(at_ms, data) for at_ms, data in self._pieces]
        pieces = [Piece(at_ms, clean_body(data)) for at_ms, data in self._pieces]
        if b"".join(piece.data for piece in pieces) == clean:
            return pieces
        return [Piece(self._pieces[0][0], clean)]  # it came in parts: better one piece than a half of it

    def _reserve(self, num_bytes: int) -> bool:
        if self._num_bytes + num_bytes > self._max_bytes or not self._captures.reserve(num_bytes):
            return False
        self._num_bytes += num_bytes
        return True

    def _now_ms(self) -> float:
        return round((self._clock() - self._began) * 1000, 2)


def _shown(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def summary_of(exchanged: Exchanged) -> dict[str, Any]:
    """The access line, and how much there is to look at."""
    return {
        **msgspec.to_builtins(exchanged.summary),
        "request_bytes": exchanged.request.num_bytes,
        "answer_bytes": exchanged.answer.num_bytes,
        "is_cut": exchanged.request.is_cut or exchanged.answer.is_cut,
    }


def document_of(exchanged: Exchanged) -> dict[str, Any]:
    """All of it, as text."""
    body = exchanged.request.body
    pieces = [
        {"at_ms": piece.at_ms, "text": piece.data.decode("utf-8", "replace")} for piece in exchanged.answer.pieces
    ]
    request = {name: getattr(exchanged.request, name) for name in exchanged.request.__struct_fields__}
    answer = {name: getattr(exchanged.answer, name) for name in exchanged.answer.__struct_fields__}
    return {
        "summary": exchanged.summary,
        "request": {**request, "body": None if body is None else body.decode("utf-8", "replace")},
        "attempts": exchanged.attempts,
        "answer": {**answer, "pieces": pieces},
        "num_bytes": exchanged.num_bytes,
    }
