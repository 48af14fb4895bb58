"""Watchdog of a loaded engine group: it completes steps while it holds work, and each of its processes answers.

Both are needed. A thread that answers pings says nothing of a device thread that waits in a collective for ever; a
group without work completes no steps, and a stopped process of it would be found only by the next request.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Watchdog:
    """Watches one process group from the moment it is loaded.

    holds_work: whether sequences are in the engine. ping: sends a `Ping` with a nonce to every rank. step_deadline_s:
    for the first step; each step brings the one for its successor. ping_interval_s: a rank that has not answered when
    the next ping is due is mute. While nothing happens, it wakes once per ping interval.
    """

    def __init__(
        self,
        *,
        world_size: int,
        step_deadline_s: float,
        holds_work: Callable[[], bool],
        ping: Callable[[int], None],
        ping_interval_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._holds_work = holds_work
        self._ping = ping
        self._ping_interval_s = ping_interval_s
        self._step_deadline_s = step_deadline_s
        self._last_step = self._loop.time()
        self._nonce = 0
        self._answered = [0] * world_size
        self._next_ping = self._loop.time()
        self._has_news = asyncio.Event()

    # ------------------------------------------------------------------ what it is told

    def work_began(self) -> None:
        """The engine held nothing, and has just been given something."""
        self._last_step = self._loop.time()
        self._has_news.set()

    def stepped(self, deadline_s: float) -> None:
        """A step is complete; the next one has so long."""
        self._last_step = self._loop.time()
        self._step_deadline_s = deadline_s

    def ponged(self, rank: int, nonce: int) -> None:
        self._answered[rank] = nonce

    # ------------------------------------------------------------------ what it says

    def problem(self) -> str | None:
        """What is wrong now, None if nothing is."""
        silent_s = self._loop.time() - self._last_step
        if self._holds_work() and silent_s >= self._step_deadline_s:
            return f"no step was completed for {silent_s:.1f} s, {self._step_deadline_s:.1f} s are allowed"
        if self._loop.time() >= self._next_ping:
            mute = [str(rank) for rank, nonce in enumerate(self._answered) if nonce != self._nonce]
            if mute:
                return f"the process of rank {' and '.join(mute)} has not answered for {self._ping_interval_s:.0f} s"
        return None

    async def until_problem(self) -> str:
        """Returns what is wrong as soon as something is."""
        while True:
            problem = self.problem()
            if problem is not None:
                return problem
            now = self._loop.time()
            if now >= self._next_ping:
                self._nonce += 1
                self._next_ping = now + self._ping_interval_s
                self._ping(self._nonce)
            step_due = self._last_step + self._step_deadline_s if self._holds_work() else math.inf
            self._has_news.clear()
            try:
                async with asyncio.timeout(max(min(step_due, self._next_ping) - now, 0.001)):
                    await self._has_news.wait()
            except TimeoutError:
                continue
