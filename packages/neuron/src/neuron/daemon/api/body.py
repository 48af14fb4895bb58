"""A request's body: read once, bounded in size and in time, and swallowed when the answer is ready before it is.

hypercorn has no limits of its own and hands bodies over through a bounded queue. An answer given before the body has
been read must therefore go on reading for a while: closing a socket with unread input makes the kernel send a reset,
which can destroy the answer on its way.
"""

from __future__ import annotations

import asyncio
import zlib
from contextlib import suppress

from cortex_core.errors import ApiError

from neuron.daemon.api.asgi import ClientGone, RawHeaders, Receive

SWALLOW_TIMEOUT_S = 10.0
SWALLOW_LIMITS = 8
"""How much of a refused body is swallowed, in body limits."""
_LONG_COMPRESSED_BYTES = 1_024
"""Of zeros, this is a megabyte; more is inflated on a thread, which holds no lock meanwhile."""


class RequestBody:
    """is_complete: nothing of the body is left with the server."""

    def __init__(self, receive: Receive, *, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self.is_complete = False

    async def read(self, headers: RawHeaders) -> bytes:
        """The whole body, decompressed. Raises `ApiError` 413, 408, 415 or 400, and `ClientGone`."""
        encoding = b""
        for name, value in headers:
            if name == b"content-length":
                if not value.isdigit() or int(value) > self._max_bytes:
                    raise self._too_large()
            elif name == b"content-encoding":
                encoding = value.strip().lower()
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read_all()
        except TimeoutError:
            raise ApiError(
                "timeout",
                f"The request body did not arrive within {self._timeout_s:.0f} s.",
                code="request_timeout",
                status=408,
            ) from None
        if encoding in (b"", b"identity"):
            return body
        if len(body) < _LONG_COMPRESSED_BYTES:
            return self._decompress(body, encoding)
        return await asyncio.to_thread(self._decompress, body, encoding)

    async def _read_all(self) -> bytes:
        parts: list[bytes] = []
        num_bytes = 0
        while not self.is_complete:
            part = await self._next()
            num_bytes += len(part)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            if part:
                parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGone
        self.is_complete = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def swallow(self) -> None:
        """Read and drop what is left, up to a bound of bytes and seconds."""
        left = self._max_bytes * SWALLOW_LIMITS
        with suppress(TimeoutError, ClientGone):
            async with asyncio.timeout(SWALLOW_TIMEOUT_S):
                while not self.is_complete and left > 0:
                    left -= len(await self._next())

    async def keep_moving(self) -> None:
        """Read and drop until the connection ends, so that the server is never blocked on handing a body over."""
        with suppress(ClientGone):
            while not self.is_complete:
                await self._next()

    def _too_large(self) -> ApiError:
        return ApiError(
            "request_too_large",
            f"The request body is larger than {self._max_bytes} bytes.",
            code="request_too_large",
            extras={"max_bytes": self._max_bytes},
        )

    def _decompress(self, body: bytes, encoding: bytes) -> bytes:
        if encoding not in (b"gzip", b"x-gzip", b"deflate"):
            raise ApiError(
                "invalid_request",
                f"content-encoding `{encoding.decode('latin-1')}` is not supported; send the body plain or with gzip.",
                code="unsupported_media_type",
                status=415,
            )
        inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        try:
            plain = inflate.decompress(body, self._max_bytes + 1)
        except zlib.error:
            plain = None
        if plain is not None and len(plain) > self._max_bytes:
            raise self._too_large()
        if plain is None or not inflate.eof:
            raise ApiError(
                "invalid_request", "The body is not what its content-encoding says.", code="invalid_encoding"
            )
        return plain
