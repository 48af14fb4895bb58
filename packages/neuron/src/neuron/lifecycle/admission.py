"""Who may use a model now, who waits, and who is sent away: one bounded first-come queue per model.

A place is taken before anything is awaited and given back by its context manager, so a client that leaves while it
waits leaves no trace (F16).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cortex_core.errors import ApiError


class Admission:
    """max_in_flight requests work, max_queue_depth wait up to max_wait_s, the rest are refused at once."""

    def __init__(self, *, max_in_flight: int, max_queue_depth: int, max_wait_s: float) -> None:
        self.max_in_flight = max_in_flight
        self.max_queue_depth = max_queue_depth
        self.max_wait_s = max_wait_s
        self.in_flight = 0
        self.rejected_queue_full = 0
        self.rejected_timeout = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._closed: Callable[[], ApiError] | None = None
        self._idle: list[asyncio.Future[None]] = []
        self._idle_since = time.monotonic()

    @property
    def idle_s(self) -> float | None:
        """Seconds since the last request left; None while one is here."""
        return None if self.in_flight or self.queue_depth else round(time.monotonic() - self._idle_since, 3)

    @property
    def queue_depth(self) -> int:
        return len(self._queue)

    def apply(self) -> Ticket:
        """A seat or a place in the queue, at once. Raises `ApiError`: closed, or the queue is full (429)."""
        if self._closed is not None:
            raise self._closed()
        if self.in_flight < self.max_in_flight and not self._queue:
            self.in_flight += 1
            return Ticket(self, None)
        if len(self._queue) >= self.max_queue_depth:
            self.rejected_queue_full += 1
            raise ApiError(
                "rate_limit",
                f"Too many requests: {self.in_flight} are being worked on and {len(self._queue)} wait.",
                code="rate_limit_exceeded",
                retry_after=self._retry_after(),
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        return Ticket(self, place)

    def close(self, error: Callable[[], ApiError]) -> None:
        """Send away who waits and whoever comes; those at work go on."""
        self._closed = error
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_exception(error())

    def open(self) -> None:
        self._closed = None

    async def drained(self) -> None:
        """Wait until nobody is at work."""
        while self.in_flight:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter

    def _retry_after(self) -> int:
        return max(1, min(120, (len(self._queue) + 1) * 2))

    def _timed_out(self) -> ApiError:
        self.rejected_timeout += 1
        return ApiError(
            "overloaded",
            f"The request waited {self.max_wait_s:.0f} s for a free place and got none.",
            code="queue_timeout",
            retry_after=self._retry_after(),
        )

    def _leave(self, place: asyncio.Future[None] | None) -> None:
        if place is not None and place in self._queue:
            self._queue.remove(place)
            place.cancel()
            return
        if place is not None and (place.cancelled() or place.exception() is not None):
            return  # sent away: it never had a seat
        self.in_flight -= 1
        while self._queue and self.in_flight < self.max_in_flight:
            successor = self._queue.popleft()
            if not successor.done():
                self.in_flight += 1
                successor.set_result(None)
        if not self.in_flight:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()
            self._idle_since = time.monotonic()


class Ticket:
    """One request's place; leaving the context gives it back, whatever it was."""

    def __init__(self, admission: Admission, place: asyncio.Future[None] | None) -> None:
        self._admission = admission
        self._place = place
        self._deadline = asyncio.get_running_loop().time() + admission.max_wait_s
        self._is_open = True

    @property
    def max_wait_s(self) -> float:
        return self._admission.max_wait_s

    @property
    def is_seated(self) -> bool:
        place = self._place
        return place is None or (place.done() and not place.cancelled() and place.exception() is None)

    async def wait(self, timeout_s: float) -> bool:
        """Whether there is a seat within `timeout_s`. Raises `ApiError` when sent away or out of time."""
        place = self._place
        if place is None:
            return True
        loop = asyncio.get_running_loop()
        left_s = self._deadline - loop.time()
        await asyncio.wait((place,), timeout=max(0.0, min(timeout_s, left_s)))
        if place.done():
            place.result()
            return True
        if loop.time() >= self._deadline:
            raise self._admission._timed_out()
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_open:
            self._is_open = False
            self._admission._leave(self._place)
