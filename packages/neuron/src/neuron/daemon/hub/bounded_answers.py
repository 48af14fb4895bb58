"""Bounds on what a registry answers, beside the files themselves.

huggingface-hub reads listings, redirects and errors to their ends, however long they are and however slowly they come.
A hook of its HTTP client lets such a body end after so many bytes and seconds; the bodies of files are bounded where
they are written (`download`). Libraries before 1.0, which speak through `requests`, have no such hook: there only the
time between two bytes is bounded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

MAX_LISTING_BYTES = 8 * 2**20
"""A listing of 20,000 files takes about as much."""
MAX_OTHER_BYTES = 256 * 2**10
"""Of redirects and errors."""
MAX_SECONDS = 60.0
LISTING_TIMEOUT_S = 30.0
"""The longest silence while a listing comes."""


class EndlessAnswer(Exception):
    """A registry's answer is longer than any of its kind, or comes too slowly to be one."""


def limit_answers() -> None:
    """Have the library bound what it reads, from the next session on. Idempotent."""
    try:
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory
    except ImportError:
        return

    def bounded_client() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _limit]}
        return client

    set_client_factory(bounded_client)


def max_bytes_of(status: int, path: str) -> int | None:
    """The most that is read of an answer; None for a file's."""
    if not 200 <= status < 300:
        return MAX_OTHER_BYTES
    return MAX_LISTING_BYTES if path.startswith("/api/") else None


def _limit(response: Any) -> None:
    limit = max_bytes_of(response.status_code, response.request.url.path)
    if limit is not None:
        # The class that a body must be of comes from whichever HTTP library this one uses.
        base = sys.modules[type(response).__module__.partition(".")[0]].SyncByteStream
        response.stream = _bounded_stream(base)(response.stream, limit, response.request.url)


def _bounded_stream(base: type) -> Callable[[Any, int, object], Any]:
    class BoundedStream(base):  # type: ignore[misc]
        def __init__(self, stream: Any, limit: int, url: object) -> None:
            self._stream, self._limit, self._url = stream, limit, url

        def __iter__(self) -> Iterator[bytes]:
            began, num_bytes = time.monotonic(), 0
            for part in self._stream:
                num_bytes += len(part)
                if num_bytes > self._limit:
                    raise EndlessAnswer(f"an answer of more than {self._limit} bytes from {self._url}")
                if time.monotonic() - began > MAX_SECONDS:
                    raise EndlessAnswer(f"an answer that took more than {MAX_SECONDS:.0f} s from {self._url}")
                yield part

        def close(self) -> None:
            self._stream.close()

    return BoundedStream
