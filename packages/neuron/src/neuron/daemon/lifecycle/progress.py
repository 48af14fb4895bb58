"""Progress of a load: time that is left, and waking up whoever follows it."""

from __future__ import annotations

import asyncio

import msgspec
from cortex_core.fleet import LoadProgress

_MIN_SAMPLE_S = 0.5


class ProgressClock:
    """Adds `eta_s` to what a load reports: bytes that are left at the mean rate of this phase so far.

    What was there when the phase began (a fetch that goes on where it was) counts as done, not as fast.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._first = LoadProgress("")
        self._last_bytes = 0

    def feed(self, progress: LoadProgress, now: float) -> LoadProgress:
        """`progress` with `eta_s` where it is known. now: seconds on a monotonic clock."""
        first = self._first
        is_same = (progress.phase, progress.bytes_total) == (first.phase, first.bytes_total)
        went_back = progress.bytes_done < self._last_bytes
        self._last_bytes = progress.bytes_done
        if not is_same or went_back:
            self._began, self._first = now, progress
            return progress
        elapsed = now - self._began
        done = progress.bytes_done - first.bytes_done
        if elapsed < _MIN_SAMPLE_S or done <= 0:
            return progress
        left = progress.bytes_total - progress.bytes_done
        return msgspec.structs.replace(progress, eta_s=round(left * elapsed / done, 1))


class Watchers:
    """Wakes everyone who waits for the next change."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def changed(self, timeout_s: float) -> None:
        """Until the next `wake`, or for `timeout_s`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await asyncio.wait((waiter,), timeout=timeout_s)
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


def load_deadline_s(weight_bytes: int, *, floor_s: float, min_bytes_per_s: float) -> float:
    """The longest a load of so many bytes may take: a floor, and the bytes at the rate of the slowest disk accepted."""
    return floor_s + weight_bytes / min_bytes_per_s
