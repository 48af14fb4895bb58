"""Protocols of a dialect: a module with these members is a `Dialect`."""

from __future__ import annotations

from typing import Protocol

from cortex_core.conversation import Request
from cortex_core.errors import ApiError
from cortex_core.events import Event


class Projector(Protocol):
    """One stream: events in, server-sent event bytes out.

    Order: `begin` once, `feed` for each event, `end` after Usage was fed. `fail` may take the place of what is
    left at any point; afterwards every method returns nothing. A Failure event fed is the same as `fail`.
    """

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None: ...

    def begin(self, prompt_tokens: int) -> bytes:
        """What goes out before the first token. prompt_tokens: length of the rendered prompt."""
        ...

    def feed(self, event: Event) -> bytes:
        """The bytes of one event, possibly none."""
        ...

    def end(self) -> bytes:
        """The terminal event. Raises `RuntimeError` before Usage was fed: an unfinished stream must not look whole."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """An error event that ends the stream."""
        ...

    def ping(self) -> bytes:
        """A keep-alive, allowed at any time."""
        ...


class Collector(Protocol):
    """One answer that is not streamed."""

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None: ...

    def feed(self, event: Event) -> None:
        """Raises the error of a Failure."""
        ...

    def body(self) -> bytes:
        """The JSON answer. Raises `RuntimeError` before every choice is finished and Usage was fed."""
        ...


class Dialect(Protocol):
    """One API surface, as a module or an object: a parser into `Request` and two projections of its events."""

    @property
    def Projector(self) -> type[Projector]: ...

    @property
    def Collector(self) -> type[Collector]: ...

    def parse(self, body: bytes) -> Request:
        """Raises `ApiError`, and nothing else, whatever the bytes."""
        ...

    def new_response_id(self) -> str: ...
