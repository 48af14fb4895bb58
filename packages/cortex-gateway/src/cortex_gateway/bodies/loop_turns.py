"""Turns of the event loop for work that takes some milliseconds of it.

What is ready when a loop comes round is all done before it looks at its sockets and timers again. So that fifty pieces
of such work are fifty short stalls with everybody else's in between, and not one long one, they go one in a round.
"""

from __future__ import annotations

import asyncio


class LoopTurns:
    """First come, first served."""

    def __init__(self) -> None:
        self._last: asyncio.Future[None] | None = None

    async def next(self) -> None:
        """Returns when it is the caller's turn, which lasts until it awaits something."""
        loop = asyncio.get_running_loop()
        before, mine = self._last, loop.create_future()
        self._last = mine
        try:
            if before is not None and not before.done():
                await asyncio.shield(before)
        finally:
            loop.call_soon(_end, mine)  # also of who does not wait any more


def _end(turn: asyncio.Future[None]) -> None:
    turn.set_result(None)
