"""Clocks of a host: the date, and the time that has passed, which no correction of the date changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Also counts the time in which the host was suspended: a window passes then as well."""


class Clock(Protocol):
    """boot: elapsed times are comparable where it is the same, whichever process read them; empty is unknown."""

    boot: str

    def wall_ms(self) -> int:
        """Milliseconds since 1970, as the host's clock has them. It may be set, in either direction."""
        ...

    def elapsed_ms(self) -> int:
        """Milliseconds since a moment of no meaning."""
        ...


class SystemClock:
    """The clocks of this host."""

    def __init__(self) -> None:
        self.boot = _boot()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def elapsed_ms(self) -> int:
        return time.clock_gettime_ns(_ELAPSED) // 1_000_000


def _boot() -> str:
    """The kernel's id of this boot, and of the time namespace, which has elapsed times of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:
        return ""


SYSTEM_CLOCK = SystemClock()
