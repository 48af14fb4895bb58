"""Framings of an answer: in which pieces it goes to a client, and what may be sent while nothing happens."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from cortex_core.errors import ApiError

EVENT_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Framing(msgspec.Struct, frozen=True):
    """headers: of an answer that is begun before anything is known of it. keep_alive: a piece that means nothing; None
    where there is none, and silence is all there can be. failure(error, request_id): the last piece of an answer that
    cannot be finished; None where breaking off is the only way to tell.
    """

    headers: tuple[tuple[bytes, bytes], ...] = ()
    keep_alive: bytes | None = None
    failure: Callable[[ApiError, str], bytes] | None = None


WHOLE_JSON = Framing()
"""An answer in one piece."""


def server_sent_events(keep_alive: bytes, failure: Callable[[ApiError, str], bytes]) -> Framing:
    return Framing(EVENT_STREAM_HEADERS, keep_alive, failure)
