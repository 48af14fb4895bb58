"""A streamed answer as the relay knows it, whoever writes it and in whatever dialect."""

from __future__ import annotations

from typing import Protocol

import msgspec
from cortex_core.errors import ApiError


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, None is unknown, which is not 0; and why each choice ended, where that is known."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish: tuple[str, ...] = ()


class AnswerStream(Protocol):
    """Fed what was read, returns what is to be sent.

    batches: the marks behind what was sent, as `cortex_core.hop.resume_body` takes them; num_events: how much it was,
    where there are no marks.
    """

    num_events: int

    @property
    def head(self) -> bytes | None:
        """What the node that began it said of it, for the one that goes on; None where none could."""
        ...

    @property
    def batches(self) -> bytes | bytearray: ...

    @property
    def is_resumable(self) -> bool:
        """Whether another node could go on from what was sent."""
        ...

    @property
    def is_unfinished(self) -> bool:
        """At the end of the stream: the node gave up, for the reason in `unfinished_mark`; another one may go on."""
        ...

    @property
    def unfinished_mark(self) -> bytes: ...

    @property
    def last_error(self) -> bytes:
        """At the end of the stream: the error that it ends with, as a neuron gave it; else nothing."""
        ...

    def rejoin(self) -> None:
        """Another node goes on with it."""
        ...

    def feed(self, chunk: bytes) -> bytes: ...

    def holds_answer(self, data: bytes) -> bool:
        """Whether what the node of this attempt has written has something of the answer itself. data: what `feed`
        returned last. Asked until it is true."""
        ...

    def flush(self) -> bytes:
        """The end of the stream: what is still held."""
        ...

    def usage(self) -> Usage: ...

    def fail(self, error: ApiError) -> bytes | None:
        """What ends the stream where it has begun in words of its own; None where the surface has them."""
        ...
