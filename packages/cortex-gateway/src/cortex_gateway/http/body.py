"""Read a request body once, within a limit of size and of time, and leave the connection usable.

An ASGI server hands over the body through a bounded queue. An application that answers without reading all of
it leaves the server blocked on that queue, and closing a socket with unread input makes the kernel send a reset
that can destroy the answer on its way. So whoever answers early swallows the rest first: `swallowed`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from cortex_core.errors import ApiError

from cortex_gateway.http.asgi import RawHeaders, Receive, Shortcut

DISCARD_TIMEOUT_S = 10.0
BODY_MEMORY_RETRY_S = 5
INFLATED_BYTES = 256 * 1024
"""As much comes out of a compressed body at a time."""
DISCARD_FACTOR = 8
"""How much of a refused body is swallowed so that its sender gets to read the answer, in body limits."""


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


class BodyMemory:
    """What all bodies of a gateway may take together: many slow or large ones must not add up without end."""

    __slots__ = ("held", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0


class RequestBody:
    """One request's body. `is_complete` tells whether the server still holds some of it.

    What is read counts against `memory` until `release`.
    """

    __slots__ = ("_memory", "_num_counted", "_receive", "_shortcut", "is_complete", "max_bytes", "timeout_s")

    def __init__(
        self,
        receive: Receive,
        *,
        max_bytes: int,
        timeout_s: float,
        memory: BodyMemory | None = None,
        shortcut: Shortcut | None = None,
    ) -> None:
        self._receive = receive
        self._shortcut = shortcut
        self._memory = memory
        self._num_counted = 0
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.is_complete = False

    async def read(self, headers: RawHeaders) -> bytes:
        """The whole body, put together. For small ones; raises as `read_pieces`."""
        pieces = await self.read_pieces(headers)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_pieces(self, headers: RawHeaders) -> list[bytes]:
        """The whole body, at least one piece. Raises `ApiError` 413 (by declared length or by count), 408, 415 and
        `ClientGone`."""
        encoding = None
        for name, value in headers:
            if name == b"content-length":
                if not value.isdigit() or int(value) > self.max_bytes:
                    raise too_large(self.max_bytes)
            elif name == b"content-encoding":
                encoding = value.strip().lower()
        whole = self._shortcut.whole_body() if self._shortcut is not None else None
        pieces = await self._receive_in_time() if whole is None else [self._at_once(whole)]
        if encoding is None or encoding == b"identity":
            return pieces
        return await self._inflated(pieces, encoding)

    async def _inflated(self, pieces: list[bytes], encoding: bytes) -> list[bytes]:
        """A little of it here, the rest in a thread, which needs no lock of the interpreter for it."""
        inflating = Inflating(encoding, self.max_bytes)
        plain: list[bytes] = []
        is_here = True
        for piece in pieces:
            inflating.feed(piece)
            while True:
                found = inflating.take() if is_here else await asyncio.to_thread(inflating.take)
                if not found:
                    break
                is_here = False
                self._count(len(found))
                plain.append(found)
        inflating.end()
        return plain or [b""]

    def release(self) -> None:
        """The body is not needed any more."""
        if self._memory is not None:
            self._memory.held -= self._num_counted
            self._num_counted = 0

    def _count(self, num_bytes: int) -> None:
        memory = self._memory
        if memory is None:
            return
        if memory.held + num_bytes > memory.max_bytes:
            raise ApiError(
                "overloaded",
                "The gateway holds as many request bodies as it may; ask again.",
                code="body_memory_full",
                retry_after=BODY_MEMORY_RETRY_S,
            )
        memory.held += num_bytes
        self._num_counted += num_bytes

    def _at_once(self, body: bytes) -> bytes:
        self.is_complete = True
        if len(body) > self.max_bytes:
            raise too_large(self.max_bytes)
        self._count(len(body))
        return body

    async def _receive_in_time(self) -> list[bytes]:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._receive_all()
        except TimeoutError:
            raise ApiError(
                "timeout", "The request body did not arrive in time.", code="request_timeout", status=408
            ) from None

    async def _receive_all(self) -> list[bytes]:
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGone
        first: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return [self._at_once(first)]
        self._count(len(first))
        parts = [first]
        num_bytes = len(first)
        while True:
            if num_bytes > self.max_bytes:
                raise too_large(self.max_bytes)
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            part = message.get("body", b"")
            if part:
                self._count(len(part))
                parts.append(part)
                num_bytes += len(part)
            if not message.get("more_body", False):
                self.is_complete = True
                break
        if num_bytes > self.max_bytes:
            raise too_large(self.max_bytes)
        return parts

    @asynccontextmanager
    async def swallowed(self) -> AsyncIterator[None]:
        """Take, within bounds, what the client is still sending; inside, the answer is ended."""
        with suppress(TimeoutError, ClientGone):
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                await self._discard(self.max_bytes * DISCARD_FACTOR)
        # Beyond the bound: keep the queue moving while the server closes, or it would wait for us for ever.
        rest = asyncio.ensure_future(self._discard(None))
        try:
            yield
        finally:
            rest.cancel()
            with suppress(asyncio.CancelledError, ClientGone):
                await rest

    async def _discard(self, max_bytes: int | None) -> None:
        num_bytes = 0
        while not self.is_complete and (max_bytes is None or num_bytes < max_bytes):
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            num_bytes += len(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)


def too_large(max_bytes: int) -> ApiError:
    return ApiError(
        "request_too_large",
        f"The request body is larger than {max_bytes} bytes.",
        code="request_too_large",
        extras={"max_bytes": max_bytes},
    )


class Inflating:
    """Undoes `content-encoding: gzip` or `deflate`, a piece at a time. Raises `ApiError` 415 for other encodings, 413
    where more than `max_bytes` come out of it (a bomb, often), 400 for noise."""

    def __init__(self, encoding: bytes, max_bytes: int) -> None:
        if encoding not in (b"gzip", b"x-gzip", b"deflate"):
            raise ApiError(
                "invalid_request",
                f"content-encoding `{encoding[:64].decode('latin-1')}` is not supported; send the body plain or with "
                "gzip.",
                code="unsupported_media_type",
                status=415,
            )
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._fed = b""

    def feed(self, data: bytes) -> None:
        """Once everything that was fed before has been taken."""
        self._fed = data

    def take(self) -> bytes:
        """The next piece of what was fed; empty where there is no more of it."""
        if self._inflate.eof:
            return b""
        try:
            plain = self._inflate.decompress(self._fed, INFLATED_BYTES)
        except zlib.error:
            raise ApiError(
                "invalid_request", "The body is not what its content-encoding says.", code="invalid_encoding"
            ) from None
        self._fed = self._inflate.unconsumed_tail
        self._num_bytes += len(plain)
        if self._num_bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        return plain

    def end(self) -> None:
        if not self._inflate.eof:
            raise ApiError("invalid_request", "The compressed body is truncated.", code="invalid_encoding")
