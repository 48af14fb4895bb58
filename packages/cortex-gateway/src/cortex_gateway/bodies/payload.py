"""A request's body on its way through: small and at hand, or large and in the pieces that it came in.

A large one is never put together here, copied or searched: what has to be known of it is found out by a body worker
(`facts`), and it goes on piece by piece.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from cortex_gateway.bodies.messages import Facts
from cortex_gateway.http.asgi import RawHeaders
from cortex_gateway.identity.estimate import Asked, asked_of
from cortex_gateway.placement.session_hints import RequestHints
from cortex_gateway.surfaces.envelope import Envelope, read_envelope

MAX_INLINE_BYTES = 2**20
"""Up to here a body is read on the loop: a decoder skips a megabyte in 1 to 6 ms, whatever is in it."""

MAX_QUICK_BYTES = 64 * 1024
"""Up to here that is done at any time, above it for few bodies in each round of the loop (`loop_turns`)."""

MAX_INLINE_CONTAINERS = 4_096
MAX_INLINE_COMMAS = 65_536
"""Up to here a body is translated on the loop. Each object costs up to 10 µs there, each other value less than 1."""

PIECE_BYTES = 256 * 1024
"""As much as the loop hands over at a time."""


class Payload:
    """pieces: the body, in order. facts: what a body worker found out of a large one."""

    __slots__ = ("_whole", "facts", "num_bytes", "pieces")

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.num_bytes = sum(map(len, pieces))
        self.facts: Facts | None = None
        self._whole: bytes | None = None

    @property
    def is_large(self) -> bool:
        return self.num_bytes > MAX_INLINE_BYTES

    @property
    def is_quick(self) -> bool:
        return self.num_bytes <= MAX_QUICK_BYTES

    def whole(self) -> bytes:
        """All of a small one."""
        assert not self.is_large
        if self._whole is None:
            self._whole = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        return self._whole

    def slices(self) -> Iterator[bytes]:
        """The body in pieces that are not too large to be handed over in one go."""
        for piece in self.pieces:
            if len(piece) <= PIECE_BYTES:
                yield piece
            else:
                yield from (piece[start : start + PIECE_BYTES] for start in range(0, len(piece), PIECE_BYTES))

    # ------------------------------------------------------------------------------------------ what it says

    def envelope(self) -> Envelope:
        """Raises `ApiError` where a small one is bad; a large one has been read."""
        facts = self.facts
        return read_envelope(self.whole()) if facts is None else Envelope(facts.model, facts.stream)

    def asked(self) -> Asked | None:
        return asked_of(self.whole()) if self.facts is None else self.facts.asked

    def hints(self, headers: RawHeaders) -> RequestHints:
        facts = self.facts
        if facts is None:
            return RequestHints(headers, self.whole())
        return RequestHints.known(headers, facts.session, facts.prompt)

    @property
    def is_quickly_translated(self) -> bool:
        """Whether reading all of it, and writing it anew, takes no time that others would notice."""
        if self.is_large:
            return False
        body = self.whole()
        containers = body.count(b"{") + body.count(b"[")
        return containers <= MAX_INLINE_CONTAINERS and body.count(b",") <= MAX_INLINE_COMMAS

    async def digest(self) -> bytes:
        """By which the same body is known again. Of a large one it is made in a thread, which needs no lock for it."""
        return await asyncio.to_thread(self._digest) if self.is_large else self._digest()

    def _digest(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for piece in self.pieces:
            digest.update(piece)
        return digest.digest()

    # ------------------------------------------------------------------------------------------ other bodies

    def replaced(self, place: tuple[int, int], text: bytes) -> Payload:
        """With `text` where the bytes from `place[0]` to `place[1]` are; everything else is shared."""
        start, end = place
        return Payload([*_part(self.pieces, 0, start), text, *_part(self.pieces, end, self.num_bytes)])

    def behind(self, head: bytes) -> Payload:
        """With `head` in front of it."""
        return Payload([head, *self.pieces])

    def data(self) -> bytes | aiohttp.Payload:
        """To be posted: as often as wanted."""
        return PiecesPayload(self) if self.is_large else self.whole()


def _part(pieces: list[bytes], start: int, end: int) -> Iterator[bytes]:
    position = 0
    for piece in pieces:
        first, last = max(start - position, 0), min(end - position, len(piece))
        if first < last:
            yield piece if (first, last) == (0, len(piece)) else piece[first:last]
        position += len(piece)


class PiecesPayload(aiohttp.Payload):
    """Sent piece by piece, each when the one before has been taken: a body in one piece holds the loop while it is
    copied into the connection's buffer."""

    _autoclose = True

    def __init__(self, payload: Payload) -> None:
        super().__init__(payload)
        self._pieces = payload
        self._size = payload.num_bytes

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("a body in pieces is not put together")

    async def write(self, writer: AbstractStreamWriter) -> None:
        for piece in self._pieces.slices():
            await writer.write(piece)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        await self.write(writer)
