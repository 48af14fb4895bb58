"""A device that does nothing before somebody waits for it, or now and then a little, in order.

Whoever reads a result before waiting reads the last step's, and whoever overwrites an input too early changes what is
computed: both give other tokens than a device that works at once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable


class LazyStream:
    """Work is done by `wait`, up to the place waited for, and by chance in `submit`. An error of some work is raised by
    the first wait for a place behind it, as CUDA reports a kernel's."""

    is_deferred = True

    def __init__(self, seed: int = 0, eagerness: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._eagerness = eagerness
        self._queue: deque[Callable[[], None]] = deque()
        self._num_submitted = 0
        self._num_done = 0
        self._errors: list[tuple[int, Exception]] = []

    def submit(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        self._num_submitted += 1
        while self._queue and self._random.random() < self._eagerness:
            self._do_next()

    def record(self) -> LazyTicket:
        return LazyTicket(self, self._num_submitted)

    def _do_next(self) -> None:
        work = self._queue.popleft()
        self._num_done += 1
        try:
            work()
        except Exception as exc:
            self._errors.append((self._num_done, exc))

    def wait_for(self, place: int) -> None:
        while self._num_done < place:
            self._do_next()
        due = [error for number, error in self._errors if number <= place]
        self._errors = [entry for entry in self._errors if entry[0] > place]
        if due:
            raise due[0]


class LazyTicket:
    def __init__(self, stream: LazyStream, place: int) -> None:
        self._stream = stream
        self._place = place

    def wait(self) -> None:
        self._stream.wait_for(self._place)
