"""`log_lines.Later` for a process that runs an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress


def later(seconds: float, call: Callable[[], None]) -> None:
    """Call it in so many seconds, if an event loop runs in this thread."""
    with suppress(RuntimeError):
        asyncio.get_running_loop().call_later(seconds, call)
