"""Requests that end the processes they are given to.

A connection that closes without a byte of answer may be anybody's doing: an operator's, the network's, another
request's. So such a request is asked elsewhere, once. Where the second process ends under it too, it is the one thing
that both had in common: it is refused, and so is its body for a while, since clients ask again by themselves.
Pure but for the clock that it is given.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from cortex_core.errors import ApiError

MAX_DEATHS = 2
"""Processes that may end under one request."""
REMEMBERED_S = 600.0
MAX_REMEMBERED = 256

Digest = Callable[[], bytes]


class Blame:
    """Bodies that have ended two processes. now: seconds of a clock that is never set."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._until: OrderedDict[tuple[str, int, bytes], float] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def is_suspect(self, num_bytes: int) -> bool:
        """Whether a body of this length is remembered."""
        return num_bytes in self._lengths

    def check(self, model: str, num_bytes: int, digest: Digest) -> None:
        """Raises `ApiError` for a body that is remembered; digest is asked for where one of its length is."""
        if not self._until:
            return
        self._forget()
        if num_bytes in self._lengths and (model, num_bytes, digest()) in self._until:
            raise request_kills_engine(model)

    def remember(self, model: str, num_bytes: int, digest: bytes) -> None:
        key = (model, num_bytes, digest)
        if key not in self._until:
            self._lengths[num_bytes] += 1
        self._until[key] = self._now() + REMEMBERED_S
        self._until.move_to_end(key)
        if len(self._until) > MAX_REMEMBERED:
            self._drop(next(iter(self._until)))

    def _forget(self) -> None:
        now = self._now()
        while self._until:
            key, until = next(iter(self._until.items()))
            if until > now:
                return
            self._drop(key)

    def _drop(self, key: tuple[str, int, bytes]) -> None:
        del self._until[key]
        self._lengths[key[1]] -= 1
        self._lengths += Counter()  # those that are zero go


def request_kills_engine(model: str) -> ApiError:
    """Not retryable, in the statuses that clients do not repeat."""
    return ApiError(
        "invalid_request",
        f"This request is not served: {MAX_DEATHS} processes that served `{model}` ended while they worked on it, each "
        f"without a byte of answer. The same request is refused for {REMEMBERED_S / 60:.0f} minutes.",
        code="request_kills_engine",
        extras={"deaths": MAX_DEATHS},
    )
