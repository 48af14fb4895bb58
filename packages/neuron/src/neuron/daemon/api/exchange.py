"""One HTTP request and its answer: identity, body, envelopes, and the client that may leave at any time."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from cortex_core.dialects.errors import (
    DialectName,
    dialect_of_path,
    error_body,
    headers_of,
    new_request_id,
    status_of,
)
from cortex_core.errors import ApiError
from cortex_core.hop import CACHE_SALT_HEADER, FINGERPRINT_HEADER, PRIORITIES, PRIORITY_HEADER

from neuron.daemon.api.asgi import ClientGone, RawHeaders, Receive, Scope, Send
from neuron.daemon.api.body import RequestBody
from neuron.daemon.common.config import ServerSection

_encode = msgspec.json.Encoder().encode
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_JSON = (b"content-type", b"application/json")
_MAX_ACCOUNT_BYTES = 64


class Exchange:
    """dialect decides the form of errors. request_id: the gateway's if it sent one, else a fresh one.

    resolved_model: the id a gateway resolved an alias to. is_hop: a gateway asks for usage in a comment. cors: headers
    for every answer.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, limits: ServerSection, *, cors: RawHeaders | None = None
    ) -> None:
        self._cors = cors or []
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: RawHeaders = list(scope["headers"])
        is_anthropic = self.header(b"anthropic-version") is not None
        self.dialect: DialectName = dialect_of_path(self.path, has_anthropic_version=is_anthropic)
        self.params: dict[str, Any] = {}
        self.has_started = False
        self.fingerprint: str | None = None
        self._is_ending = False
        self._query: bytes = scope.get("query_string", b"")
        self._receive = receive
        self._send = send
        self._write_timeout_s = limits.write_timeout_s
        self._body = RequestBody(receive, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
        self._body.is_complete = self.method in ("GET", "HEAD", "OPTIONS") and not self._announces_body()
        self._closes_by_header = str(scope.get("http_version", "1.1")).startswith("1")
        given = self.header(b"x-request-id")
        self.request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else new_request_id()

    def header(self, name: bytes) -> bytes | None:
        """The first value; `name` in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def resolved_model(self) -> str | None:
        value = self.header(b"x-cortex-resolved-model")
        return value.decode("utf-8", "replace") if value else None

    @property
    def principal(self) -> str | None:
        """Who asks, for fair shares and nothing else: the account a gateway names, else the API key as a digest.

        Nothing is verified here: what nobody believes was dropped at the door. None where there is neither.
        """
        for name in (b"x-cortex-principal", b"x-helexa-account-id"):
            account = self.header(name)
            if account:
                is_plain = len(account) <= _MAX_ACCOUNT_BYTES and account.isascii()
                text = account.decode("ascii") if is_plain else ""
                return f"account:{text if text.isprintable() and text else _digest(account)}"
        key = self.header(b"x-api-key") or b""
        if not key:
            scheme, _, key = (self.header(b"authorization") or b"").partition(b" ")
            key = key.strip() if scheme.lower() == b"bearer" else b""
        return f"key:{_digest(key)}" if key else None

    @property
    def cache_salt(self) -> str:
        """With whom cached prefixes are not to be shared, as a gateway says; empty without."""
        value = self.header(CACHE_SALT_HEADER.encode())
        return "" if not value else _digest(value)

    @property
    def priority(self) -> int:
        """As a gateway says: 0 is everybody's, above comes before, below behind."""
        return PRIORITIES.get((self.header(PRIORITY_HEADER.encode()) or b"").decode("latin-1"), 0)

    @property
    def is_hop(self) -> bool:
        return self.header(b"x-cortex-hop") == b"1"

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self._query.decode("latin-1")))

    async def read_body(self) -> bytes:
        """The whole body. Raises `ApiError` and `ClientGone`."""
        return await self._body.read(self.headers)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While inside, a client that hangs up cancels whatever is being awaited; it surfaces as `ClientGone`.

        Only after the body has been read: the watch takes what the server hands over.
        """
        task = asyncio.current_task()
        assert task is not None
        is_gone = False

        async def watch() -> None:
            nonlocal is_gone
            while (await self._receive())["type"] != "http.disconnect":
                continue
            if not self._is_ending:  # servers also report the end of an exchange that is complete
                is_gone = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if is_gone and task.uncancel() == 0:
                raise ClientGone from None
            raise
        finally:
            watcher.cancel()

    # ------------------------------------------------------------------ answers

    async def respond(
        self, status: int, body: bytes, *, headers: RawHeaders | None = None, content_type: bytes | None = None
    ) -> None:
        """A complete answer, JSON unless `content_type` says otherwise."""
        head = [(b"content-type", content_type) if content_type else _JSON, (b"content-length", b"%d" % len(body))]
        head += self._identity() + (headers or [])
        self._is_ending = True
        if self._body.is_complete:
            await self._start(status, head)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
            return
        if self._closes_by_header:  # HTTP/2 has no such header
            head.append((b"connection", b"close"))
        await self._start(status, head)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        await self._body.swallow()
        rest = asyncio.ensure_future(self._body.keep_moving())
        try:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            rest.cancel()
            with suppress(asyncio.CancelledError):
                await rest

    async def respond_empty(self, headers: RawHeaders) -> None:
        """204: headers and no body at all."""
        await self._body.swallow()
        self._is_ending = True
        await self._start(204, headers + self._identity())
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def respond_json(self, value: Any, *, status: int = 200) -> None:
        await self.respond(status, _encode(value))

    async def fail(self, error: ApiError, more: RawHeaders | None = None) -> None:
        """The error in the envelope of the dialect that this path speaks, with `more` headers."""
        headers = [(name.encode(), value.encode()) for name, value in headers_of(error).items()] + (more or [])
        body = error_body(error, self.dialect, self.request_id)
        await self.respond(status_of(error, self.dialect), body, headers=headers)

    async def start_stream(self) -> None:
        """Begin an event stream; from here on errors are events."""
        head: RawHeaders = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        if self.fingerprint and self.is_hop:
            head.append((FINGERPRINT_HEADER.encode(), self.fingerprint.encode()))
        await self._start(200, head + self._identity())

    async def send_chunk(self, data: bytes) -> None:
        """Waits while the client does not read: that is the back-pressure. Raises `ClientGone` if it never does."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise ClientGone from None

    async def end_stream(self, data: bytes = b"") -> None:
        self._is_ending = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _start(self, status: int, headers: RawHeaders) -> None:
        self.has_started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _identity(self) -> RawHeaders:
        identity = self.request_id.encode()
        return [(b"x-request-id", identity), (b"request-id", identity), *self._cors]

    def _announces_body(self) -> bool:
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
                return True
        return False


def _digest(secret: bytes) -> str:
    """Enough of a key to tell it from others, and nothing to find it by."""
    return hashlib.sha256(secret).hexdigest()[:16]
