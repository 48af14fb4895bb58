"""Turns of the event loop for work that takes some milliseconds of it.

What is ready when a loop comes round is all done before it looks at its sockets and timers again. So that fifty pieces
of such work are fifty short stalls with everybody else's in between, and not one long one, only so much of it is done
in a round. Where a round has room, taking a turn costs next to nothing: nothing is awaited.
"""

from __future__ import annotations

import asyncio
from collections import deque

ROUND_BYTES = 2**20
"""Of bodies that are looked through in one round: as much as the largest that is read on the loop, 1 to 6 ms."""


class LoopTurns:
    """First come, first served."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._num_bytes = 0
        self._is_counting = False

    async def next(self, num_bytes: int) -> None:
        """Returns when it is the caller's turn, which lasts until it awaits something."""
        loop = asyncio.get_running_loop()
        if not self._waiting and self._takes(num_bytes, loop):
            return
        mine = loop.create_future()
        self._waiting.append((num_bytes, mine))
        await mine

    def _takes(self, num_bytes: int, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether this round has room for it, which is then gone."""
        if self._is_counting and self._num_bytes + num_bytes > ROUND_BYTES:
            return False
        if not self._is_counting:
            self._is_counting = True
            self._num_bytes = 0
            loop.call_soon(self._next_round, loop)
        self._num_bytes += num_bytes
        return True

    def _next_round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_counting = False
        while self._waiting:
            num_bytes, turn = self._waiting[0]
            if not turn.done():  # else who waited does not any more
                if not self._takes(num_bytes, loop):
                    return
                turn.set_result(None)
            self._waiting.popleft()
