"""ASGI's vocabulary, as types."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]


class Shortcut(Protocol):
    """What our own HTTP/1 offers beside `receive`, in the scope's extensions under `SHORTCUT`: no task and no timer for
    what is there already, or may never come."""

    def whole_body(self) -> bytes | None:
        """The body if all of it has come and none of it was received; it is received then. Else None."""

    def on_disconnect(self, call: Callable[[], None] | None) -> None:
        """Call this once the client is gone, now if it is; None: nothing any more."""


SHORTCUT = "cortex.shortcut"

JSON_CONTENT_TYPE = (b"content-type", b"application/json")


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header; `name` in lower case, as ASGI servers send them."""
    for key, value in headers:
        if key == name:
            return value
    return None
